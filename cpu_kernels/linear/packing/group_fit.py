"""How well a scale and a minimum fit a group of inputs: of eight features at once, each in its lane.

A group lies on a stage as lines of 16 float32, a line for each input, a lane for each feature: nothing is summed over
lanes, divided or rounded to float16 for one feature alone. Sums are trees over 16 inputs: i and i + 8, then i and
i + 4, and so on, as a register of 16 inputs is folded.
"""

from llvmlite import ir
from numba import types

from cpu_kernels.formats import LINE_BYTES
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.vector import (
    F32,
    HALF,
    I32,
    F32x8,
    call_llvm,
    constant,
    emits,
    fma_value,
    intp,
    load_as,
    store_as,
)

LANES = 8
VF32, VI32, VHALF = (ir.VectorType(scalar, LANES) for scalar in (F32, I32, HALF))
RUN_INPUTS = 16  # inputs that one tree sums
LANES_AHEAD = RUN_INPUTS // 2  # of a lane to the one that it is folded with
HALF_MAX = 65504.0
ZERO = constant(VF32, 0.0)


def value_at(b, stage, index: int):
    """Input `index` of eight features."""
    return load_as(b, stage, VF32, LINE_BYTES * index)


def larger(b, x, y):
    """Of each lane; y where they are equal."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def smaller(b, x, y):
    """Of each lane; y where they are equal."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def half_value(b, vector):
    """Rounded to float16, within its finite range, and widened again."""
    for most, sign in ((constant(VF32, HALF_MAX), "<"), (constant(VF32, -HALF_MAX), ">")):
        vector = b.select(b.fcmp_ordered(sign, most, vector), most, vector)
    return b.fpext(b.fptrunc(vector, VHALF), VF32)


def inverse_value(b, scale):
    """1 / scale, 0 of a scale that is not above 0."""
    return b.select(b.fcmp_ordered(">", scale, ZERO), b.fdiv(constant(VF32, 1.0), scale), ZERO)


@emits(F32x8, F32x8)
def inverse_of(b, scale):
    """`inverse_value`."""
    return inverse_value(b, scale)


def codes_of(b, above, inverse, high: float):
    """round(each * inverse) within 0..high, for values so far above the minimum.

    Clamped by the bits, whose order as integers is that of floats from 0 on: the ports of floats have enough to do.
    """
    low, most = constant(VI32, 0), b.bitcast(constant(VF32, high), VI32)
    steps = [b.fmul(value, inverse) for value in above]
    codes = [b.bitcast(call_llvm(b, f"llvm.rint.v{LANES}f32", VF32, step), VI32) for step in steps]
    codes = [b.select(b.icmp_signed(">", code, low), code, low) for code in codes]
    codes = [b.select(b.icmp_signed("<", code, most), code, most) for code in codes]
    return [b.bitcast(code, VF32) for code in codes]


def lines_of(runs: int) -> list[int]:
    """Inputs of a lane of so many registers of 16, then of the lane 8 behind it; from that lane on."""
    return [RUN_INPUTS * run + behind for behind in (0, LANES_AHEAD) for run in range(runs)]


def over_lanes(leaf, count: int):
    """Function (stage, spare, scale, minimum): `count` sums over the inputs, of which `leaf` stores those of a lane and
    the lane 8 behind it.

    The lanes are a loop, not written out: in eight lanes' operations at once LLVM finds an order that wants more
    registers than there are. Their sums lie where `spare`, whose lines hold eight features, has place for eight more.
    """
    fold = _folded(count)

    @helper
    def sums(stage, spare, scale, minimum):
        inverse, to = inverse_of(scale), spare + LINE_BYTES // 2
        for lane in range(LANES_AHEAD):
            at = LINE_BYTES * lane
            leaf(stage + at, spare + at, to + at, inverse, scale, minimum)
        return fold(to)

    return sums


