"""Rows of a packed weight as float32: the values that its codes stand for, with the roundings of formats/base.py."""

import numpy as np

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat, format_of
from cpu_kernels.team.arguments import UNPACK
from cpu_kernels.team.chunks import fail, parameter, take
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import as_float, load_byte, load_half, load_i64, load_scalar, store_scalar
from cpu_kernels.vectors.vector import load_bf16_tail, load_f32_tail, load_half_tail, store_f32_tail

NUMBERS = {"fp32": load_f32_tail, "fp16": load_half_tail, "bf16": load_bf16_tail}  # how 16 numbers of a row are read


@helper
def signed_byte(address):
    """One int8 as an integer."""
    return (load_byte(address) ^ 128) - 128


@helper
def e4m3(byte):
    """The number that a float8 E4M3 is."""
    mantissa, exponent = byte & 7, byte >> 3 & 15
    if exponent == 0:
        value = np.float32(mantissa) * np.float32(2.0**-9)
    else:
        value = as_float((exponent + 120) << 23 | mantissa << 20)
    return -value if byte >= 128 else value


def number_reader(item: WeightFormat):
    """Function (lines, index): the number of one of 64 inputs; arguments as of `code_reader`'s."""
    if item.plane == "f8":

        @helper
        def number(lines, index):
            return e4m3(load_byte(lines + LINE_BYTES * (index >> 2) + (index & 3)))

        return number
    code = code_reader(item)
    if item.plane == "v4":
        bits = tuple(int(np.float32(value).view(np.int32)) for value in item.values)

        @helper
        def number(lines, index):
            return as_float(bits[code(lines, index)])

        return number

    @helper
    def number(lines, index):
        return np.float32(code(lines, index))

    return number


def code_reader(item: WeightFormat):
    """Function (lines, index): the code of one of 64 inputs; `lines` is the feature's word of the first code line."""
    offset, is_u6 = item.offset, item.plane == "u6"
    table_low, table_high = (int.from_bytes(bytes(item.table[at : at + 8] or b"\0"), "little") for at in (0, 8))
    signs = 1 << 63
    table_low, table_high = ((half ^ signs) - signs for half in (table_low, table_high))

    @helper
    def nibble(lines, index):
        byte = load_byte(lines + LINE_BYTES * (index >> 3) + (index & 3))
        return (byte >> (4 * (index >> 2 & 1))) & 15

    @helper
    def from_nibble(lines, index):
        return nibble(lines, index) - offset

    @helper
    def from_more_bits(lines, index):
        place = index >> 2  # of a word of four codes
        if is_u6:
            byte = load_byte(lines + LINE_BYTES * (8 + (place >> 2)) + (index & 3))
            return (nibble(lines, index) | (byte >> (2 * (place & 3)) & 3) << 4) - offset
        byte = load_byte(lines + LINE_BYTES * (8 + (place >> 3)) + (index & 3))
        return (nibble(lines, index) | (byte >> (place & 7) & 1) << 4) - offset

    @helper
    def from_table(lines, index):
        place = nibble(lines, index)
        half = table_high if place >= 8 else table_low
        return ((half >> (8 * (place & 7))) & 255) - offset

    @helper
    def from_byte(lines, index):
        return load_byte(lines + LINE_BYTES * (index >> 2) + (index & 3)) - offset

    readers = {
        "u4": from_nibble,
        "v4": from_nibble,
        "t4": from_table,
        "u5": from_more_bits,
        "u6": from_more_bits,
        "i8": from_byte,
    }
    return readers[item.plane]


@helper
def scale_minimum_s32(header, feature, run):
    """(scale, minimum) of run `run` of 16 inputs of a superblock."""
    return load_half(header + 32 * (run >> 1) + 2 * feature), np.float32(0.0)


@helper
def scale_minimum_sm32(header, feature, run):
    at = header + 32 * (run >> 1) + 2 * feature
    return load_half(at), load_half(at + LINE_BYTES)


@helper
def scale_minimum_sm64(header, feature, run):
    return load_half(header + 2 * feature), load_half(header + 32 + 2 * feature)


@helper
def scale_minimum_k2m32(header, feature, run):
    at = header + 64 + 16 * (run >> 1) + feature
    scale, minimum = np.float32(load_byte(at)), np.float32(load_byte(at + 128))
    return load_half(header + 2 * feature) * scale, -(load_half(header + 32 + 2 * feature) * minimum)


@helper
def scale_minimum_k2s16(header, feature, run):
    scale = np.float32(signed_byte(header + 64 + 16 * run + feature))
    return load_half(header + 2 * feature) * scale, np.float32(0.0)


@helper
def scale_minimum_k2s32(header, feature, run):
    scale = np.float32(signed_byte(header + 64 + 16 * (run >> 1) + feature))
    return load_half(header + 2 * feature) * scale, np.float32(0.0)


