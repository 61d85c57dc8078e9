"""What sequences bring to a step, and what that means for their states of fixed size.

A row of a step without chunks changes its sequence's state if it is the first; those behind it are drafts, of which
nobody knows yet whether they are right. Of a chunk the state is kept where prompts that begin alike may go on from.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.pool import SequenceState


class Rows(NamedTuple):
    """What one sequence brings to a step: the tokens behind those that it has.

    logits: of how many of them, the last ones, logits are wanted. is_chunk: they attend together; else one by one.
    hidden: of a head that drafts what stands beside each token, float32 [len(token_ids), hidden_size].
    """

    sequence: SequenceState
    token_ids: Sequence[int]
    logits: int = 1
    is_chunk: bool = False
    hidden: torch.Tensor | None = None


def wanted_rows(work: Sequence[Rows]) -> list[int]:
    """Which rows of a step logits are wanted of, in their order."""
    wanted, stop = [], 0
    for each in work:
        stop += len(each.token_ids)
        wanted += range(stop - each.logits, stop)
    return wanted


def has_drafts(cache: KVCache, work: Sequence[Rows], rows: int) -> bool:
    """Whether states leave out the rows behind each sequence's first: of a step of so many rows, none of a chunk."""
    if not cache.states or work[-1].is_chunk or len(work) == rows:
        return False
    return cache.states.holds(rows)


def ids_of_rows(work: Sequence[Rows], drafts: bool) -> Iterator[int]:
    """Where each row finds its sequence's state, see `Step.sequence_ids`. drafts: whether a row may be one."""
    for each in work:
        for place in range(len(each.token_ids)):
            yield ~each.sequence.id if drafts and place else each.sequence.id


def kept_states(cache: KVCache, work: Sequence[Rows]) -> Iterator[tuple[int, int]]:
    """See `Step.kept_states`. Rows that attend one by one are of no prompt, and pass none of its lengths."""
    first = 0
    for each in work:
        if each.is_chunk:
            for length, place in sorted(cache.prefix_states.wanted(each.sequence.id).items()):
                if 0 < length - each.sequence.length <= len(each.token_ids):
                    yield first + length - each.sequence.length, place
        first += len(each.token_ids)