def _folded(count: int):
    """Intrinsic (address of `count` times eight lanes' sums): each folded by halves."""

    @emits(types.UniTuple(F32x8, count), intp)
    def fold(b, at):
        def tree(number: int, first: int = 0, step: int = 1):
            if step == LANES_AHEAD:
                return value_at(b, at, LANES_AHEAD * number + first)
            return b.fadd(tree(number, first, 2 * step), tree(number, first + step, 2 * step))

        return tuple_of(b, [tree(number) for number in range(count)])

    return fold


@emits(types.UniTuple(F32x8, 2), intp)
def extremes(b, stage):
    """The smallest and the largest of each feature's 64 inputs."""
    return tuple_of(b, [_extreme(b, stage, *how) for how in ((smaller, "minnum"), (larger, "maxnum"))])


def _extreme(b, stage, pick, folded):
    """In the order of registers of 16 inputs whose lanes are folded, which tells which zero is kept of 0 and -0."""
    fold = lambda x, y: call_llvm(b, f"llvm.{folded}.v{LANES}f32", VF32, x, y)  # noqa: E731
    lanes = []
    for lane in range(RUN_INPUTS):
        first, second, third, fourth = (value_at(b, stage, RUN_INPUTS * run + lane) for run in range(4))
        lanes.append(pick(b, pick(b, first, second), pick(b, third, fourth)))
    while len(lanes) > 4:
        half = len(lanes) // 2
        lanes = [fold(x, y) for x, y in zip(lanes[:half], lanes[half:], strict=True)]
    first, second, third, fourth = lanes
    return fold(fold(fold(first, second), third), fourth)


def tuple_of(b, vectors):
    """Vectors as the tuple that an intrinsic returns."""
    value = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for index, vector in enumerate(vectors):
        value = b.insert_value(value, vector, index)
    return value


@emits(F32x8, intp, intp)
def magnitudes(b, stage, to):
    """Of 32 inputs, without their signs, to lines at `to`; returns the largest of each feature."""
    largest = ZERO
    for index in range(2 * RUN_INPUTS):
        value = call_llvm(b, f"llvm.fabs.v{LANES}f32", VF32, value_at(b, stage, index))
        store_as(b, value, to, LINE_BYTES * index)
        largest = larger(b, value, largest)
    return largest


@emits(types.void, intp, F32x8, intp)
def differences(b, stage, minimum, to):
    """Of 64 inputs from their minimum, to lines at `to`."""
    for index in range(4 * RUN_INPUTS):
        store_as(b, b.fsub(value_at(b, stage, index), minimum), to, LINE_BYTES * index)


def squared_errors(b, codes, values, scale, minimum):
    """Of the first half of these inputs, one lane's, and of the other; of its registers every other has its own sum."""
    runs = len(codes) // 2
    held = [fma_value(b, code, scale, minimum) for code in codes]
    missed = [b.fsub(value, each) for value, each in zip(values, held, strict=True)]
    sums = [b.fmul(value, value) for at, value in enumerate(missed) if at % runs < 2]
    later = [value for at, value in enumerate(missed) if at % runs >= 2]
    if later:
        sums = [fma_value(b, value, value, total) for value, total in zip(later, sums, strict=True)]
    return [b.fadd(*sums[:2]), b.fadd(*sums[2:])]


