"""rope_append: optional RMS norm of a head, then (a, b) -> (a cos - b sin, b cos + a sin) on (i, i + rotary_dim/2).

q goes to its output, k and v to their slots in the pages. Rows of codes are made as formats/pages.py says, from a
float32 row in the thread's working memory; for them q and k are multiplied by its Hadamard matrix, in place.
"""

import numpy as np

from cpu_kernels.attention.parameters import RowShape
from cpu_kernels.attention.products.row_vectors import bf16_scalar, store_bf16_scalar, store_int8, store_nibbles
from cpu_kernels.formats.pages import GROUP_DIMS, is_quantised
from cpu_kernels.small.elementwise_kernel import inverse_rms
from cpu_kernels.team.arguments import ROPE
from cpu_kernels.team.chunks import fail, parameter, real_parameter, take
from cpu_kernels.vectors.arithmetic import (
    add,
    butterfly,
    div,
    fma,
    keep_below,
    max_lanes,
    min_lanes,
    mul,
    round_even,
    sub,
    sum_lanes,
    vabs,
    vmax,
    vmin,
)
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import load_i64
from cpu_kernels.vectors.vector import load_f32, load_f32_tail, splat, store_bf16_tail, store_f32, store_f32_tail

ZERO, ONE = np.float32(0.0), np.float32(1.0)
INFINITY = np.float32(np.inf)
butterfly_1, butterfly_2, butterfly_4, butterfly_8 = (butterfly(stride) for stride in (1, 2, 4, 8))


@helper
def not_a_number(v0, v1):
    """0, or NaN where a lane is not finite: added to a scale, it makes a wrong row show instead of hiding it."""
    zero = splat(ZERO)
    return sum_lanes(add(mul(v0, zero), mul(v1, zero)))


@helper
def codes_of(vector, minimum, scale, low, high):
    """round((x - minimum) / scale) clamped; 0 where the scale is 0."""
    if scale == ZERO:
        return splat(ZERO)
    code = round_even(div(sub(vector, splat(minimum)), splat(scale)))
    return vmin(vmax(code, splat(low)), splat(high))


@helper
def store_group_q8(row, left, codes, numbers, groups, stride):
    """64 dims as int8 and their scale."""
    v0, v1 = load_f32_tail(row, left), load_f32_tail(row + 64, left - 16)
    v2, v3 = load_f32_tail(row + 128, left - 32), load_f32_tail(row + 192, left - 48)
    largest = max_lanes(vmax(vmax(vabs(v0), vabs(v1)), vmax(vabs(v2), vabs(v3))))
    scale = bf16_scalar(largest / np.float32(127.0) + not_a_number(add(v0, v1), add(v2, v3)))
    low, high = np.float32(-127.0), np.float32(127.0)
    store_int8(codes_of(v0, ZERO, scale, low, high), codes)
    store_int8(codes_of(v1, ZERO, scale, low, high), codes + 16)
    store_int8(codes_of(v2, ZERO, scale, low, high), codes + 32)
    store_int8(codes_of(v3, ZERO, scale, low, high), codes + 48)
    store_bf16_scalar(scale, numbers)


@helper
def store_group_q4(row, left, codes, numbers, groups, stride):
    """32 dims as nibbles, their scale and minimum."""
    v0, v1 = load_f32_tail(row, left), load_f32_tail(row + 64, left - 16)
    smallest = min_lanes(vmin(keep_below(v0, left, INFINITY), keep_below(v1, left - 16, INFINITY)))
    largest = max_lanes(vmax(keep_below(v0, left, -INFINITY), keep_below(v1, left - 16, -INFINITY)))
    minimum = bf16_scalar(smallest)
    scale = bf16_scalar((largest - minimum) / np.float32(15.0) + not_a_number(v0, v1))
    c0, c1 = codes_of(v0, minimum, scale, ZERO, np.float32(15.0)), codes_of(v1, minimum, scale, ZERO, np.float32(15.0))
    store_nibbles(keep_below(c0, left, ZERO), keep_below(c1, left - 16, ZERO), codes)
    store_bf16_scalar(scale, numbers)
    store_bf16_scalar(minimum, numbers + groups * stride)


