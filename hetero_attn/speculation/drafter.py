"""Who guesses what comes next of a request, and what is asked of it; n-grams are the guess that needs no model."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from hetero_attn.speculation.suffix_automaton import SuffixAutomaton


class Kind(NamedTuple):
    """Guesses that are right about equally often. name: in the plural; hoped: the share, before any was tried."""

    name: str
    hoped: float


# By the least length of the match that the guess is made from: the longer, the surer.
MATCHES = (
    (9, Kind("drafts behind matches of 9 tokens or more", 0.8)),
    (5, Kind("drafts behind matches of 5 to 8 tokens", 0.65)),
    (3, Kind("drafts behind matches of 3 or 4 tokens", 0.5)),
    (2, Kind("drafts behind matches of 2 tokens", 0.3)),
    (1, Kind("drafts behind matches of 1 token", 0.2)),
)


class Drafter(Protocol):
    """Guesses what comes next of one request."""

    def draft(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may come behind both; called with texts that only ever grow."""
        ...

    def close(self) -> None:
        """Let go of whatever is held for the request; a later draft begins anew."""
        ...


class Pending(Protocol):
    """A drafter with a model, which has `pending` tokens to compute before its next guess."""

    pending: list[int]


D = TypeVar("D", bound=Pending)


def passes(drafters: Sequence[D], most_rows: int) -> Iterator[list[D]]:
    """The drafters of each pass of their model, as many as its rows take."""
    group: list[D] = []
    for drafter in drafters:
        if group and sum(len(each.pending) for each in (*group, drafter)) > most_rows:
            yield group
            group = []
        group.append(drafter)
    yield group


@runtime_checkable
class Sorting(Protocol):
    """A drafter whose guesses are of several kinds, which are judged apart."""

    def kind(self, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> Kind | None:
        """Of which kind the next draft behind both would be; None where there would be none."""
        ...


class Asked(NamedTuple):
    """Drafts that are wanted of one request's drafter: arguments of `Drafter.draft` behind it."""

    drafter: Any
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    most: int


class DraftingModel(Protocol):
    """A model that drafts. step_share: what one of its steps is expected to take, over one of the model it drafts for.
    reads: whether what it holds of a request has a `follow`, and is to be shown what that model computes."""

    step_share: float
    reads: bool

    def drafter(self) -> Any:
        """What it keeps for one request, with a `close` as `Drafter` has it."""
        ...

    def reusable(self, token_ids: Sequence[int], stored: int) -> int:
        """As `Speculator.reusable`, of one that reads."""
        ...

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Drafts of several requests, at most as many as each asks for."""
        ...

    def close(self) -> None:
        """Release its memory; idempotent."""
        ...


class NgramDrafter:
    """Guesses that what came before comes again."""

    def __init__(self) -> None:
        self._index = SuffixAutomaton()

    def kind(self, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> Kind | None:
        """As `Sorting`, by how long the end of the text is that occurred before."""
        self._read(prompt_ids, generated_ids)
        length, _ = self._index.match()
        return next((kind for least, kind in MATCHES if length >= least), None)

    def draft(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> list[int]:
        """As `Drafter`."""
        self._read(prompt_ids, generated_ids)
        return self._index.draft(count, MATCHES[-1][0])

    def close(self) -> None:
        """As `Drafter`; the index is the request's own."""

    def _read(self, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        known, prompt = len(self._index.tokens), len(prompt_ids)
        for token_id in (*prompt_ids[known:], *generated_ids[max(0, known - prompt) :]):
            self._index.append(token_id)