def error_of(inputs: int, high: float):
    """Function (stage, where the inputs' differences from the minimum are, scale, minimum): the squared error of each
    feature's inputs in codes of 0..high, the one number of a tuple."""
    lines = lines_of(inputs // RUN_INPUTS)

    @emits(types.void, intp, intp, intp, F32x8, F32x8, F32x8)
    def leaf(b, stage, above, to, inverse, scale, minimum):
        codes = codes_of(b, [value_at(b, above, line) for line in lines], inverse, high)
        values = [value_at(b, stage, line) for line in lines]
        _store_sums(b, [[error] for error in squared_errors(b, codes, values, scale, minimum)], to)

    return over_lanes(leaf, 1)


def _store_sums(b, of_lanes, to):
    """The sums of a lane and of the one it is folded with, added, each to the first of its eight lines."""
    for number, pair in enumerate(zip(*of_lanes, strict=True)):
        store_as(b, b.fadd(*pair), to, LINE_BYTES * LANES_AHEAD * number)


def _sum(b, items):
    """Of four numbers."""
    return b.fadd(b.fadd(items[0], items[1]), b.fadd(items[2], items[3]))


def _dot(b, left, right):
    """Of four numbers by four."""
    total = b.fmul(left[3], right[3])
    for at in (2, 1, 0):
        total = fma_value(b, left[at], right[at], total)
    return total


def _sums_of_codes(b, codes, values):
    """Of codes, of their squares, of codes times values: of the first four, and of the others."""
    halves = [(codes[at : at + 4], values[at : at + 4]) for at in (0, 4)]
    return [[_sum(b, four), _dot(b, four, four), _dot(b, four, numbers)] for four, numbers in halves]


def _values_and_codes(b, stage, minimum, inverse, high: float):
    """The inputs of a lane's lines, and the codes from 0 on that they get."""
    values = [value_at(b, stage, line) for line in lines_of(4)]
    return values, codes_of(b, [b.fsub(value, minimum) for value in values], inverse, high)


def sums_of(high: float):
    """Function (stage, spare, scale, minimum): of 64 inputs and their codes the sum of inputs, that of codes, that of
    their squares, and that of codes times inputs."""

    @emits(types.void, intp, intp, intp, F32x8, F32x8, F32x8)
    def leaf(b, stage, above, to, inverse, scale, minimum):
        values, codes = _values_and_codes(b, stage, minimum, inverse, high)
        of_values = [_sum(b, values[at : at + 4]) for at in (0, 4)]
        of_codes = _sums_of_codes(b, codes, values)
        _store_sums(b, [[value, *three] for value, three in zip(of_values, of_codes, strict=True)], to)

    return over_lanes(leaf, 4)


def error_and_sums(high: float):
    """Function (stage, spare, scale, minimum): the error of 64 inputs as `error_of` has it, then what `sums_of` gives
    of their codes."""

    @emits(types.void, intp, intp, intp, F32x8, F32x8, F32x8)
    def leaf(b, stage, above, to, inverse, scale, minimum):
        values, codes = _values_and_codes(b, stage, minimum, inverse, high)
        errors, sums = squared_errors(b, codes, values, scale, minimum), _sums_of_codes(b, codes, values)
        _store_sums(b, [[error, *three] for error, three in zip(errors, sums, strict=True)], to)

    return over_lanes(leaf, 4)


@emits(types.UniTuple(F32x8, 2), F32x8, F32x8, F32x8, F32x8, F32x8, F32x8)
def least_squares(b, scale, minimum, sum_v, sum_c, sum_cc, sum_cv):
    """Scale and minimum that fit 64 inputs and their codes best, as float16 has them; those given where all codes are
    alike."""
    count = constant(VF32, float(4 * RUN_INPUTS))
    determinant = b.fsub(b.fmul(count, sum_cc), b.fmul(sum_c, sum_c))
    new_scale = b.fdiv(b.fsub(b.fmul(count, sum_cv), b.fmul(sum_c, sum_v)), determinant)
    new_minimum = b.fdiv(b.fsub(sum_v, b.fmul(new_scale, sum_c)), count)
    alike = b.fcmp_ordered("<=", determinant, ZERO)
    pairs = ((new_scale, scale), (new_minimum, minimum))
    return tuple_of(b, [half_value(b, b.select(alike, given, new)) for new, given in pairs])


def word_of(b, codes):
    """Four codes from 0 on as the bytes of a word of each feature."""
    word = constant(VI32, 0)
    for place, code in enumerate(codes):
        word = b.or_(word, b.shl(b.fptosi(code, VI32), constant(VI32, 8 * place)))
    return word


def signed_code(b, value, inverse, high: float):
    """round(value * inverse) within -high..high."""
    rounded = call_llvm(b, f"llvm.rint.v{LANES}f32", VF32, b.fmul(value, inverse))
    return smaller(b, larger(b, rounded, constant(VF32, -high)), constant(VF32, high))


@emits(types.void, F32x8, intp)
def store_halves(b, vector, address):
    """Eight float16."""
    store_as(b, b.fptrunc(vector, VHALF), address)
