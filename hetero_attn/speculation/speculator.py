"""Drafts for a batch: which requests get how many in the next pass, and what is learnt from it.

Drafts never change an answer: the request's own sampler draws from every row in turn, as it would pass by pass, and
goes on while it draws what was drafted. All that is decided here is what is worth computing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from hetero_attn.planning.guesses import MODEL_GUESSES
from hetero_attn.speculation.drafter import Asked, Drafter, DraftingModel, Kind, NgramDrafter, Sorting
from hetero_attn.speculation.width import HOPED, PassCosts, Share, Width

if TYPE_CHECKING:
    import torch

NO_MATCH = "no drafts: the end of the text did not occur before"
FIRST_ALONE = "no drafts: the answer has no token behind its first, which the prompt gives"
NONE_MADE = "no drafts: what drafts had none, as where a text has outgrown its context"


@dataclass(slots=True)
class Speculation:
    """What one request's drafts are made from, and what became of them. kind: of the next pass's drafts; sorting: the
    drafter, where it has several kinds; widths: of each kind; reason: why the next pass has as many as it has."""

    drafter: Any
    kind: Kind
    sorting: Sorting | None = None
    widths: dict[Kind, Width] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    reason: str = FIRST_ALONE


class Speculating(Protocol):
    """What is needed of a request."""

    prompt_token_ids: tuple[int, ...]
    token_ids: list[int]
    max_tokens: int
    speculation: Speculation | None


class DraftReport(Protocol):
    """Where drafts are counted and decisions explained."""

    def judged(self, drafted: int, accepted: int) -> None:
        """Count a request's drafts of one pass, and those of them that were right."""
        ...

    def decided(self, reason: str, decision: str) -> None:
        """Keep the reason of the last decision, and count it."""
        ...


