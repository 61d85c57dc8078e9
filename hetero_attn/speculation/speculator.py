"""Drafts for a batch: which requests get how many in the next pass, and what is learnt from it.

Drafts never change an answer: the request's own sampler draws from every row in turn, as it would pass by pass, and
goes on while it draws what was drafted. All that is decided here is what is worth computing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.planning.draft import MODEL_ACCEPTANCE
from hetero_attn.speculation.suffix_automaton import SuffixAutomaton
from hetero_attn.speculation.width import HOPED, SLOPE, PassCosts, Width

if TYPE_CHECKING:
    import torch


class Closing(Protocol):
    """What is held for one request in order to guess what comes next."""

    def close(self) -> None:
        """Let go of it; a later draft begins anew."""
        ...


class Drafter(Closing, Protocol):
    """Guesses what comes next of one request."""

    def draft(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may come behind both; called with texts that only ever grow."""
        ...


class NgramDrafter:
    """Guesses that what came before comes again."""

    def __init__(self) -> None:
        self._index = SuffixAutomaton()

    def draft(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> list[int]:
        """As `Drafter`."""
        known, prompt = len(self._index.tokens), len(prompt_ids)
        for token_id in (*prompt_ids[known:], *generated_ids[max(0, known - prompt) :]):
            self._index.append(token_id)
        return self._index.draft(count)

    def close(self) -> None:
        """As `Drafter`; the index is the request's own."""


@dataclass(slots=True)
class Speculation:
    """What one request's drafts are made from, and what became of them."""

    drafter: Any  # a Drafter, or what `DraftingModel.drafter` made
    width: Width
    drafted: int = 0
    accepted: int = 0


class Speculating(Protocol):
    """What is needed of a request."""

    prompt_token_ids: tuple[int, ...]
    token_ids: list[int]
    max_tokens: int
    speculation: Speculation | None


class Asked(NamedTuple):
    """What is wanted of a model that drafts: at most `most` tokens behind a request's prompt and answer.

    drafter: what the model made for the request.
    """

    drafter: Any
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    most: int


class DraftingModel(Protocol):
    """A model that drafts. step_share: what one of its steps is expected to take, over one of the model it drafts for.
    reads: whether what it holds of a request has a `follow`, and is to be shown what that model computes."""

    step_share: float
    reads: bool

    def drafter(self) -> Closing:
        """What it holds of one request."""
        ...

    def reusable(self, token_ids: Sequence[int], stored: int) -> int:
        """As `Speculator.reusable`, of one that reads."""
        ...

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What may come behind each text; called with texts that only ever grow, all of a pass together."""
        ...

    def close(self) -> None:
        """Release its memory; idempotent."""
        ...


class DraftReport(Protocol):
    """Where drafts are counted and decisions explained."""

    def judged(self, drafted: int, accepted: int) -> None:
        """Count a request's drafts of one pass, and those of them that were right."""
        ...

    def decided(self, reason: str) -> None:
        """Keep the reason of the last decision."""
        ...


class Speculator:
    """Decides on the drafts of every pass. report: where it says what it does. model: the one that drafts, in place of
    `make_drafter`; it is closed with the speculator."""

    def __init__(
        self,
        report: DraftReport,
        make_drafter: Callable[[], Closing] = NgramDrafter,
        model: DraftingModel | None = None,
    ) -> None:
        self.costs = PassCosts(SLOPE + (0.0 if model is None else model.step_share))
        self._hoped = HOPED if model is None else MODEL_ACCEPTANCE
        self._report, self._model = report, model
        self._make_drafter = make_drafter if model is None else model.drafter

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
        known = known or [[]] * len(requests)
        rows, drafts, asked = len(requests) + sum(map(len, known)), [], {}
        for index, (request, given) in enumerate(zip(requests, known, strict=True)):
            drafts.append(given)
            if given:
                continue
            room = min(most_rows - rows, request.max_tokens - len(request.token_ids) - 1)
            count = min(self._width(request, rows) - 1, room)
            if count > 0 and self._model is not None:
                asked[index] = self._asked(request, count)
            elif count > 0:
                drafts[-1] = request.speculation.drafter.draft(request.prompt_token_ids, request.token_ids, count)
            rows += count if index in asked else len(drafts[-1])
        if asked:
            for index, drafted in zip(asked, self._model.draft(tuple(asked.values())), strict=True):
                drafts[index] = drafted
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
        speculation.width.judge(drafted, accepted)
        speculation.drafted += drafted
        speculation.accepted += accepted
        self._report.judged(drafted, accepted)

    def _width(self, request: Speculating, rows: int) -> int:
        """Rows of a request in the next pass, which has `rows` rows without its drafts."""
        state = self._speculation(request).width
        width = state.choose(self.costs, rows)
        self._report.decided(self._reason(state, width, rows))
        return width

    def _speculation(self, request: Speculating) -> Speculation:
        if request.speculation is None:
            request.speculation = Speculation(self._make_drafter(), Width(self._hoped))
        return request.speculation

    def _asked(self, request: Speculating, count: int) -> Asked:
        return Asked(request.speculation.drafter, request.prompt_token_ids, request.token_ids, count)

    def _reason(self, state: Width, width: int, rows: int) -> str:
        ratio = self.costs.seconds(rows + max(width, 2) - 1) / self.costs.seconds(rows)
        what = "no drafts" if width == 1 else f"up to {width - 1} drafts"
        return f"{what}: {state.acceptance:.0%} are right, {max(width, 2) - 1} make a pass {ratio:.2f} times as long"


def make_speculator(
    wish: str, has_fixed_states: bool, report: DraftReport, model: DraftingModel | None = None
) -> Speculator | None:
    """The speculator of a load; None where nothing is drafted.

    has_fixed_states: a layer keeps a state that has taken in a token for good, so that a draft cannot be taken back.
    model: the one that drafts, where `wish` names one. Raises UnsupportedModelError where drafts were asked for by
    name.
    """
    if wish == "off" or (wish == "auto" and has_fixed_states):
        return None
    if has_fixed_states:
        raise UnsupportedModelError(
            f"speculate is {wish!r}, but this model has layers whose state cannot forget a wrong draft; leave it off"
        )
    return Speculator(report, model=model)
