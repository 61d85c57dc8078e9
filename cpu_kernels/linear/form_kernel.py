"""64 inputs of a coded format times one record of int8 activations: what linear_q_kernel repeats; see formats/base.py.

Codes are unsigned bytes, so a format's offset is taken off again by way of the activations' sums. A record holds those
of every 16 inputs as int16, and one dot2 with a constant pair gives offset * sum where a dot product begins. Two-level
scales stay integers: sub-scale times dot product is exact in int32, and only the total meets d.
"""

from collections.abc import Callable
from functools import reduce

from llvmlite import ir
from numba import types

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.records import Record
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.dot import emit_dot2, in_parts, together
from cpu_kernels.vectors.header_numbers import byte_numbers, exponents, halves, tensor_scales
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import (
    I8,
    I32,
    I64,
    VF32,
    VHALF,
    VI16,
    VI32,
    F32x16,
    call_llvm,
    constant,
    emits,
    fma_value,
    intp,
    load_as,
    prefetch_value,
)

NIBBLES = 0x0F0F0F0F
V64I8, V32I8, V16I8 = (ir.VectorType(I8, count) for count in (64, 32, 16))


def pair(low: int, high: int) -> int:
    """Two int16 as one int32."""
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


def pairs_of(b, low, high):
    """Two <16 x i32> whose values fit in int16 as one of int16 pairs."""
    low = b.and_(low, constant(VI32, 0xFFFF))
    return b.or_(low, b.shl(high, constant(VI32, 16)))


