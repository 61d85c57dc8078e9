"""How the tokens of an answer are made where somebody drafts: in passes of several rows, mixed with passes of one.

A pass of w rows of one sequence emits E(w) = 1 + a + ... + a^(w-1) tokens where the next draft is right with
probability a (Leviathan et al., arXiv 2211.17192, section 3.1); one in which nobody has a guess has one row.
"""

from dataclasses import dataclass


def expected_tokens(acceptance: float, width: int) -> float:
    """Tokens that a pass of `width` rows emits: its own one and the drafts that are right."""
    return sum(acceptance**exponent for exponent in range(width))


@dataclass(frozen=True, slots=True)
class Guesses:
    """How good guesses are: how likely the next draft is right given that those before it were, in which share of the
    passes there are any, and whether both were measured or are assumed."""

    acceptance: float
    share: float = 1.0
    is_measured: bool = False

    def tokens(self, rows: int) -> float:
        """Tokens that a pass emits on average, where those with drafts have so many rows."""
        return 1.0 + self.share * (expected_tokens(self.acceptance, rows) - 1.0)

    def line(self) -> str:
        """For people."""
        source = "measured" if self.is_measured else "assumed"
        often = "every pass has drafts" if self.share == 1.0 else f"{self.share:.0%} of the passes have drafts"
        return f"{often}, of which {self.acceptance:.0%} are right ({source})"


@dataclass(frozen=True, slots=True)
class Drafting:
    """What a plan counts on: passes with drafts have `rows` rows, of which each but the first is a draft.

    step_s: what a step of the drafter takes, one for every row of such a pass; prompt_row_s: what it takes for a token
    of a prompt; both 0 where no model drafts. Where all passes have one row a drafter is asked for nothing. speculate:
    who drafts, as options and policies write it. gpu_bytes, pinned_bytes, host_bytes: what a drafter has of the budgets
    of both, pinned memory counted as host memory too.
    """

    rows: int
    guesses: Guesses
    step_s: float = 0.0
    prompt_row_s: float = 0.0
    speculate: str = "off"
    gpu_bytes: int = 0
    pinned_bytes: int = 0
    host_bytes: int = 0

    @property
    def tokens(self) -> float:
        """Tokens that a pass emits on average."""
        return self.guesses.tokens(self.rows)

    @property
    def taken_bytes(self) -> dict[str, dict[str, int]]:
        """What a drafter has, by place, under its kind where it has anything there; host is without pinned."""
        taken = {"gpu": self.gpu_bytes, "pinned": self.pinned_bytes, "host": self.host_bytes - self.pinned_bytes}
        return {place: {"drafter": size} if size else {} for place, size in taken.items()}

    @property
    def share(self) -> float:
        """The share of the passes that have drafts."""
        return self.guesses.share if self.rows > 1 else 0.0

    @property
    def drafts_s(self) -> float:
        """What the drafts of a pass that has some take."""
        return self.rows * self.step_s if self.rows > 1 else 0.0
