"""Launch shapes of the attention kernels, by dtype of the pages and head_dim."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """Launch shape of an attention kernel: rows and keys a step, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By dtype of the pages (uint8 as int8) and padded head_dim. Chosen so that the K and V tiles of every stage fit the 99
# KiB of shared memory that compute capability 8.6, 8.9 and 12.0 give a program, and so that nothing spills
# (tests/gpu_kernels/compiled/test_aot.py). float32 products run on the CUDA cores and want small tiles; codes are
# unpacked in registers.
DECODE_TILES = {
    torch.bfloat16: {
        16: Tile(0, 64, 4, 3),
        32: Tile(0, 64, 4, 3),
        64: Tile(0, 64, 4, 4),
        128: Tile(0, 64, 4, 3),
        256: Tile(0, 32, 8, 3),
        512: Tile(0, 16, 8, 2),
    },
    torch.int8: {
        16: Tile(0, 64, 4, 3),
        32: Tile(0, 64, 4, 3),
        64: Tile(0, 64, 4, 4),
        128: Tile(0, 64, 4, 4),
        256: Tile(0, 32, 8, 3),
        512: Tile(0, 16, 8, 2),
    },
    torch.float32: {
        16: Tile(0, 32, 4, 2),
        32: Tile(0, 32, 4, 2),
        64: Tile(0, 32, 4, 2),
        128: Tile(0, 16, 4, 2),
        256: Tile(0, 16, 8, 1),
        512: Tile(0, 16, 8, 1),
    },
}
PREFILL_TILES = {
    torch.bfloat16: {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),
        128: Tile(128, 32, 8, 3),
        256: Tile(64, 32, 8, 2),
        512: Tile(32, 16, 8, 1),
    },
    torch.int8: {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),
        128: Tile(64, 64, 4, 2),
        256: Tile(64, 32, 8, 2),
        512: Tile(32, 16, 8, 1),
    },
    torch.float32: {
        16: Tile(32, 32, 4, 2),
        32: Tile(32, 32, 4, 2),
        64: Tile(32, 32, 8, 2),
        128: Tile(32, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
        512: Tile(16, 16, 8, 1),
    },
}
# Compute capability 9.0 multiplies out of shared memory, of which it has more, so larger tiles fit its registers.
HOPPER_PREFILL_TILES = PREFILL_TILES | {
    torch.bfloat16: PREFILL_TILES[torch.bfloat16] | {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3)},
    torch.int8: PREFILL_TILES[torch.int8] | {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3)},
}


def tile_of(tiles: dict[torch.dtype, dict[int, Tile]], pages: Tensor, head_dim: int) -> Tile:
    """The launch shape for pages of that dtype; raises ValueError where a head is larger than any that is known."""
    by_head = tiles[torch.int8 if pages.dtype == torch.uint8 else pages.dtype]
    if head_pad(head_dim) not in by_head:
        raise ValueError(f"head_dim {head_dim} has no attention kernel: the largest is {max(by_head)}")
    return by_head[head_pad(head_dim)]


@functools.cache
def head_pad(head_dim: int) -> int:
    """Lanes of a head: a power of two that a tensor core takes."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether HOPPER_PREFILL_TILES are that device's."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # for which a launch without memory compiles
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
