"""One forward pass as data: which rows it computes, and which segments of the KV cache it reads and writes.

A *prefill* step computes consecutive rows of one sequence; a *decode* step one row for each of several sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.pages import PagedStore
from hetero_attn.cache.pool import LayerGroup, SequenceState
from hetero_attn.cache.stream import PageBlock
from hetero_attn.lanes.lanes import Activation, Lanes
from placement.plan.workload import row_tier


@dataclass(frozen=True, slots=True)
class Segment:
    """What one step reads and writes in one store, in the store's own memory.

    slots: int64 [rows, groups], or None where the step writes nothing.
    decode: table int32 [batch, groups, max_pages]; start and stop int32 [batch].
    prefill: table int32 [groups, max_pages]; start and stop ints.
    """

    slots: torch.Tensor | None
    table: torch.Tensor
    start: torch.Tensor | int
    stop: torch.Tensor | int


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One step's segments in the stores of one layer group; None where there is no store or nothing visible in it."""

    host: Segment | None
    recent: Segment | None
    spilled: Segment | None


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of `rows` rows.

    is_prefill: consecutive rows of the only sequence, the first at position `q_start`; else one row for each
    sequence. positions: int64 [rows] on both sides. tier: the row tier that selects every linear's cut. groups:
    segments for each layer group of the cache, in its order.
    """

    is_prefill: bool
    rows: int
    tier: int
    sequences: tuple[SequenceState, ...]
    positions: Activation
    groups: tuple[GroupStep, ...]

    @property
    def streams_older(self) -> bool:
        """Whether older tokens of the GPU's groups come to the GPU; for a single row the CPU attends them in place."""
        return self.is_prefill and self.rows > 1

    @property
    def q_start(self) -> int:
        """Position of the first row of a prefill step."""
        return self.sequences[0].length


def plan_step(lanes: Lanes, cache: KVCache, sequences: Sequence[SequenceState], rows: int, is_prefill: bool) -> Step:
    """Hold pages for the step's tokens and work out its segments; moves old pages to DRAM where the plan says so."""
    new_tokens = rows if is_prefill else 1
    for sequence in sequences:
        cache.make_room(sequence, new_tokens)
    if is_prefill:
        positions = torch.arange(sequences[0].length, sequences[0].length + rows, device="cpu")
    else:
        positions = torch.tensor([sequence.length for sequence in sequences], device="cpu")
    groups = tuple(_group_step(group, sequences, positions, new_tokens, is_prefill) for group in cache.layer_groups)
    step = Step(is_prefill, rows, row_tier(rows), tuple(sequences), Activation(None, positions), groups)
    return step if lanes.device is None else _uploaded(lanes, step)


def older_blocks(cache: KVCache, step: Step, block_pages: int) -> Iterator[PageBlock]:
    """The blocks of older pages that the layers of a step attend on the GPU, in their order."""
    for index in range(len(cache.places)):
        group, layer = cache.places[index]
        if step.groups[group].spilled is not None:
            yield from layer_blocks(cache.layer_groups[group].spilled, step.groups[group].spilled, layer, block_pages)


def layer_blocks(store: PagedStore, segment: Segment, layer: int, block_pages: int) -> Iterator[PageBlock]:
    """The pages of a prefill segment in host memory, in blocks of at most `block_pages`."""
    stop = -(-segment.stop // store.page_size)
    for first in range(segment.start // store.page_size, stop, block_pages):
        rows = segment.table[0, first : min(first + block_pages, stop)].tolist()
        yield PageBlock(store, layer, first, tuple(row // store.groups for row in rows))


def _group_step(
    group: LayerGroup,
    sequences: Sequence[SequenceState],
    positions: torch.Tensor,
    new_tokens: int,
    is_prefill: bool,
) -> GroupStep:
    stops = [sequence.length + new_tokens for sequence in sequences]
    starts = [group.first_visible(sequence.length) for sequence in sequences]
    split = [max(start, group.boundary(sequence.slot)) for start, sequence in zip(starts, sequences, strict=True)]

    def segment(store: PagedStore | None, start: list[int], stop: list[int], writes: bool) -> Segment | None:
        if store is None or all(first >= last for first, last in zip(start, stop, strict=True)):
            return None
        return _segment(store, sequences, positions if writes else None, start, stop, is_prefill)

    return GroupStep(
        host=segment(group.host, starts, stops, True),
        recent=segment(group.recent, split, stops, True),
        spilled=segment(group.spilled, starts, split, False),
    )


def _segment(
    store: PagedStore,
    sequences: Sequence[SequenceState],
    positions: torch.Tensor | None,
    start: list[int],
    stop: list[int],
    is_prefill: bool,
) -> Segment:
    of_rows = [sequence.slot for sequence in sequences]
    slots = None if positions is None else store.slots(of_rows[0] if is_prefill else of_rows, positions)
    if is_prefill:
        return Segment(slots, store.table[of_rows[0]], start[0], stop[0])
    tables = store.table[of_rows]
    first, last = (torch.tensor(bounds, dtype=torch.int32, device="cpu") for bounds in (start, stop))
    return Segment(slots, tables, first, last)


def _uploaded(lanes: Lanes, step: Step) -> Step:
    """The step with its positions and every `recent` segment on the device, brought there together."""
    recent = [group.recent for group in step.groups if group.recent is not None]
    tables = [step.positions.host] + [table for segment in recent for table in _tables(segment)]
    on_device = iter(lanes.upload(tables))
    positions = Activation(next(on_device), step.positions.host)
    groups = tuple(
        group if group.recent is None else replace(group, recent=_with_tables(group.recent, on_device))
        for group in step.groups
    )
    return replace(step, positions=positions, groups=groups)


def _tables(segment: Segment) -> list[torch.Tensor]:
    """What of a segment is a tensor, in a fixed order."""
    fields = (segment.slots, segment.table, segment.start, segment.stop)
    return [field for field in fields if isinstance(field, torch.Tensor)]


def _with_tables(segment: Segment, tables: Iterator[torch.Tensor]) -> Segment:
    fields = (segment.slots, segment.table, segment.start, segment.stop)
    return Segment(*(next(tables) if isinstance(field, torch.Tensor) else field for field in fields))