def row_writer(kv_dtype: str):
    """Function: one float32 row of K or V -> its place in a page."""
    shape, is_fp32 = RowShape.of(kv_dtype), kv_dtype == "fp32"
    has_codes, dims, group_bytes = shape.has_codes, GROUP_DIMS.get(kv_dtype, 1), shape.line_bytes
    store_group = store_group_q8 if kv_dtype == "q8" else store_group_q4

    @helper
    def write_row(row, head_dim, page, offset, row_bytes, page_size):
        to = page + offset * row_bytes
        if has_codes:
            groups = (head_dim + dims - 1) // dims
            numbers = page + page_size * row_bytes + 2 * offset
            for group in range(groups):
                at, left = row + 4 * dims * group, head_dim - dims * group
                store_group(at, left, to + group_bytes * group, numbers + 2 * page_size * group, groups, 2 * page_size)
        else:
            for i in range(0, head_dim, 16):
                value = load_f32_tail(row + 4 * i, head_dim - i)
                if is_fp32:
                    store_f32_tail(value, to + 4 * i, head_dim - i)
                else:
                    store_bf16_tail(value, to + 2 * i, head_dim - i)

    return write_row


@helper
def normed(source, norm, factor, index, count):
    """`count` numbers of a head from `index` on, times the norm where there is one."""
    value = load_f32_tail(source + 4 * index, count)
    if norm:
        value = mul(mul(value, factor), load_f32_tail(norm + 4 * index, count))
    return value


@helper
def rotate_head(source, head_dim, half, cos, sin, norm, eps, to):
    """One head, normed and rotated, as float32."""
    factor = splat(inverse_rms(source, head_dim, eps)) if norm else splat(ONE)
    for i in range(0, half, 16):
        left = half - i
        a, b = normed(source, norm, factor, i, left), normed(source, norm, factor, half + i, left)
        c, s = load_f32_tail(cos + 4 * i, left), load_f32_tail(sin + 4 * i, left)
        store_f32_tail(sub(mul(a, c), mul(b, s)), to + 4 * i, left)
        store_f32_tail(fma(b, c, mul(a, s)), to + 4 * (half + i), left)
    for i in range(2 * half, head_dim, 16):
        store_f32_tail(normed(source, norm, factor, i, head_dim - i), to + 4 * i, head_dim - i)


@helper
def mix_lanes(x, block):
    """The butterflies of the strides below `block` that stay inside of a register."""
    if block > 1:
        x = butterfly_1(x)
    if block > 2:
        x = butterfly_2(x)
    if block > 4:
        x = butterfly_4(x)
    if block > 8:
        x = butterfly_8(x)
    return x


@helper
def mix_64(row, factor):
    """The butterflies of strides 1 to 32 of 64 dims, in four registers, times the factor."""
    a, b = mix_lanes(load_f32(row), 16), mix_lanes(load_f32(row + 64), 16)
    c, d = mix_lanes(load_f32(row + 128), 16), mix_lanes(load_f32(row + 192), 16)
    a, b, c, d = add(a, b), sub(a, b), add(c, d), sub(c, d)
    store_f32(mul(add(a, c), factor), row)
    store_f32(mul(add(b, d), factor), row + 64)
    store_f32(mul(sub(a, c), factor), row + 128)
    store_f32(mul(sub(b, d), factor), row + 192)


@helper
def mix_registers(row, head_dim, stride, factor):
    """The butterflies of one stride of 16 or more, times the factor."""
    for start in range(0, head_dim, 2 * stride):
        for i in range(start, start + stride, 16):
            a, b = load_f32(row + 4 * i), load_f32(row + 4 * (i + stride))
            store_f32(mul(add(a, b), factor), row + 4 * i)
            store_f32(mul(sub(a, b), factor), row + 4 * (i + stride))


