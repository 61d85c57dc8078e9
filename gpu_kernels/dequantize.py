"""Packed q8 or q4 blocks to row-major bf16, for the dense products of many rows."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.launching import Kernel, Shape
from gpu_kernels.reference import BLOCK_FEATURES, GROUP, SUPERBLOCK_BYTES

SPANS = 16
NUM_WARPS = 4


@Kernel
@triton.jit
def _dequantize_kernel(weight, out, num_spans, block_bytes, out_stride, IS_Q4: tl.constexpr, SPANS: tl.constexpr):
    """grid: (num_blocks, cdiv(num_spans, SPANS)). weight: uint8 [num_blocks, block_bytes]; out: bf16 [num_blocks * 16,
    out_stride]. A span is 8 lines: 64 inputs of q4, 32 inputs of q8. Dimensions: four features, line, span, feature of
    the four, input of the line; in this order a thread both loads 16 bytes and stores whole runs of inputs."""
    INPUTS: tl.constexpr = 8 if IS_Q4 else 4  # of one feature in one line
    block = tl.program_id(0).to(tl.int64)
    four, line, one = tl.arange(0, 4)[:, None, None, None], tl.arange(0, 8)[:, None, None], tl.arange(0, 4)
    span = (tl.program_id(1) * SPANS + tl.arange(0, SPANS))[:, None]
    if IS_Q4:
        line_word, scale_half = span * 144 + 16, span * 288
    else:
        line_word, scale_half = span // 2 * 272 + 16 + span % 2 * 128, span // 2 * 544 + span % 2 * 16
    inside = span < num_spans
    start = weight + block * block_bytes
    words = tl.load(start.to(tl.pointer_type(tl.int32)) + line_word + line * 16 + four * 4 + one, mask=inside, other=0)
    halves = start.to(tl.pointer_type(tl.float16)) + scale_half + line * 0 + four * 4 + one
    scale = tl.load(halves, mask=inside, other=0.0).to(tl.float32)[:, :, :, :, None]
    inputs = tl.arange(0, INPUTS)
    if IS_Q4:
        nibbles = (words[:, :, :, :, None] >> (inputs % 4 * 8 + inputs // 4 * 4)) & 15
        minimum = tl.load(halves + 16, mask=inside, other=0.0).to(tl.float32)[:, :, :, :, None]
        values = nibbles.to(tl.float32) * scale + minimum
    else:
        values = (((words[:, :, :, :, None] >> (inputs * 8)) & 255) - 128).to(tl.float32) * scale
    row = (block * 16 + four * 4 + one) * out_stride
    target = out + (row + span * (8 * INPUTS) + line * INPUTS)[:, :, :, :, None] + inputs
    tl.store(target, values.to(tl.bfloat16), mask=inside[:, :, None])


def dequantize(weight: Tensor, weight_dtype: str) -> Tensor:
    """bf16 [num_blocks * 16, inputs of whole superblocks], newly allocated, of packed q8 or q4 blocks."""
    num_blocks, num_groups = weight.shape[0], weight.shape[1] // SUPERBLOCK_BYTES[weight_dtype]
    out = torch.empty(num_blocks * BLOCK_FEATURES, num_groups * GROUP, dtype=torch.bfloat16, device=weight.device)
    num_spans = num_groups * (1 if weight_dtype == "q4" else 2)
    _dequantize_kernel.launch(
        (num_blocks, -(-num_spans // SPANS), 1),
        (weight, out),
        (),
        (num_spans, weight.stride(0), num_groups * GROUP),
        _shape(weight_dtype == "q4"),
    )
    return out


@functools.cache
def _shape(is_q4: bool) -> Shape:
    return Shape(IS_Q4=is_q4, SPANS=SPANS, num_warps=NUM_WARPS)
