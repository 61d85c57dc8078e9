"""Paired blocks: o cut by rows beside the heads of qkv, down beside the neurons of gate_up.

Both linears of such a block are cut at the same fractions, so that each lane goes on with what it has computed and
the block costs one hand-over. What a row cut has in DRAM streams as a whole or not at all, and so does the linear
before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from placement.plan.memory import LinearPlacement
from placement.plan.shards import LinearShard
from placement.plan.workload import Workload
from placement.solve.classes import LayerClass

Homes = dict[tuple[int, int], tuple[int, ...]]
Streams = dict[tuple[int, int, int], tuple[int, ...]]


def paired_workload(workload: Workload) -> Workload:
    """The workload with the linears of `row_cuts` cut by rows; those given are then used up."""
    rows = {shard.name: shard for shard in workload.row_cuts}
    return replace(workload, linears=tuple(rows.get(s.name, s) for s in workload.linears), row_cuts=())


def is_paired(workload: Workload) -> bool:
    """Whether some linear is cut by rows."""
    return workload.has_row_cuts


def first_names(workload: Workload) -> dict[str, str]:
    """By name of a row cut, the name of the linear before it in its block."""
    linears = workload.linears
    return {linears[i].name: linears[_first(linears, i)].name for i, shard in enumerate(linears) if shard.row_cut}


def _first(linears: Sequence[LinearShard], row: int) -> int:
    """Position of the linear before a row cut in its block."""
    block = (linears[row].layer, linears[row].block)
    before = next((i for i in reversed(range(row)) if (linears[i].layer, linears[i].block) == block), None)
    assert before is not None, f"{linears[row].name} is cut by rows, and its block has no linear before it"
    return before


def pairs(cls: LayerClass) -> Iterator[tuple[int, int]]:
    """Positions in a class of the two linears of every paired block."""
    shards = [linear.shard for linear in cls.linears]
    for i, shard in enumerate(shards):
        if shard.row_cut:
            yield _first(shards, i), i


def homes_beside(classes: Sequence[LayerClass], homes: Homes) -> Homes:
    """GPU homes in which the first linear of a paired block keeps what the second one does."""
    result = dict(homes)
    for c, cls in enumerate(classes):
        for first, second in pairs(cls):
            units, beside = cls.linears[first].shard.units, cls.linears[second].shard.units
            result[c, first] = tuple(home * units // beside for home in homes[c, second])
    return result


def streams_beside(classes: Sequence[LayerClass], homes: Homes, streams: Streams) -> Streams:
    """Streams in which both linears of a paired block stream all that they have in DRAM, or nothing."""
    result = dict(streams)
    for c, cls in enumerate(classes):
        for first, second in pairs(cls):
            left = {i: [cls.linears[i].shard.units - home for home in homes[c, i]] for i in (first, second)}
            for tier in [tier for (other, i, tier) in streams if (other, i) == (c, second)]:
                whole = [
                    all(streams[c, i, tier][position] == left[i][position] for i in (first, second))
                    for position in range(cls.count)
                ]
                for i in (first, second):
                    result[c, i, tier] = tuple(n if streamed else 0 for n, streamed in zip(left[i], whole, strict=True))
    return result


def block_apart(workload: Workload, linears: Sequence[LinearPlacement]) -> str | None:
    """Name of a row cut whose lanes have other fractions than the linear before it, or which streams in part."""
    placed = {shard.name: placement for shard, placement in zip(workload.linears, linears, strict=True)}
    for name, before in first_names(workload).items():
        cut, first = placed[name], placed[before]
        ours, theirs = ((p.gpu_units, *p.stream_units) for p in (cut, first))
        whole = set(cut.stream_units) <= {0, cut.dram_units}
        if not whole or any(a * first.units != b * cut.units for a, b in zip(ours, theirs, strict=True)):
            return name
    return None
