"""How many rows a pass is worth: what passes cost, how often drafts are right, and what follows for the next pass.

A pass of w rows of one request emits E(w) = 1 + a + ... + a^(w-1) tokens where the next draft is right with probability
a, and takes T(w). The width with the best rate is taken if it beats one row clearly. A drafter that is always wrong
thus costs the few passes that it takes to notice, and a few after each pause. A pause is as long as what was lost by
trying is little beside it, and doubles: where a row more is nearly free, so is trying, and it is soon tried again.
"""

from collections import deque
from dataclasses import dataclass
from math import ceil

from hetero_attn.planning.draft import WIDTHS
from placement.plan.drafting import expected_tokens

SLOPE = 0.07  # what a row adds to the time of one beside its draft, where nothing was measured yet
FORGOTTEN = 64  # passes after which a time that was worse than expected counts no more
NEWEST = 8  # passes whose first quarter counts: other programs never make one shorter
KEPT = 0.97  # of what was counted, a pass
HOPED, TRIED = 1 / 3, 1.5  # share of right drafts, and how many drafts that counts as, before any was tried
FIRST_WIDTH = 2
WORTH, BETTER = 1.03, 1.05  # than one row; than the present width
PATIENCE = 4  # passes that a larger width must have looked better
SHORTEST_PAUSE, LONGEST_PAUSE = 4, 512  # passes
LIKELY = 0.5  # where drafts are right more often, it may be the clock that was wrong
LOST = 0.02  # of the time, at most, by trying again


