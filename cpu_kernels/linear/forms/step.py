"""64 inputs of a coded format times one record of int8 activations: what linear_q_kernel repeats; see formats/base.py.

Codes are unsigned bytes, so a format's offset is taken off again by way of the activations' sums, of which a record
holds what a dot product begins with (records.py). Two-level scales stay integers: sub-scale times dot product is exact
in int32, and only the total meets d.
"""

from functools import cached_property, partial, reduce

from llvmlite import ir
from numba import types

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.forms.bf16_codes import row_dot_bf16
from cpu_kernels.linear.forms.codes import code_words, half_words
from cpu_kernels.linear.forms.flips import FlippedWords
from cpu_kernels.linear.forms.float_codes import numbers_of_word, row_dot, unit_of, wide_row_dot
from cpu_kernels.linear.forms.levels import PackedLevels, ReadyLevels
from cpu_kernels.linear.forms.line_order import code_leader
from cpu_kernels.linear.forms.number_planes import ONE, fits_planes, planes_dot, wide_planes_dot
from cpu_kernels.linear.forms.scale_pairs import either, paired_totals, second_starts
from cpu_kernels.linear.forms.subnormal_codes import subnormal_row_dot, takes_subnormals
from cpu_kernels.linear.records import Record, run_of, starts_of
from cpu_kernels.linear.sizes import FLIPPED_PLANES, pairs_scales
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.dot import emit_dot2, pair
from cpu_kernels.vectors.header_numbers import byte_numbers, exponents, halves, tensor_scales
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import (
    I64,
    VF32,
    VI32,
    F32x16,
    constant,
    emits,
    fma_value,
    in_order,
    intp,
    load_as,
)


