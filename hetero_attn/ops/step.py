"""One forward pass as data: which rows of which sequences it computes, and what of the KV cache they read and write.

    rows of a step   [a][b][c c c][d d d d d d d d][e e e e e]
    parts            | one by one | a chunk        | a chunk |

Embedding, norms, linears and the writing of keys and values know only rows. Attention takes them part by part: rows
that attend *one by one*, each to its own range of keys, are one part however many sequences they are of (the newest
token of each, or a chain of drafts behind it); a *chunk*, consecutive rows of one prompt that attend together, is a
part of its own. A step whose rows all attend one by one makes the same calls whatever their tokens, so it may be
recorded.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import lt
from typing import NamedTuple

import numpy as np
import torch

from cpu_kernels.contract import ChunkKeys, RowKeys
from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.pages import PagedStore
from hetero_attn.cache.pool import CachePool
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.ops.step_rows import Rows, has_drafts, ids_of_rows, kept_states
from hetero_attn.spec.workload import table_bytes
from placement.plan.workload import row_tier

Segment = RowKeys | ChunkKeys  # what one part reads in one store, in the store's own memory


@dataclass(frozen=True, slots=True)
class Segments:
    """One part's segments in the stores of one pool; None where there is no store or nothing visible in it."""

    host: Segment | None
    recent: Segment | None
    spilled: Segment | None