class PassCosts:
    """Seconds of a pass by its rows, its drafts' included: the first quarter of the newest where it was measured, else
    in the ratio that rows are expected to cost; a single one counts beside what was expected.

    step_share: what a draft is expected to take of the time of one row, until one was timed.
    """

    def __init__(self, step_share: float = 0.0) -> None:
        self._step_share = step_share
        self._draft_s, self._asked_s = deque[float](maxlen=NEWEST), deque[float](maxlen=NEWEST)
        self._has_drafted = False
        self._newest: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}
        self._passes, self._last = 0, dict[int, int]()

    @property
    def is_blank(self) -> bool:
        """Whether nothing was measured yet."""
        return not self._seconds

    def observe(self, rows: int, seconds: float) -> None:
        """Count a pass; the first one of its rows, which may have been recorded or compiled, is left out."""
        self._passes += 1
        self._last[rows] = self._passes
        if rows not in self._newest:
            self._newest[rows] = deque(maxlen=NEWEST)
            return
        newest = self._newest[rows]
        newest.append(seconds)
        expected = [] if len(newest) > 1 or self._seconds.keys() <= {rows} else [self._expected(rows)]
        times = sorted([*newest, *expected])
        self._seconds[rows] = times[len(times) // 4]

    def drafted(self, count: int, seconds: float) -> None:
        """Count what a drafter took for so many drafts; the first time, in which it took in the text, is left out.

        It says what drafts of other widths cost, before any pass of them was tried.
        """
        if self._has_drafted:
            self._draft_s.append(seconds / count)
            self._asked_s.append(seconds)
        self._has_drafted = True

    @property
    def asking(self) -> float:
        """What asking a drafter took lately, at most, over the time of one row: it may have had to catch up."""
        return max(self._asked_s) / self._seconds[1] if self._asked_s and 1 in self._seconds else 0.0

    def seconds(self, rows: int) -> float:
        """What a pass of so many rows is expected to take; without any measurement, in units of one row."""
        if rows not in self._seconds:
            return self._expected(rows) if self._seconds else self._ratio(rows)
        known = self._seconds[rows]
        is_old = len(self._seconds) > 1 and self._passes - self._last[rows] > FORGOTTEN
        return min(known, self._expected(rows)) if is_old else known

    def _expected(self, rows: int) -> float:
        """Seconds by those of the nearest other number of rows."""
        nearest = min(self._seconds.keys() - {rows}, key=lambda known: (abs(known - rows), known))
        return self._seconds[nearest] * self._ratio(rows) / self._ratio(nearest)

    def _ratio(self, rows: int) -> float:
        """Time of a pass over that of one row, where nobody measured it."""
        share = self._step_share
        if self._draft_s and 1 in self._seconds:
            share = min(self._draft_s) / self._seconds[1]
        return 1 + (SLOPE + share) * (rows - 1)


@dataclass(slots=True)
class Share:
    """How likely the next draft is right, given that those before it were. right, wrong: drafts, which fade pass by
    pass; of a pass, those up to the first wrong one."""

    right: float
    wrong: float

    @classmethod
    def hoped(cls, share: float) -> "Share":
        """Before any was tried."""
        return cls(TRIED * share, TRIED * (1 - share))

    @property
    def value(self) -> float:
        """The share itself."""
        return self.right / (self.right + self.wrong)

    def judge(self, drafted: int, accepted: int) -> None:
        """Count a pass: how many of its drafts were right, from the first on."""
        self.right = KEPT * self.right + accepted
        self.wrong = KEPT * self.wrong + (accepted < drafted)


class Width:
    """The width of one request's passes, from pass to pass. hoped: the share of right drafts, before any was tried."""

    def __init__(self, hoped: float = HOPED) -> None:
        self._hoped, self._share = hoped, Share.hoped(hoped)
        self._width, self._looked_better = 0, 0
        self._pauses = 0  # in a row
        self._more, self._beside = 0.0, 1  # of the newest pass with drafts: time more than without, and rows without
        self._lost = 0.0  # passes without drafts that would have taken the time lost by drafts since the last pause
        self.pause = 0  # passes without drafts that are still to come

    @property
    def acceptance(self) -> float:
        """How likely the next draft is right, given that those before it were."""
        return self._share.value

    def choose(self, costs: PassCosts, rows: int, most: int = WIDTHS[-1]) -> int:
        """Rows for this request in the next pass, at most `most` >= 2 of them, 1 for no drafts; the pass has `rows`
        rows without any."""
        width = self._chosen(costs, rows, most)
        if width > 1:
            self._more, self._beside = costs.seconds(rows - 1 + width) / costs.seconds(rows) - 1, rows
        return width

    def judge(self, drafted: int, accepted: int) -> None:
        """Count a pass: how many of its drafts were right, from the first on."""
        self._share.judge(drafted, accepted)
        self._lost = max(0.0, self._lost + self._more - accepted / self._beside)
        if self._share.right > 4 * self._share.wrong:
            self._pauses = 0

    def _chosen(self, costs: PassCosts, rows: int, most: int) -> int:
        """As `choose`."""
        if costs.is_blank:  # what rows cost shows only beside what one costs
            return 1
        if self.pause > 0:
            self.pause -= 1
            if self.pause > 0:
                return 1
            self._share, self._width, self._looked_better = Share.hoped(self._hoped), 0, 0
            return FIRST_WIDTH  # whatever was measured: a time that was wrong is never seen again otherwise
        rates = {width: self._rate(costs, rows, width) for width in (1, *WIDTHS)}
        best = max(WIDTHS, key=rates.__getitem__)
        if rates[best] < WORTH * rates[1]:
            self._rest(costs, rows)
            return 1
        self._go_on(rates, best)
        return max(width for width in WIDTHS if width <= min(self._width, most))

    def _rest(self, costs: PassCosts, rows: int) -> None:
        """No drafts for so many passes that what was lost, or will be by trying again, is little beside them, and for
        twice as many each further time."""
        trying = costs.seconds(rows - 1 + FIRST_WIDTH) / costs.seconds(rows) - 1 if self.acceptance < LIKELY else 0.0
        first = max(SHORTEST_PAUSE, ceil(max(self._lost, trying) / LOST))
        pause = max(first << self._pauses, round(costs.asking / LOST))  # who has to catch up is dear for one pass
        self.pause, self._pauses, self._lost = min(pause, LONGEST_PAUSE), self._pauses + 1, 0.0

    def _go_on(self, rates: dict[int, float], best: int) -> None:
        """Take the best width at first, and from then on a smaller one at once, a larger one after a while."""
        if not self._width or best < self._width:
            self._width, self._looked_better = best, 0
        elif rates[best] > BETTER * rates[self._width]:
            self._looked_better += 1
            if self._looked_better >= PATIENCE:
                self._width, self._looked_better = best, 0
        else:
            self._looked_better = 0

    def _rate(self, costs: PassCosts, rows: int, width: int) -> float:
        """Tokens a second of the whole pass, every other row of which emits one."""
        return (rows - 1 + expected_tokens(self.acceptance, width)) / costs.seconds(rows - 1 + width)
