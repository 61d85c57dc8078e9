"""Packed blocks of the coded formats of GGUF files to row-major bf16: exact values in float32, rounded once."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.forms.unpack import FEATURES, FORMS, GROUP, superblock_bytes
from gpu_kernels.launching import Kernel, Shape

GROUPS = 4  # of 64 inputs a program


@triton.jit
def scale_and_minimum(superblock, inside_group, line, feature, mask, HEADER: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """float32 [groups, 8, 16], 0-d zero where there is no minimum; see cpu_kernels/formats/base.py."""
    halves = superblock.to(tl.pointer_type(tl.float16))
    minimum = 0.0
    if HEADER == "S32" or HEADER == "SM32":
        at = line // 4 * 16 + feature
        scale = tl.load(halves + at, mask=mask, other=0.0).to(tl.float32)
        if HEADER == "SM32":
            minimum = tl.load(halves + 32 + at, mask=mask, other=0.0).to(tl.float32)
    elif HEADER == "E32":
        exponent = tl.load(superblock + (2 * inside_group + line // 4) * 16 + feature, mask=mask, other=0).to(tl.int32)
        bits = tl.where(exponent >= 2, (exponent - 1) << 23, 0x00200000 << tl.minimum(exponent, 1))
        scale = bits.to(tl.float32, bitcast=True)
    elif HEADER == "T16":
        factor = tl.load(superblock.to(tl.pointer_type(tl.float32)) + feature, mask=mask, other=0.0)
        byte = tl.load(superblock + 64 + (4 * inside_group + line // 2) * 16 + feature, mask=mask, other=0)
        value = (byte.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
        scale = tl.where(factor < 0, tl.div_rn(value, -factor), value * factor)
    elif HEADER == "F64" or HEADER == "F128":
        scale = tl.load(superblock.to(tl.pointer_type(tl.float32)) + feature, mask=mask, other=0.0)
    elif HEADER == "F32":
        scale = tl.load(superblock.to(tl.pointer_type(tl.float32)) + line // 4 * 16 + feature, mask=mask, other=0.0)
    elif HAS_ZEROS:
        IS_SIGNED: tl.constexpr = HEADER == "SI32" or HEADER == "SI64" or HEADER == "SI128"
        IS_128: tl.constexpr = HEADER == "SZ128" or HEADER == "SI128"
        EACH: tl.constexpr = 32 if HEADER == "SZ32" or HEADER == "SI32" else (128 if IS_128 else 64)
        SUPERBLOCK: tl.constexpr = 128 if IS_128 else 256
        at = (64 * inside_group + 8 * line) // EACH * 16 + feature
        scale = tl.load(halves + at, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(superblock + SUPERBLOCK // EACH * 32 + at, mask=mask, other=0)
        number = zero.to(tl.int8, bitcast=True) if IS_SIGNED else zero
        minimum = -(number.to(tl.float32) * scale)
    else:
        d = tl.load(halves + feature, mask=mask, other=0.0).to(tl.float32)
        if HEADER == "K2S16":
            at = 64 + (4 * inside_group + line // 2) * 16 + feature
        else:
            at = 64 + (2 * inside_group + line // 4) * 16 + feature
        sub = tl.load(superblock + at, mask=mask, other=0)
        if HEADER == "K2M32":
            scale = d * sub.to(tl.float32)
            dmin = tl.load(halves + 16 + feature, mask=mask, other=0.0).to(tl.float32)
            minimum = -dmin * tl.load(superblock + at + 128, mask=mask, other=0).to(tl.float32)
        else:
            scale = d * sub.to(tl.int8, bitcast=True).to(tl.float32)
    return scale, minimum


@Kernel
@triton.jit(do_not_specialize=["num_groups"])
def _dequantize_form_kernel(
    weight,
    out,
    num_groups,
    block_bytes,
    out_stride,
    HEADER: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    HEADER_BYTES: tl.constexpr,
    SUPERBLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    TABLE_LOW: tl.constexpr,
    TABLE_HIGH: tl.constexpr,
    VALUES: tl.constexpr,
    IS_E4M3: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """grid: (num_blocks, cdiv(num_groups, GROUPS)). weight: uint8 [num_blocks, block_bytes]; out: bf16
    [num_blocks * 16, out_stride]. Dimensions: group, line of 8 inputs, feature, input of the line."""
    CODE_LINES: tl.constexpr = 8 if BITS == 4 else (10 if BITS == 5 else (12 if BITS == 6 else 16))
    block = tl.program_id(0).to(tl.int64)
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[:, None, None]
    line, feature, index = tl.arange(0, 8)[None, :, None], tl.arange(0, 16)[None, None, :], tl.arange(0, 8)
    mask = (group < num_groups) & (line >= 0) & (feature >= 0)
    superblock = weight + block * block_bytes + group // TOGETHER * SUPERBLOCK_BYTES
    inside_group = group % TOGETHER
    words = (superblock + HEADER_BYTES + inside_group * (CODE_LINES * 64)).to(tl.pointer_type(tl.int32)) + feature
    shift = index % 4 * 8
    if BITS == 8:
        pointers = (words + line * 32)[:, :, :, None] + index // 4 * 16
        code = (tl.load(pointers, mask=mask[:, :, :, None], other=0) >> shift) & 255
    else:
        code = (tl.load(words + line * 16, mask=mask, other=0)[:, :, :, None] >> (shift + index // 4 * 4)) & 15
    if BITS == 5:
        upper = tl.load(words + (8 + line // 4) * 16, mask=mask, other=0)[:, :, :, None]
        code |= ((upper >> (shift + 2 * (line % 4)[:, :, :, None] + index // 4)) & 1) << 4
    if BITS == 6:
        upper = tl.load(words + (8 + line // 2) * 16, mask=mask, other=0)[:, :, :, None]
        code |= ((upper >> (shift + 4 * (line % 2)[:, :, :, None] + index // 4 * 2)) & 3) << 4
    if TABLE_LOW or TABLE_HIGH:
        entries = tl.where(code >= 8, TABLE_HIGH, TABLE_LOW).to(tl.int64)
        code = (entries >> (code % 8 * 8).to(tl.int64)).to(tl.int8).to(tl.int32)
    scale, minimum = scale_and_minimum(superblock, inside_group, line, feature, mask, HEADER, HAS_ZEROS)
    if IS_E4M3:  # exponent and mantissa of a float16 that is 256 times smaller, subnormal ones too
        half = (code & 128) << 8 | (code & 127) << 7
        number = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif len(VALUES) > 0:
        number = tl.full(code.shape, VALUES[0], tl.float32)
        for entry in tl.static_range(1, 16):
            number = tl.where(code == entry, VALUES[entry], number)
    else:
        number = (code - OFFSET).to(tl.float32)
    values = number * scale[:, :, :, None]
    if HEADER == "SM32" or HEADER == "K2M32" or HAS_ZEROS:
        values += minimum[:, :, :, None]
    target = out + (block * 16 + feature) * out_stride + group * 64 + line * 8
    tl.store(target[:, :, :, None] + index, values.to(tl.bfloat16), mask=mask[:, :, :, None])


def dequantize_form(weight: Tensor, name: str, in_features: int) -> Tensor:
    """bf16 [num_blocks * 16, inputs in whole groups of 64], newly allocated, of packed blocks of a format of FORMS."""
    num_blocks, num_groups = weight.shape[0], triton.cdiv(in_features, GROUP)
    out = torch.empty(num_blocks * FEATURES, num_groups * GROUP, dtype=torch.bfloat16, device=weight.device)
    _dequantize_form_kernel.launch(
        (num_blocks, triton.cdiv(num_groups, GROUPS), 1),
        (weight, out),
        (num_groups,),
        (weight.stride(0), out.stride(0)),
        _shape(name),
    )
    return out


@cache
def _shape(name: str) -> Shape:
    form, (low, high) = FORMS[name], _halves_of(FORMS[name].table)
    return Shape(
        HEADER=form.header,
        HAS_ZEROS=form.has_zero_points,
        BITS=form.bits,
        TOGETHER=form.inputs // GROUP,
        HEADER_BYTES=64 * form.header_lines,
        SUPERBLOCK_BYTES=superblock_bytes(form),
        OFFSET=form.offset,
        TABLE_LOW=low,
        TABLE_HIGH=high,
        VALUES=form.values,
        IS_E4M3=form.e4m3,
        GROUPS=GROUPS,
        num_warps=4,
    )


def _halves_of(table: tuple[int, ...]) -> tuple[int, int]:
    """A table of 16 signed bytes as two int64, a byte an entry; zeros where there is none."""
    data = bytes(value & 255 for value in table or (0,) * 16)
    low, high = (int.from_bytes(data[at : at + 8], "little", signed=True) for at in (0, 8))
    return low, high
