"""Packing: rows of fp32, bf16 or fp16 weights into the blocks of formats/weights.py, one block per chunk.

q8: of a few scales around absmax / 127, the one of least squared error. q4: of a grid of ranges inside [min, max], the
one of least squared error, then the scale and minimum that fit its codes best (least squares) and the codes that fit
those, as long as the error falls. Scale and minimum are rounded to float16 before codes are chosen, so the error that
is compared is the error that the stored bytes have. A value that is not finite fails the call.
"""

from llvmlite import ir
from numba import types

from cpu_kernels.formats.weights import BLOCK_FEATURES, GROUP_INPUTS, LINE_BYTES, SUPERBLOCK_LINES
from cpu_kernels.linear.packing.search import pack_group_q4, pack_group_q8
from cpu_kernels.linear.repacking.lanes import QUAD, stage_memory, stage_quad
from cpu_kernels.linear.row_blocks import over_blocks
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.vector import (
    I32,
    VF32,
    VHALF,
    VI16,
    VI32,
    F32x16,
    call_llvm,
    constant,
    emits,
    intp,
    load_as,
    load_bf16_tail,
    load_f32_tail,
    load_half_tail,
    round_to_bf16,
    store_as,
    store_bf16_tail,
    store_f32,
    store_f32_tail,
    store_half_tail,
    widen_halves,
)

ROW_BYTES = 4 * GROUP_INPUTS  # of one feature's group as float32
STAGE_BYTES = BLOCK_FEATURES * ROW_BYTES


@emits(types.int64, F32x16, F32x16, F32x16, F32x16)
def not_finite(b, v0, v1, v2, v3):
    """1 if any lane is NaN or infinite."""
    largest = constant(VI32, 0)
    for vector in (v0, v1, v2, v3):
        magnitude = b.and_(b.bitcast(vector, VI32), constant(VI32, 0x7FFFFFFF))
        largest = b.select(b.icmp_signed(">", magnitude, largest), magnitude, largest)
    absmax = call_llvm(b, "llvm.vector.reduce.smax.v16i32", I32, largest)
    return b.zext(b.icmp_signed(">=", absmax, ir.Constant(I32, 0x7F800000)), ir.IntType(64))


def whole_loader(source_dtype: str):
    """Intrinsic (address): 16 numbers of a row."""

    @emits(F32x16, intp)
    def load(b, at):
        if source_dtype == "fp32":
            return load_as(b, at, VF32)
        return widen_halves(b, load_as(b, at, VI16), 1 if source_dtype == "bf16" else 2)

    return load


def group_loader(source_dtype: str):
    """Function (address, left): 64 numbers of a row as four vectors, zeros where none are left.

    Where all are there they are read without a mask, which numbers of 16 bits pay for one by one.
    """
    load_tail = {"fp32": load_f32_tail, "bf16": load_bf16_tail, "fp16": load_half_tail}[source_dtype]
    load, part_bytes = whole_loader(source_dtype), 64 if source_dtype == "fp32" else 32

    @helper
    def load_group(at, left):
        second, third, fourth = at + part_bytes, at + 2 * part_bytes, at + 3 * part_bytes
        if left >= GROUP_INPUTS:
            return load(at), load(second), load(third), load(fourth)
        return (
            load_tail(at, left),
            load_tail(second, left - 16),
            load_tail(third, left - 32),
            load_tail(fourth, left - 48),
        )

    return load_group