@helper
def spread(row, head_dim, block, factor):
    """A float32 row times the Hadamard matrix of formats/pages.py, in place; factor: 1 / sqrt(block) in every lane.

    The last butterflies take the factor along, and those before them a factor of 1, which rounds nothing.
    """
    one = splat(ONE)
    if block >= 64:
        stride = 64
        for i in range(0, head_dim, 64):
            mix_64(row + 4 * i, factor if block == 64 else one)
    else:
        stride = 16
        for i in range(0, head_dim, 16):
            at, left = row + 4 * i, head_dim - i
            store_f32_tail(mul(mix_lanes(load_f32_tail(at, left), block), factor if block <= 16 else one), at, left)
    while stride < block:
        mix_registers(row, head_dim, stride, factor if 2 * stride == block else one)
        stride *= 2


def unit_appender(kv_dtype: str):
    """Function: the heads of one unit of a row rotated, q to its place and K and V into a page."""
    write_row, has_codes = row_writer(kv_dtype), is_quantised(kv_dtype)

    @helper
    def append(arguments, thread, row, kv_head, slot, cos, sin):
        queries_per_kv, head_dim, half = (
            parameter(arguments, ROPE.queries_per_kv),
            parameter(arguments, ROPE.head_dim),
            parameter(arguments, ROPE.half),
        )
        q_norm, k_norm, eps = (
            parameter(arguments, ROPE.q_norm),
            parameter(arguments, ROPE.k_norm),
            real_parameter(arguments, ROPE.eps),
        )
        page_size = parameter(arguments, ROPE.page_size)
        block, factor = parameter(arguments, ROPE.block), splat(np.float32(real_parameter(arguments, ROPE.factor)))
        page, offset = slot // page_size, slot % page_size
        source = (
            parameter(arguments, ROPE.qkv)
            + row * parameter(arguments, ROPE.qkv_row)
            + kv_head * parameter(arguments, ROPE.qkv_unit)
        )
        q = parameter(arguments, ROPE.q) + row * parameter(arguments, ROPE.q_row)
        for head in range(queries_per_kv):
            to = q + (kv_head * queries_per_kv + head) * parameter(arguments, ROPE.q_head)
            rotate_head(source, head_dim, half, cos, sin, q_norm, eps, to)
            if has_codes:
                spread(to, head_dim, block, factor)
            source += 4 * head_dim
        key = parameter(arguments, ROPE.scratch) + thread * parameter(arguments, ROPE.row_bytes)
        rotate_head(source, head_dim, half, cos, sin, k_norm, eps, key)
        if has_codes:
            spread(key, head_dim, block, factor)
        k_page = parameter(arguments, ROPE.k) + page * parameter(arguments, ROPE.k_page)
        v_page = parameter(arguments, ROPE.v) + page * parameter(arguments, ROPE.v_page)
        write_row(key, head_dim, k_page, offset, parameter(arguments, ROPE.k_row), page_size)
        write_row(source + 4 * head_dim, head_dim, v_page, offset, parameter(arguments, ROPE.v_row), page_size)

    return append


def rope_append(kv_dtype: str):
    """Kernel for one KV dtype."""
    append = unit_appender(kv_dtype)

    def kernel(arguments, thread):
        rows, kv_heads = parameter(arguments, ROPE.rows), parameter(arguments, ROPE.kv_heads)
        positions, max_positions = parameter(arguments, ROPE.positions), parameter(arguments, ROPE.max_positions)
        num_slots, slots, slots_row = (
            parameter(arguments, ROPE.num_slots),
            parameter(arguments, ROPE.slots),
            parameter(arguments, ROPE.slots_row),
        )
        chunk = take(arguments, 0)
        while chunk < rows * kv_heads:
            row, kv_head = chunk // kv_heads, chunk % kv_heads
            position, slot = load_i64(positions + 8 * row), load_i64(slots + row * slots_row + 8 * kv_head)
            if position < 0 or position >= max_positions:
                fail(arguments, 1)
            elif slot < 0 or slot >= num_slots:
                fail(arguments, 2)
            else:
                angle = position * parameter(arguments, ROPE.angle_row)
                append(
                    arguments,
                    thread,
                    row,
                    kv_head,
                    slot,
                    parameter(arguments, ROPE.cos) + angle,
                    parameter(arguments, ROPE.sin) + angle,
                )
            chunk = take(arguments, 0)

    return kernel