@helper
def scale_minimum_e32(header, feature, run):
    """As above; 2^(e - 128) is no normal number below e = 2."""
    exponent = load_byte(header + 16 * (run >> 1) + feature)
    return as_float((exponent - 1) << 23 if exponent >= 2 else 0x00200000 << exponent), np.float32(0.0)


@helper
def scale_minimum_t16(header, feature, run):
    """As above, of a byte and the number of the tensor."""
    factor = load_scalar(header + 4 * feature)
    value = e4m3(load_byte(header + LINE_BYTES + 16 * run + feature)) * np.float32(2.0**-8)
    return value / -factor if factor < 0 else value * factor, np.float32(0.0)


def scale_minimum_sz(item: WeightFormat):
    """As above: code * scale - zero point * scale, both exact, is the exact difference."""
    group, signed = int(item.header.lstrip("SZI")), item.header.startswith("SI")
    runs, groups = group // 16, item.group_inputs // group

    @helper
    def scale_minimum(header, feature, run):
        scale, at = load_half(header + 32 * (run // runs) + 2 * feature), header + 32 * groups + 16 * (run // runs)
        zero = signed_byte(at + feature) if signed else load_byte(at + feature)
        return scale, -(np.float32(zero) * scale)

    return scale_minimum


def scale_minimum_f(item: WeightFormat):
    runs = int(item.header.removeprefix("F")) // 16

    @helper
    def scale_minimum(header, feature, run):
        return load_scalar(header + LINE_BYTES * (run // runs) + 4 * feature), np.float32(0.0)

    return scale_minimum


HEADERS = {
    "S32": scale_minimum_s32,
    "SM32": scale_minimum_sm32,
    "SM64": scale_minimum_sm64,
    "K2M32": scale_minimum_k2m32,
    "K2S16": scale_minimum_k2s16,
    "K2S32": scale_minimum_k2s32,
    "E32": scale_minimum_e32,
    "T16": scale_minimum_t16,
}


def unpack_numbers(weight_dtype: str):
    """`unpack` of a row-major format. block_bytes: of a row."""
    load, item_bytes = NUMBERS[weight_dtype], format_of(weight_dtype).item_bytes

    def kernel(arguments, thread):
        weight, row_bytes = parameter(arguments, UNPACK.weight), parameter(arguments, UNPACK.block_bytes)
        rows, ids = parameter(arguments, UNPACK.rows), parameter(arguments, UNPACK.ids)
        count, in_features = parameter(arguments, UNPACK.count), parameter(arguments, UNPACK.in_features)
        out, out_stride = parameter(arguments, UNPACK.out), parameter(arguments, UNPACK.out_row)
        index = take(arguments, 0)
        while index < count:
            row = load_i64(ids + 8 * index)
            if 0 <= row < rows:
                for column in range(0, in_features, 16):
                    at, left = weight + row * row_bytes + item_bytes * column, in_features - column
                    store_f32_tail(load(at, left), out + index * out_stride + 4 * column, left)
            else:
                fail(arguments, 1)
            index = take(arguments, 0)

    return kernel


def unpack(weight_dtype: str):
    """Kernel; rows: of the weight. count: of ids."""
    item = format_of(weight_dtype)
    has_zeros = item.has_zero_points
    number, has_minimum = number_reader(item), has_zeros or "M" in item.header
    scale_minimum = HEADERS.get(item.header) or (scale_minimum_sz if has_zeros else scale_minimum_f)(item)
    header_bytes, superblock_bytes = item.header_lines * LINE_BYTES, item.superblock_bytes
    groups, group_bytes = item.group_inputs // GROUP_INPUTS, item.code_lines * LINE_BYTES

    @helper
    def unpack_row(block, feature, in_features, out):
        for run in range((in_features + 15) // 16):
            group = run >> 2
            superblock = block + group // groups * superblock_bytes
            scale, minimum = scale_minimum(superblock, feature, run - group // groups * groups * 4)
            lines = superblock + header_bytes + group % groups * group_bytes + 4 * feature
            for index in range(16):
                column = 16 * run + index
                if column < in_features:
                    value = number(lines, 16 * (run & 3) + index) * scale
                    store_scalar(value + minimum if has_minimum else value, out + 4 * column)

    def kernel(arguments, thread):
        weight, block_bytes, rows = (
            parameter(arguments, UNPACK.weight),
            parameter(arguments, UNPACK.block_bytes),
            parameter(arguments, UNPACK.rows),
        )
        ids, count, in_features = (
            parameter(arguments, UNPACK.ids),
            parameter(arguments, UNPACK.count),
            parameter(arguments, UNPACK.in_features),
        )
        out, out_stride = parameter(arguments, UNPACK.out), parameter(arguments, UNPACK.out_row)
        index = take(arguments, 0)
        while index < count:
            row = load_i64(ids + 8 * index)
            if 0 <= row < rows:
                unpack_row(weight + row // 16 * block_bytes, row % 16, in_features, out + index * out_stride)
            else:
                fail(arguments, 1)
            index = take(arguments, 0)

    return kernel
