"""Launch shapes of quantized_linear.py, by the number of rows and of blocks."""

from __future__ import annotations

import functools
from typing import NamedTuple

from gpu_kernels.launching import Shape


class GemvShape(NamedTuple):
    """Launch shape of one row: warps of a program, and superblocks a warp has in flight."""

    warps: int
    unroll: int


class Tile(NamedTuple):
    """Launch shape of more rows: rows of a tile, tiles of 32 features and parts of the inputs (a warp each) of a
    program, and superblocks a warp has in flight."""

    rows: int
    tiles: int
    parts: int
    unroll: int


# Up to FEW_BLOCKS the programs are too few to fill a GPU with few warps each, so a program has more.
FEW_BLOCKS = 512
GEMV_FEW = GemvShape(8, 4)
GEMV_MANY = GemvShape(4, 4)
# Two tiles of 64 rows share the inputs that a multiprocessor caches. None may spill
# (tests/gpu_kernels/compiled/test_aot.py).
TILES_FEW = (Tile(8, 1, 8, 2), Tile(16, 1, 8, 2), Tile(32, 1, 8, 1), Tile(64, 1, 4, 1))
TILES_MANY = (Tile(8, 1, 4, 2), Tile(16, 1, 4, 2), Tile(32, 1, 4, 1), Tile(64, 2, 2, 1))
LARGEST_TILE_ROWS = 64


def gemv_shape(num_blocks: int) -> GemvShape:
    """The launch shape of one row."""
    return GEMV_FEW if num_blocks <= FEW_BLOCKS else GEMV_MANY


def tile_for(rows: int, num_blocks: int) -> Tile:
    """The launch shape of several rows; more rows than the largest tile has are several tiles."""
    tiles = TILES_FEW if num_blocks <= FEW_BLOCKS else TILES_MANY
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


@functools.cache
def gemv_launch(shape: GemvShape, is_q4: bool, has_bias: bool, accumulate: bool) -> Shape:
    """Constants of the kernel of one row."""
    return Shape(
        IS_Q4=is_q4,
        WARPS=shape.warps,
        UNROLL=shape.unroll,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        num_warps=shape.warps,
    )


@functools.cache
def flat_launch(tile: Tile, is_q4: bool, has_bias: bool, accumulate: bool) -> Shape:
    """Constants of the kernel of more rows."""
    return Shape(
        IS_Q4=is_q4,
        ROWS=tile.rows,
        TILES=tile.tiles,
        PARTS=tile.parts,
        UNROLL=tile.unroll,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        num_warps=tile.tiles * tile.parts,
        num_stages=1,
    )