class FormSums:
    """What a format's 64 inputs add to the sums of `rows` rows, as LLVM values.

    Arguments of its methods: b the builder; superblock its address; group which 64 inputs of it; word(k) their codes,
    four inputs each, or where `takes_halves` word(k, half), of half the features; record the activations. They give a
    float32 vector a row, before the row's own scale.
    """

    def __init__(self, isa: Isa, item: WeightFormat, rows: int):
        self.isa, self.item, self.rows = isa, item, rows
        self.has_zeros, self.has_floats = item.has_zero_points, item.header.startswith(("F", "T"))
        self.group_inputs = int(item.header.lstrip("SZI")) if self.has_zeros else 0
        self.run = run_of(item)
        self.runs = GROUP_INPUTS // self.run
        self.code_sums = CodeSums(isa, item.largest_code, item.plane in FLIPPED_PLANES.values())
        self.offset = self.code_sums.left_of(item.offset)
        self.starts = starts_of(isa, item)
        is_x86 = isa.has_avx2 or isa.has_avx512
        self.takes_planes = rows == 1 and is_x86 and self.run >= 32 and fits_planes(item.values)
        self.takes_subnormals = rows == 1 and takes_subnormals(isa, item)
        # Whether registers are few for what the rows hold, and what they share pays.
        self.has_several_rows = rows >= (2 if self.code_sums.widens else 4)
        # Two-level scales are multiplied as products are widened.
        self.scales_products = (
            item.header.startswith(("K2", "P2")) and self.has_several_rows and self.code_sums.takes_scales
        )
        self.pairs_scales = pairs_scales(isa, item) and self.has_several_rows

    @property
    def takes_runs_in_turn(self) -> bool:
        """Whether no run's words are put together before the run ahead of it is summed up: with AVX-512 the registers
        hold several rows' sums and one run's words of two planes."""
        return self.isa.has_avx512 and self.has_several_rows and self.item.plane in ("u5", "u6")

    @property
    def takes_halves(self) -> bool:
        """Whether half the features are multiplied at a time."""
        return self.takes_planes and self.isa.has_avx2 or self.takes_subnormals

    @cached_property
    def of_group(self):
        """The method for this header: (b, superblock, group, word, record) -> a sum a row."""
        if self.has_zeros:
            return self.with_zeros
        if self.has_floats:
            return self.with_float_scales
        return self.two_levels if self.item.header.startswith(("K2", "P2")) else self.one_level

    def dots(self, b, word, record, part: int):
        """int32 sums of (code - offset) * input over run `part`, for every row."""
        return self.with_products(b, word, record, part, [self.first(word, part)] * self.rows)

    def first(self, word, part: int):
        """What int32 sums begin with."""
        return word.start(part) if self.code_sums.are_flips else constant(VI32, 0)

    def with_products(self, b, word, record, part: int, totals, scale=None):
        """int32 totals, one a row, and the products of run `part`, times `scale()` where there is one: it needs
        starts that are pairs, or none."""
        starts = [None if self.starts is None else record.start(row, part) for row in range(self.rows)]
        if self.starts is None or self.starts.are_pairs:
            sums = [self.code_sums.sum(b, total, scale, start) for total, start in zip(totals, starts)]
        else:
            assert scale is None, self.item.name
            sums = [self.code_sums.sum(b, start) for start in starts]
        for k in range(part * self.run // 4, (part + 1) * self.run // 4):
            operand = self.code_sums.operand(b, word(k), is_from_table=bool(self.item.table))
            for row, total in enumerate(sums):
                total.add(operand, record.inputs(row, k))
            if self.has_several_rows:
                self.code_sums.settle(b, sums)
        return [total.total() for total in sums]

    def float_dots(self, b, word, record, part: int):
        """float32 sums of code * input over run `part`, for every row, in as many chains as hide the additions."""
        if self.takes_planes:
            return [self.planes_dot(b, word, record, part)]
        quarters, unit = range(part * self.run // 16, (part + 1) * self.run // 16), unit_of(self.item)
        if self.rows == 1 and self.item.plane == "f8" and (self.isa.has_avx2 or self.isa.has_avx512):
            return [self.row_dot(b, word, record, quarters, unit)]
        chains = max(1, 4 // self.rows)
        sums = [[constant(VF32, 0.0)] * chains for _ in range(self.rows)]
        for quarter in quarters:
            inputs = [record.numbers(row, quarter, unit) for row in range(self.rows)]
            for k in range(4):
                for place, number in enumerate(numbers_of_word(self.isa, self.item, b, word(4 * quarter + k))):
                    lanes = ir.Constant(VI32, [4 * k + place] * 16)
                    for row in range(self.rows):
                        x, chain = b.shuffle_vector(inputs[row], inputs[row], lanes), place % chains
                        sums[row][chain] = fma_value(b, number, x, sums[row][chain])
        return [reduce(b.fadd, chained) for chained in sums]

    def row_dot(self, b, word, record, quarters: range, unit: float):
        """As `float_dots` of one row, of codes E4M3."""
        if self.takes_subnormals:
            return subnormal_row_dot(b, word, record, quarters)
        words = [word(4 * quarter + k) for quarter in quarters for k in range(4)]
        if self.isa.has_bf16 and self.isa.has_byte_tables:
            return row_dot_bf16(self.isa, b, words, [record.numbers(0, quarter, 1.0) for quarter in quarters])
        inputs = [record.numbers(0, quarter, unit) for quarter in quarters]
        return wide_row_dot(b, words, inputs) if self.isa.has_avx512 else row_dot(b, words, inputs)

    def planes_dot(self, b, word, record, part: int):
        """As `float_dots` of one row, of numbers looked up as planes of digits."""
        fours, taken = range(part * self.run // 4, (part + 1) * self.run // 4), constant(VI32, 0)
        for half in range(part * self.run // 32, (part + 1) * self.run // 32):
            taken = emit_dot2(self.isa, b, taken, record.sums(0, half), constant(VI32, pair(-ONE, -ONE)))
        dot = planes_dot if self.takes_halves else wide_planes_dot
        return dot(self.isa, b, self.item.values, word, record, fours, taken)

    def with_float_scales(self, b, superblock, group, word, record):
        """Sums of scale * dot, for every row; but of T16 a superblock is one group of inputs."""
        totals = [None] * self.rows
        of_run = None
        if self.item.header == "T16":
            place = b.add(b.mul(group, ir.Constant(group.type, 16 * self.runs)), ir.Constant(group.type, LINE_BYTES))
            of_run = tensor_scales(b, superblock, b.add(superblock, place))
        for part in range(self.runs):
            scale = load_as(b, superblock, VF32, LINE_BYTES * part) if of_run is None else of_run(part)
            if self.item.has_float_codes:
                values = self.float_dots(b, word, record, part)
            else:
                values = [b.sitofp(dot, VF32) for dot in self.dots(b, word, record, part)]
            for row, value in enumerate(values):
                totals[row] = b.fmul(value, scale) if part == 0 else fma_value(b, value, scale, totals[row])
        return totals

    def one_level(self, b, superblock, group, word, record):
        """Sums of scale * dot (+ minimum * sum) as float32, for every row."""
        place = b.mul(group, ir.Constant(group.type, 32))
        totals = [None] * self.rows
        for part in range(self.runs):
            if self.item.header == "E32":
                scale = exponents(b, b.add(superblock, place), 16 * part)
            else:
                scale = halves(b, superblock, 32 * part)
            for row, dot in enumerate(self.dots(b, word, record, part)):
                value = b.sitofp(dot, VF32)
                totals[row] = b.fmul(value, scale) if part == 0 else fma_value(b, value, scale, totals[row])
        return self.with_minima(b, superblock, record, totals) if self.item.header == "SM32" else totals

    def with_minima(self, b, superblock, record, totals):
        """Sums and minimum * sum of every run."""
        for part in range(self.runs):
            minimum = halves(b, superblock, LINE_BYTES + 32 * part)
            for row in range(self.rows):
                totals[row] = fma_value(b, record.sum_of_32(row, part), minimum, totals[row])
        return totals

    def two_levels(self, b, superblock, group, word, record):
        """d * (sum of sub-scale * dot) - dmin * (sum of sub-minimum * sum), for every row."""
        levels = self.levels(b, superblock, group)
        totals = self.scaled_totals(b, levels, word, record)
        d = levels.d()
        scaled = [b.fmul(b.sitofp(total, VF32), d) for total in totals]
        return self.with_sub_minima(b, levels, record, scaled) if levels.has_minima else scaled

    def scaled_totals(self, b, levels, word, record):
        """int32 sums of sub-scale * dot, for every row."""
        if not self.pairs_scales:
            return self.scaled_dots(b, levels, word, record)

        def both_runs():
            starts = second_starts(b, self.dots(b, word, record, 0))
            grown = self.with_products(b, word, record, 1, starts)
            return paired_totals(self.isa, b, [levels.scale(part) for part in range(2)], grown)

        return either(b, record.is_wide(), partial(self.scaled_dots, b, levels, word, record), both_runs)

    def scaled_dots(self, b, levels, word, record):
        """As `scaled_totals`, one run at a time."""
        totals = [constant(VI32, 0)] * self.rows
        for part in range(self.runs):
            if self.scales_products:
                totals = self.with_products(b, word, record, part, totals, partial(levels.scale, part))
            else:
                dots = self.dots(b, word, record, part)
                totals = [b.add(total, b.mul(dot, levels.scale(part))) for total, dot in zip(totals, dots)]
            if self.takes_runs_in_turn:
                totals = in_order(b, totals)
        return totals

    def levels(self, b, superblock, group):
        """The scales and minima of two levels."""
        if self.item.header.startswith("P2"):
            return ReadyLevels(self.item, b, superblock)
        return PackedLevels(self.item, self.scales_products, b, superblock, group)

    def with_sub_minima(self, b, levels, record, scaled):
        """Sums minus dmin * (sum of sub-minimum * sum)."""
        dmin, minima = b.fneg(levels.dmin()), levels.minima()
        for row in range(self.rows):
            taken = emit_dot2(self.isa, b, constant(VI32, 0), minima, record.sums(row, 0))
            scaled[row] = fma_value(b, b.sitofp(taken, VF32), dmin, scaled[row])
        return scaled

    def with_zeros(self, b, superblock, group, word, record):
        """Sums of scale * (dot - (zero point + offset) * sum), the difference in whole numbers, for every row."""
        totals = [None] * self.rows
        for part in range(self.runs):
            first = b.add(b.mul(group, I64(GROUP_INPUTS)), I64(self.run * part))
            index = b.udiv(first, I64(self.group_inputs))
            scale = halves(b, b.add(superblock, b.mul(index, I64(32))), 0)
            zeros = self.zero_pairs(b, superblock, index)
            for row, dot in enumerate(self.dots(b, word, record, part)):
                taken = emit_dot2(self.isa, b, constant(VI32, 0), zeros, record.sums(row, part))
                value = b.sitofp(b.sub(dot, taken), VF32)
                totals[row] = b.fmul(value, scale) if part == 0 else fma_value(b, value, scale, totals[row])
        return totals

    def zero_pairs(self, b, superblock, index):
        """The zero points of a group and the offset, added up, twice in every lane."""
        zeros_at, signed = 32 * self.item.group_inputs // self.group_inputs, self.item.header.startswith("SI")
        zero = byte_numbers(b, b.add(superblock, b.mul(index, I64(16))), zeros_at, signed)
        if self.offset:
            zero = b.add(zero, constant(VI32, self.offset))
        elif signed:
            zero = b.and_(zero, constant(VI32, 0xFFFF))
        return b.mul(zero, constant(VI32, pair(1, 1)))


def form_step(isa: Isa, item: WeightFormat, rows: int, ahead_bytes: int):
    """Intrinsic (sums, superblock, group, code lines, record) -> sums; group: which 64 inputs of the superblock.

    ahead_bytes: how far ahead of the code lines as many are asked for, 0 for nothing.
    """
    tile, form_sums = types.UniTuple(F32x16, rows), FormSums(isa, item, rows)
    lead_codes = code_leader(isa, item, rows, ahead_bytes)

    @emits(tile, tile, intp, intp, intp, intp)
    def step(b, sums, superblock, group, lines, record):
        lead_codes(b, lines)
        activations = Record(b, record, rows)
        if form_sums.takes_halves:
            words = half_words(item, b, lines)
        elif form_sums.code_sums.are_flips:
            words = FlippedWords(b, lines)
        else:
            words = code_words(isa, item, b, lines, form_sums.code_sums.table(item.table))
        totals = form_sums.of_group(b, superblock, group, words, activations)
        for row, total in enumerate(totals):
            added = fma_value(b, total, activations.scale(row), b.extract_value(sums, row))
            sums = b.insert_value(sums, added, row)
        return sums

    return step