@dataclass(frozen=True, slots=True)
class PoolStep:
    """A step in one pool. slots: where each row is written, int64 [rows, kv_heads of the side], None for a side
    without kv_heads. parts: in the order of the step's."""

    slots: Activation
    parts: tuple[Segments, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [first, first + rows) of a step, which attend in one call.

    q_start: the position of the first one of a chunk; None for rows that attend one by one.
    """

    first: int
    rows: int
    q_start: int | None = None

    @property
    def is_chunk(self) -> bool:
        """Whether the rows are consecutive ones of one sequence that attend together."""
        return self.q_start is not None

    @property
    def streams_older(self) -> bool:
        """Whether older tokens of the GPU's KV heads come to the GPU; for single rows the CPU attends them in place."""
        return self.is_chunk and self.rows > 1


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of `rows` rows.

    positions: int64 [rows] on both sides. tier: the row tier that selects every linear's cut. pools: for each
    pool of the cache, in its order. sequence_ids: int64 [rows] on both sides, of each row's sequence among the
    states of fixed size, or ~ that of a draft; neither side where the model has none. has_drafts: whether states take
    in no more than each sequence's first row. kept_states: (rows, place), ascending: behind so many rows the state of
    the last one's sequence is kept in a place of `KVCache.prefix_states`. token_ids: int64 [rows] in host memory.
    """

    rows: int
    tier: int
    token_ids: torch.Tensor
    positions: Activation
    parts: tuple[Part, ...]
    pools: tuple[PoolStep, ...]
    sequence_ids: Activation = Activation(None, None)
    kept_states: tuple[tuple[int, int], ...] = ()
    has_drafts: bool = False

    @property
    def is_one_by_one(self) -> bool:
        """Whether no row is of a chunk."""
        return len(self.parts) == 1 and not self.parts[0].is_chunk


def make_step(lanes: Lanes, cache: KVCache, work: Sequence[Rows]) -> Step:
    """Hold pages for the step's tokens and work out its segments; moves old pages to DRAM where the plan says so.

    work: each sequence once; those whose rows attend one by one come first.
    """
    for each in work:
        cache.make_room(each.sequence, len(each.token_ids))
    step_rows = _lay_out(work)
    rows = len(step_rows.positions)
    stores = [_in_stores(pool, step_rows) for pool in cache.pools]
    positions, sequence_ids = Activation(None, step_rows.positions), Activation(None, None)
    drafts = has_drafts(cache, work, rows)
    if cache.states:
        sequence_ids = Activation(None, torch.tensor(list(ids_of_rows(work, drafts)), device="cpu"))
    if lanes.device is not None:
        positions, sequence_ids, stores = _uploaded(lanes, positions, sequence_ids, stores)
    pools = tuple([PoolStep(_slots(each), tuple(_segments(each, step_rows))) for each in stores])
    kept = tuple(kept_states(cache, work)) if cache.states else ()
    token_ids = torch.from_numpy(np.array([token_id for each in work for token_id in each.token_ids], np.int64))
    parts = tuple(_parts(step_rows))
    return Step(rows, row_tier(rows), token_ids, positions, parts, pools, sequence_ids, kept, drafts)


def most_lines(lanes: Lanes, cache: KVCache, rows: int) -> int:
    """How many lines the page tables of a step of at most `rows` rows may have: one a single row, one a chunk.

    On a device they share a buffer, which holds `max_batch` lines for every layer; layers placed alike share theirs.
    """
    if lanes.tables is None:
        return rows
    stores = [pool.recent for pool in cache.pools if pool.recent is not None]

    def size_bytes(lines: int) -> int:
        per_store = (
            table_bytes(8 * rows * store.kv_heads) + table_bytes(lines * store.table[0].nbytes) for store in stores
        )
        own = (2 if cache.states else 1) * table_bytes(8 * rows)
        return own + sum(per_store) + 2 * len(stores) * table_bytes(4 * lines)

    return bisect_right(range(rows + 1), lanes.tables.buffers[0].nbytes, key=size_bytes) - 1


class _Entry(NamedTuple):
    """One line of a step's page tables: positions [first, stop) of a sequence, one row or a chunk."""

    id: int
    first: int
    stop: int


class _StepRows(NamedTuple):
    """The rows of a step, whatever the store. singles: how many entries, the first ones, are one row.

    sequence_ids: of each row, or the only one. positions: int64 [rows].
    """

    entries: tuple[_Entry, ...]
    singles: int
    sequence_ids: int | list[int]
    positions: torch.Tensor


class _InStore(NamedTuple):
    """A step in one store. bounds: keys that each entry sees there, [start, stop).

    slots: int64 [rows, kv_heads], None where nothing is written. table: int32 [entries, kv_heads, max_pages]. start,
    stop: the bounds of single rows, int32, None without any.
    """

    bounds: list[tuple[int, int]]
    slots: torch.Tensor | None
    table: torch.Tensor
    start: torch.Tensor | None
    stop: torch.Tensor | None


Stores = tuple[_InStore | None, _InStore | None, _InStore | None]  # host, recent, spilled


def _lay_out(work: Sequence[Rows]) -> _StepRows:
    entries, singles, sequence_ids, positions = [], 0, [], []
    for sequence, token_ids, _, is_chunk, _ in work:
        first, stop = sequence.length, sequence.length + len(token_ids)
        each = [(first, stop)] if is_chunk else [(position, position + 1) for position in range(first, stop)]
        entries += [_Entry(sequence.id, *bounds) for bounds in each]
        singles += 0 if is_chunk else len(token_ids)
        sequence_ids += [sequence.id] * len(token_ids)
        positions += range(first, stop)
    only = sequence_ids[0] if len(work) == 1 and not singles else sequence_ids
    return _StepRows(tuple(entries), singles, only, torch.from_numpy(np.array(positions, np.int64)))


def _parts(step_rows: _StepRows) -> Iterator[Part]:
    if step_rows.singles:
        yield Part(0, step_rows.singles)
    first = step_rows.singles
    for entry in step_rows.entries[step_rows.singles :]:
        yield Part(first, entry.stop - entry.first, entry.first)
        first += entry.stop - entry.first


def _in_stores(pool: CachePool, step_rows: _StepRows) -> Stores:
    starts = [pool.first_visible(entry.first) for entry in step_rows.entries]
    stops = [entry.stop for entry in step_rows.entries]
    split = [max(start, pool.boundary(entry.id)) for start, entry in zip(starts, step_rows.entries, strict=True)]
    return (
        _in_store(pool.host, step_rows, starts, stops, True),
        _in_store(pool.recent, step_rows, split, stops, True),
        _in_store(pool.spilled, step_rows, starts, split, False),
    )


def _in_store(
    store: PagedStore | None, step_rows: _StepRows, start: list[int], stop: list[int], writes: bool
) -> _InStore | None:
    if store is None or not any(map(lt, start, stop)):
        return None
    slots = store.slots(step_rows.sequence_ids, step_rows.positions) if writes else None
    of_entries = list(zip(start, stop, strict=True)), slots, store.tables([entry.id for entry in step_rows.entries])
    if not step_rows.singles:
        return _InStore(*of_entries, None, None)
    singles = [np.array(each[: step_rows.singles], np.int32) for each in (start, stop)]
    return _InStore(*of_entries, *map(torch.from_numpy, singles))


def _uploaded(
    lanes: Lanes, positions: Activation, sequence_ids: Activation, stores: list[Stores]
) -> tuple[Activation, Activation, list[Stores]]:
    """The positions, the ids of the sequences, and what every `recent` store needs, on the device, brought there
    together."""
    own = [item.host for item in (positions, sequence_ids) if item.host is not None]
    recent = [tensor for _, each, _ in stores if each is not None for tensor in each[1:] if tensor is not None]
    on_device = iter(lanes.upload([*own, *recent]))
    positions = Activation(next(on_device), positions.host)
    if sequence_ids.host is not None:
        sequence_ids = Activation(next(on_device), sequence_ids.host)
    return (
        positions,
        sequence_ids,
        [(host, _with_tables(recent, on_device), spilled) for host, recent, spilled in stores],
    )


def _with_tables(store: _InStore | None, tables: Iterator[torch.Tensor]) -> _InStore | None:
    if store is None:
        return None
    return _InStore(store.bounds, *(None if tensor is None else next(tables) for tensor in store[1:]))


def _slots(stores: Stores) -> Activation:
    host, recent, _ = stores
    return Activation(None if recent is None else recent.slots, None if host is None else host.slots)


def _segments(stores: Stores, step_rows: _StepRows) -> Iterator[Segments]:
    if step_rows.singles:
        yield Segments(*[_one_by_one(store, step_rows) for store in stores])
    for entry in range(step_rows.singles, len(step_rows.entries)):
        yield Segments(*(_of_chunk(store, entry, step_rows.entries[entry].first) for store in stores))


def _one_by_one(store: _InStore | None, step_rows: _StepRows) -> RowKeys | None:
    singles = step_rows.singles
    if store is None:
        return None
    if singles == len(step_rows.entries):  # one of them sees a key, or there were no such store
        return RowKeys(store.table, store.start, store.stop)
    if all(first >= last for first, last in store.bounds[:singles]):
        return None
    return RowKeys(store.table[:singles], store.start, store.stop)


def _of_chunk(store: _InStore | None, entry: int, q_start: int) -> ChunkKeys | None:
    if store is None or store.bounds[entry][0] >= store.bounds[entry][1]:
        return None
    return ChunkKeys(store.table[entry], *store.bounds[entry], q_start)