class Speculator:
    """Decides on the drafts of every pass. report: where it says what it does. model: the one that drafts, in place of
    `make_drafter`; it is closed with the speculator.

    What requests teach of a kind of drafts is what the next request begins with.
    """

    def __init__(
        self,
        report: DraftReport,
        make_drafter: Callable[[], Drafter] = NgramDrafter,
        model: DraftingModel | None = None,
    ) -> None:
        self._report, self._model = report, model
        self.costs = PassCosts(self.step_share)
        self._kind = Kind("drafts", HOPED if model is None else MODEL_GUESSES.acceptance)
        self._shares: dict[Kind, Share] = {}
        self._make_drafter = make_drafter if model is None else model.drafter

    @property
    def step_share(self) -> float:
        """What a step of the model that drafts is expected to take, over one of the large model; 0 without."""
        return 0.0 if self._model is None else self._model.step_share

    def forget(self, request: Speculating) -> None:
        """Let go of what is held for a request that has ended or waits again."""
        if request.speculation is not None:
            request.speculation.drafter.close()

    def close(self) -> None:
        """Release the model that drafts; idempotent."""
        if self._model is not None:
            self._model.close()

    def drafts(
        self, requests: Sequence[Speculating], most_rows: int, known: Sequence[list[int]] | None = None
    ) -> list[list[int]]:
        """Drafts of each request for a pass of at most `most_rows` rows, one of each request without them.

        known: what a pass brings along already, request by request; who has such gets nothing else.
        """
        drafts = [list(given) for given in known or [[]] * len(requests)]
        rows, asked = len(requests) + sum(map(len, drafts)), {}
        for place, request in enumerate(requests):
            if drafts[place]:
                continue
            count = self._count(request, rows, most_rows - rows)
            rows += count
            if count:
                assert request.speculation is not None
                drafter = request.speculation.drafter
                asked[place] = Asked(drafter, request.prompt_token_ids, request.token_ids, count)
        if asked:
            for place, drafted in zip(asked, self._drafted(list(asked.values())), strict=True):
                drafts[place] = drafted
                self._say(requests[place], bool(drafted))
        return drafts

    @property
    def reads(self) -> bool:
        """Whether `follow` is to be called."""
        return self._model is not None and self._model.reads

    def follow(self, request: Speculating, position: int, taken: "torch.Tensor") -> None:
        """Show a head that reads along what was computed of a request's tokens from `position` on, behind each of which
        the next one is known: float32 [tokens, fusion_width], which it keeps."""
        drafter = self._speculation(request).drafter
        drafter.follow(request.prompt_token_ids, request.token_ids, position, taken)

    def reusable(self, token_ids: Sequence[int], stored: int) -> int:
        """How many of `stored` tokens of a prompt, which need not be computed, are not, see `EagleHead.reusable`."""
        return stored if self._model is None else self._model.reusable(token_ids, stored)

    def judge(self, request: Speculating, drafted: int, accepted: int) -> None:
        """Learn how many of a request's drafts were right, from the first on."""
        speculation = request.speculation
        assert speculation is not None and 0 <= accepted <= drafted
        kind = speculation.kind
        speculation.widths[kind].judge(drafted, accepted)
        self._shares[kind].judge(drafted, accepted)
        speculation.drafted += drafted
        speculation.accepted += accepted
        self._report.judged(drafted, accepted)

    def _drafted(self, asked: Sequence[Asked]) -> list[list[int]]:
        if self._model is not None:
            began = time.perf_counter()
            drafts = self._model.draft(asked)
            if made := sum(map(len, drafts)):
                self.costs.drafted(made, time.perf_counter() - began)
            return drafts
        return [each.drafter.draft(*each[1:]) for each in asked]

    def _count(self, request: Speculating, rows: int, room: int) -> int:
        """How many drafts a request gets in a pass that has `rows` rows so far and room for so many more."""
        speculation, left = self._speculation(request), request.max_tokens - len(request.token_ids) - 1
        width = 1
        if left < 1:
            reason, decision = "no drafts: the next token is the last", "last token"
        elif room < 1:
            reason, decision = f"no drafts: a pass of {rows} rows is full", "pass is full"
        elif (kind := self._kind_of(request, speculation)) is None:
            reason, decision = NO_MATCH, "no match"
        else:
            speculation.kind = kind
            state = self._width_of(speculation, kind)
            width = state.choose(self.costs, rows, 1 + min(room, left))
            reason = self._reason(kind, state, width, rows)
            decision = "not timed yet" if self.costs.is_blank else "not worth it"
        speculation.reason = reason
        if width == 1:
            self._report.decided(reason, decision)
        return width - 1

    def _say(self, request: Speculating, has_drafts: bool) -> None:
        """Report on a request that was to get drafts, once it is known whether there are any."""
        speculation = request.speculation
        assert speculation is not None
        if not has_drafts:
            speculation.reason = NONE_MADE
        self._report.decided(speculation.reason, "drafts" if has_drafts else "none made")

    def _speculation(self, request: Speculating) -> Speculation:
        if request.speculation is None:
            drafter = self._make_drafter()
            request.speculation = Speculation(drafter, self._kind, drafter if isinstance(drafter, Sorting) else None)
        return request.speculation

    def _kind_of(self, request: Speculating, speculation: Speculation) -> Kind | None:
        if speculation.sorting is None:
            return self._kind
        return speculation.sorting.kind(request.prompt_token_ids, request.token_ids)

    def _width_of(self, speculation: Speculation, kind: Kind) -> Width:
        """How wide the request's passes with such drafts are; it begins as others of the kind have fared."""
        if kind not in speculation.widths:
            share = self._shares.setdefault(kind, Share.hoped(kind.hoped))
            speculation.widths[kind] = Width(share.value)
        return speculation.widths[kind]

    def _reason(self, kind: Kind, state: Width, width: int, rows: int) -> str:
        wide = rows - 1 + max(width, 2)
        ratio = self.costs.seconds(wide) / self.costs.seconds(rows)
        what = "no drafts" if width == 1 else f"{width - 1} draft{'s' if width > 2 else ''}"
        later = f"; tried again in {state.pause} passes" if state.pause else ""
        return f"{what}: {state.acceptance:.0%} of {kind.name} are right, {wide} rows take {ratio:.2f} x {rows}{later}"


def make_speculator(wish: str, report: DraftReport, model: DraftingModel | None = None) -> Speculator | None:
    """The speculator of a load; None where nothing is drafted. model: the one that drafts, where `wish` names one."""
    return None if wish == "off" else Speculator(report, model=model)