def coded_block(source_dtype: str, weight_dtype: str):
    """Function (rows, row_bytes, in_features, to, scratch): a block of codes; False if a value is not finite.

    Of every group rows are laid as float32 behind each other and then turned, so that a line has one input of each; the
    search then works in the place of the first."""
    load_group, item_bytes = group_loader(source_dtype), 4 if source_dtype == "fp32" else 2
    pack_group = pack_group_q4 if weight_dtype == "q4" else pack_group_q8
    superblock_bytes = SUPERBLOCK_LINES[weight_dtype] * LINE_BYTES

    @helper
    def lay(rows, stride, left, scratch):
        for feature in range(BLOCK_FEATURES):
            v0, v1, v2, v3 = load_group(rows + feature * stride, left)
            if not_finite(v0, v1, v2, v3):
                return False
            at = scratch + ROW_BYTES * feature
            store_f32(v0, at)
            store_f32(v1, at + 64)
            store_f32(v2, at + 128)
            store_f32(v3, at + 192)
        return True

    @helper
    def pack_block(rows, stride, in_features, to, scratch):
        for group in range((in_features + GROUP_INPUTS - 1) // GROUP_INPUTS):
            first, stage = GROUP_INPUTS * group, scratch + STAGE_BYTES
            if not lay(rows + item_bytes * first, stride, in_features - first, scratch):
                return False
            for quad in range(GROUP_INPUTS // QUAD):
                stage_quad(scratch + 4 * QUAD * quad, ROW_BYTES, stage + LINE_BYTES * QUAD * quad)
            pack_group(stage, scratch, to + superblock_bytes * group)
        return True

    return pack_block


def whole_storer(weight_dtype: str):
    """Intrinsic (16 numbers, address): them as plain ones of this dtype."""

    @emits(types.void, F32x16, intp)
    def store(b, vector, at):
        as_held = {"fp32": lambda: vector, "bf16": lambda: round_to_bf16(b, vector)}
        store_as(b, as_held.get(weight_dtype, lambda: b.fptrunc(vector, VHALF))(), at)

    return store


def group_storer(weight_dtype: str):
    """Function (four vectors, address, left): 64 numbers of a row, or those that are left; without a mask where all
    are there, as `group_loader` reads them."""
    store_tail = {"fp32": store_f32_tail, "bf16": store_bf16_tail, "fp16": store_half_tail}[weight_dtype]
    store, part_bytes = whole_storer(weight_dtype), 64 if weight_dtype == "fp32" else 32

    @helper
    def store_group(v0, v1, v2, v3, at, left):
        second, third, fourth = at + part_bytes, at + 2 * part_bytes, at + 3 * part_bytes
        if left >= GROUP_INPUTS:
            store(v0, at)
            store(v1, second)
            store(v2, third)
            store(v3, fourth)
            return
        store_tail(v0, at, left)
        store_tail(v1, second, left - 16)
        store_tail(v2, third, left - 32)
        store_tail(v3, fourth, left - 48)

    return store_group


def plain_block(source_dtype: str, weight_dtype: str):
    """Function (rows, row_bytes, in_features, to, scratch): a block of plain rows; False if a value is not finite."""
    load_group, source_bytes = group_loader(source_dtype), 4 if source_dtype == "fp32" else 2
    store_group, item_bytes = group_storer(weight_dtype), 4 if weight_dtype == "fp32" else 2

    @helper
    def pack_row(source, in_features, target):
        for first in range(0, in_features, GROUP_INPUTS):
            left = in_features - first
            v0, v1, v2, v3 = load_group(source + source_bytes * first, left)
            if not_finite(v0, v1, v2, v3):
                return False
            store_group(v0, v1, v2, v3, target + item_bytes * first, left)
        return True

    @helper
    def pack_block(rows, stride, in_features, to, scratch):
        good = True
        for feature in range(BLOCK_FEATURES):
            good = pack_row(rows + feature * stride, in_features, to + item_bytes * feature * in_features) and good
        return good

    return pack_block


def pack(source_dtype: str, weight_dtype: str):
    """Kernel."""
    is_coded = weight_dtype in SUPERBLOCK_LINES
    pack_block = (coded_block if is_coded else plain_block)(source_dtype, weight_dtype)
    memory = stage_memory(2 * STAGE_BYTES if is_coded else LINE_BYTES)
    return over_blocks(pack_block, memory)