def look_up(isa: Isa, b, table: tuple[int, ...], indexes):
    """The bytes of a table of 16, by 64 indexes below 16 in an <16 x i32>."""
    if isa.has_avx512:
        entries = ir.Constant(V64I8, list(table) * 4)
        found = call_llvm(b, "llvm.x86.avx512.pshuf.b.512", V64I8, entries, b.bitcast(indexes, V64I8))
        return b.bitcast(found, VI32)
    if isa.name in ("avxvnni", "avx2", "neon"):
        part = V16I8 if isa.name == "neon" else V32I8
        entries = ir.Constant(part, [*table] * (part.count // 16))
        name = "llvm.aarch64.neon.tbl1.v16i8" if isa.name == "neon" else "llvm.x86.avx2.pshuf.b"
        found = [call_llvm(b, name, part, entries, piece) for piece in in_parts(b, indexes, part)]
        return together(b, [b.bitcast(piece, ir.VectorType(I32, part.count // 4)) for piece in found])
    indexes, found = b.bitcast(indexes, V64I8), constant(V64I8, table[0])
    for index, entry in enumerate(table[1:], 1):
        found = b.select(b.icmp_unsigned("==", indexes, constant(V64I8, index)), constant(V64I8, entry), found)
    return b.bitcast(found, VI32)


def look_up_numbers(isa: Isa, b, values: tuple[float, ...], indexes):
    """Numbers of a table of 16, by an <16 x i32> of indexes whose bits from the fifth on are 0."""
    if isa.has_avx512:
        return call_llvm(b, "llvm.x86.avx512.permvar.sf.512", VF32, ir.Constant(VF32, list(values)), indexes)
    found = constant(VF32, values[0])
    for index, entry in enumerate(values[1:], 1):
        found = b.select(b.icmp_unsigned("==", indexes, constant(VI32, index)), constant(VF32, entry), found)
    return found


def number_of_code(isa: Isa, item: WeightFormat, b, codes, place: int):
    """Byte `place` of every lane of `codes` as the number that it stands for."""
    code = b.lshr(codes, constant(VI32, 8 * place)) if place else codes
    if item.plane == "v4":
        return look_up_numbers(isa, b, item.values, b.and_(code, constant(VI32, 15)))
    # Shifted by 7, exponent and mantissa are those of a float16 that is 256 times smaller, subnormal ones too.
    sign = b.shl(b.and_(code, constant(VI32, 0x80)), constant(VI32, 8))
    half = b.or_(sign, b.shl(b.and_(code, constant(VI32, 0x7F)), constant(VI32, 7)))
    return b.fmul(b.fpext(b.bitcast(b.trunc(half, VI16), VHALF), VF32), constant(VF32, 256.0))


def code_words(isa: Isa, item: WeightFormat, b, lines, table: tuple[int, ...]) -> Callable[[int], object]:
    """word(k): the codes of inputs 4k..4k+3 of all features, unsigned bytes, or of a t4 plane entries of `table`;
    `lines` is the address of the code lines."""
    loaded: dict[int, object] = {}

    def line(index: int):
        if index not in loaded:
            loaded[index] = load_as(b, lines, VI32, LINE_BYTES * index)
        return loaded[index]

    def shifted(value, left: int):
        if left == 0:
            return value
        return b.shl(value, constant(VI32, left)) if left > 0 else b.lshr(value, constant(VI32, -left))

    def nibble(k: int):
        return b.and_(shifted(line(k // 2), -4 * (k % 2)), constant(VI32, NIBBLES))

    def word(k: int):
        if item.plane in ("i8", "f8"):
            return line(k)
        if item.plane == "t4":
            return look_up(isa, b, table, nibble(k))
        if item.plane == "u5":
            upper, mask = shifted(line(8 + k // 8), 4 - k % 8), 0x10101010
        elif item.plane == "u6":
            upper, mask = shifted(line(8 + k // 4), 4 - 2 * (k % 4)), 0x30303030
        else:
            return nibble(k)
        return b.or_(nibble(k), b.and_(upper, constant(VI32, mask)))

    return word


def form_step(isa: Isa, item: WeightFormat, rows: int, ahead_bytes: int):
    """Intrinsic (sums, superblock, group, code lines, record) -> sums; group: which 64 inputs of the superblock.

    ahead_bytes: how far ahead of the code lines as many are asked for, 0 for nothing.
    """
    tile = types.UniTuple(F32x16, rows)
    has_zeros, has_floats = item.header.startswith(("SZ", "SI")), item.header.startswith(("F", "T"))
    group_inputs = int(item.header.lstrip("SZIFT")) if has_zeros or has_floats else 0
    # inputs that share a scale, up to 64
    run = 16 if item.header in ("K2S16", "T16") else 64 if group_inputs > 32 else 32
    runs = GROUP_INPUTS // run
    code_sums = CodeSums(isa, item.largest_code)
    offset = item.offset - 128 if code_sums.takes_128 else item.offset
    # Two dot2 a row, by sub-scales, in place of four; what they share pays from several rows on.
    takes_sums_of_16 = item.header == "K2S16" and bool(offset) and rows >= 4

    def dots(b, word, record, part: int):
        """int32 sums of (code - offset) * input over run `part`, for every row."""
        sums = []
        for row in range(rows):
            start = constant(VI32, 0)
            if offset and run == 16 and not takes_sums_of_16:
                taken = pair(-offset, 0) if part % 2 == 0 else pair(0, -offset)
                start = emit_dot2(isa, b, start, record.sums(row, part // 2), constant(VI32, taken))
            elif offset and run > 16:
                for half in range(part * run // 32, (part + 1) * run // 32):
                    taken = constant(VI32, pair(-offset, -offset))
                    start = emit_dot2(isa, b, start, record.sums(row, half), taken)
            sums.append(code_sums.sum(b, start))
        for k in range(part * run // 4, (part + 1) * run // 4):
            codes = code_sums.operand(b, word(k), is_from_table=bool(item.table))
            for row in range(rows):
                sums[row].add(codes, record.inputs(row, k))
        return [total.total() for total in sums]

    def float_dots(b, word, record):
        """float32 sums of code * input over all 64, for every row, in as many chains as hide the additions."""
        chains = max(1, 4 // rows)
        sums = [[constant(VF32, 0.0)] * chains for _ in range(rows)]
        for quarter in range(4):
            inputs = [record.numbers(row, quarter) for row in range(rows)]
            for index in range(16):
                number = number_of_code(isa, item, b, word(4 * quarter + index // 4), index % 4)
                lanes = ir.Constant(VI32, [index] * 16)
                for row in range(rows):
                    x, chain = b.shuffle_vector(inputs[row], inputs[row], lanes), index % chains
                    sums[row][chain] = fma_value(b, number, x, sums[row][chain])
        return [reduce(b.fadd, chained) for chained in sums]

    def with_float_scales(b, superblock, group, word, record):
        """Sums of scale * dot, for every row; but of T16 a superblock is one group of inputs."""
        totals = [None] * rows
        of_run = None
        if item.header == "T16":
            place = b.add(b.mul(group, ir.Constant(group.type, 16 * runs)), ir.Constant(group.type, LINE_BYTES))
            of_run = tensor_scales(b, superblock, b.add(superblock, place))
        for part in range(runs):
            scale = load_as(b, superblock, VF32, 0) if of_run is None else of_run(part)
            if item.has_float_codes:
                values = float_dots(b, word, record)
            else:
                values = [b.sitofp(dot, VF32) for dot in dots(b, word, record, part)]
            for row, value in enumerate(values):
                totals[row] = b.fmul(value, scale) if part == 0 else fma_value(b, value, scale, totals[row])
        return totals

    def one_level(b, superblock, group, word, record):
        """Sums of scale * dot (+ minimum * sum) as float32, for every row."""
        place = b.mul(group, ir.Constant(group.type, 32))
        totals = [None] * rows
        for part in range(runs):
            if item.header == "E32":
                scale = exponents(b, b.add(superblock, place), 16 * part)
            else:
                scale = halves(b, superblock, 32 * part)
            for row, dot in enumerate(dots(b, word, record, part)):
                value = b.sitofp(dot, VF32)
                totals[row] = b.fmul(value, scale) if part == 0 else fma_value(b, value, scale, totals[row])
        if item.header == "SM32":
            for part in range(runs):
                minimum = halves(b, superblock, LINE_BYTES + 32 * part)
                for row in range(rows):
                    total = emit_dot2(isa, b, constant(VI32, 0), record.sums(row, part), constant(VI32, pair(1, 1)))
                    totals[row] = fma_value(b, b.sitofp(total, VF32), minimum, totals[row])
        return totals

    def two_levels(b, superblock, group, word, record):
        """d * (sum of sub-scale * dot) - dmin * (sum of sub-minimum * sum), for every row."""
        signed = item.header != "K2M32"
        subs = b.add(superblock, b.mul(group, ir.Constant(group.type, 16 * runs)))
        scales = [byte_numbers(b, subs, 64 + 16 * part, signed) for part in range(runs)]
        totals = [constant(VI32, 0)] * rows
        if takes_sums_of_16:
            taken = [b.mul(scale, constant(VI32, -offset)) for scale in scales]
            for half in range(2):
                both = pairs_of(b, *taken[2 * half : 2 * half + 2])
                totals = [emit_dot2(isa, b, total, both, record.sums(row, half)) for row, total in enumerate(totals)]
        for part, scale in enumerate(scales):
            for row, dot in enumerate(dots(b, word, record, part)):
                totals[row] = b.add(totals[row], b.mul(dot, scale))
        d = halves(b, superblock, 0)
        scaled = [b.fmul(b.sitofp(total, VF32), d) for total in totals]
        if item.header != "K2M32":
            return scaled
        dmin = b.fneg(halves(b, superblock, 32))
        minima = pairs_of(b, *(byte_numbers(b, subs, 192 + 16 * part, False) for part in (0, 1)))
        for row in range(rows):
            taken = emit_dot2(isa, b, constant(VI32, 0), minima, record.sums(row, 0))
            scaled[row] = fma_value(b, b.sitofp(taken, VF32), dmin, scaled[row])
        return scaled

    def with_zeros(b, superblock, group, word, record):
        """Sums of scale * (dot - zero point * sum), the difference in whole numbers, for every row."""
        zeros_at, totals = 32 * item.group_inputs // group_inputs, [None] * rows
        for part in range(runs):
            first = b.add(b.mul(group, I64(GROUP_INPUTS)), I64(run * part))
            index = b.udiv(first, I64(group_inputs))
            scale = halves(b, b.add(superblock, b.mul(index, I64(32))), 0)
            signed = item.header.startswith("SI")
            zero = byte_numbers(b, b.add(superblock, b.mul(index, I64(16))), zeros_at, signed)
            if signed:
                zero = b.and_(zero, constant(VI32, 0xFFFF))
            zeros = b.mul(zero, constant(VI32, pair(1, 1)))
            for row, dot in enumerate(dots(b, word, record, part)):
                taken = constant(VI32, 0)
                for half in range(run * part // 32, run * (part + 1) // 32):
                    taken = emit_dot2(isa, b, taken, zeros, record.sums(row, half))
                value = b.sitofp(b.sub(dot, taken), VF32)
                totals[row] = b.fmul(value, scale) if part == 0 else fma_value(b, value, scale, totals[row])
        return totals

    two = item.header.startswith("K2")
    multiply = with_zeros if has_zeros else with_float_scales if has_floats else two_levels if two else one_level

    @emits(tile, tile, intp, intp, intp, intp)
    def step(b, sums, superblock, group, lines, record):
        for line in range(item.code_lines if ahead_bytes else 0):
            prefetch_value(b, lines, ahead_bytes + LINE_BYTES * line)
        activations = Record(b, record, rows)
        words = code_words(isa, item, b, lines, code_sums.table(item.table))
        totals = multiply(b, superblock, group, words, activations)
        for row, total in enumerate(totals):
            added = fma_value(b, total, activations.scale(row), b.extract_value(sums, row))
            sums = b.insert_value(sums, added, row)
        return sums

    return step


def header_ahead(item: WeightFormat, ahead_bytes: int):
    """Intrinsic (superblock): ask for its header lines, between the code lines that `form_step` asks for."""

    @emits(types.void, intp)
    def ask(b, superblock):
        for line in range(item.header_lines if ahead_bytes else 0):
            prefetch_value(b, superblock, ahead_bytes + LINE_BYTES * line)

    return ask
