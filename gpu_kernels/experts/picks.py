"""Which picks a program of an expert kernel computes: read from memory, as the router has left it."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCKS = 4  # of 16 features a program
FEW_ROWS = 16  # fewer picks an expert than this leave a tile of tensor cores empty, which costs nothing beside memory
LARGE_TILE = 64


@triton.jit
def picks_of(starts, first, count, tile, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert of those from `first` on, place of its first pick in this tile, place behind all its picks).

    Picks of each of `count` experts are cut into tiles of ROWS, which are numbered expert after expert; a tile that
    nobody needs has the same place twice. EXPERTS: a power of two, no less than count.
    """
    index = tl.arange(0, EXPERTS)
    begin = tl.load(starts + first + index, mask=index < count, other=0)
    end = tl.load(starts + first + index + 1, mask=index < count, other=0)
    tiles = (end - begin + (ROWS - 1)) // ROWS
    behind = tl.cumsum(tiles, 0)
    expert = tl.sum((behind <= tile).to(tl.int32), 0)
    mine = index == expert
    place = tl.sum(tl.where(mine, begin + (tile - (behind - tiles)) * ROWS, 0), 0)
    return expert, place, tl.sum(tl.where(mine, end, 0), 0)


def most_tiles(picks: int, count: int, rows: int) -> int:
    """The most tiles of `rows` that so many picks of so many experts can need."""
    return min(picks, count + picks // rows)


def tile_rows(picks: int, experts: int) -> int:
    """How many picks of one of so many experts a tile takes."""
    return FEW_ROWS if picks // experts <= FEW_ROWS else LARGE_TILE
