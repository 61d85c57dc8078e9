"""Weights of bf16 that lie feature after feature, turned so that an input's 16 features are a line, and widened.

turned weights   of every 32 inputs a line with the 16 features of each even one, then of each odd one: the order in
                 which inputs are kept where the CPU cannot multiply bf16
"""

from llvmlite import ir
from numba import types

from cpu_kernels.formats import BLOCK_FEATURES, LINE_BYTES
from cpu_kernels.vectors.dot import high_halves, low_halves
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import I32, I64, LANES, VI32, emits, intp, load_as, picked, prefetch_value, store_as

GROUP = 32  # inputs turned together: a line of each feature
HALF = 8  # features of a register of 256 bits
PAIR_BYTES = 4  # of an even input and the odd one behind it


def _four_pairs(b, rows):
    """Four pairs of inputs of eight features: a register a pair; rows: those of one feature each, <4 x i32>."""
    both = [picked(b, rows[f], rows[f + 4], list(range(8))) for f in range(4)]
    low = [picked(b, *both[at : at + 2], [0, 8, 1, 9, 4, 12, 5, 13]) for at in (0, 2)]
    high = [picked(b, *both[at : at + 2], [2, 10, 3, 11, 6, 14, 7, 15]) for at in (0, 2)]
    lanes = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    return [picked(b, *halves, each) for halves in (low, high) for each in lanes]


def _by_halves(b, features):
    """(pair, first feature, pair of each) of 16 features, eight at a time, from pieces of four pairs."""
    four = ir.VectorType(I32, 4)
    for first in range(0, BLOCK_FEATURES, HALF):
        for pair in range(0, GROUP // 2, 4):
            rows = [load_as(b, address, four, PAIR_BYTES * pair) for address in features[first : first + HALF]]
            for place, lanes in enumerate(_four_pairs(b, rows), pair):
                yield place, first, lanes


def _in_turns(b, left, right, width):
    """Of every four lanes the first two and the last two, of both vectors, `width` of each in turn."""
    runs = [[side + lane for side in (0, LANES) for lane in range(at, at + width)] for at in range(0, 4, width)]
    halves = [sum(runs[: len(runs) // 2], []), sum(runs[len(runs) // 2 :], [])]
    return [picked(b, left, right, [quad + lane for quad in range(0, LANES, 4) for lane in half]) for half in halves]


def _even_odd(b, left, right):
    """The even fours of both vectors' lanes, then the odd ones."""
    lanes = range(2 * LANES)
    return [picked(b, left, right, [lane for lane in lanes if lane // 4 % 2 == odd]) for odd in (0, 1)]


def _by_lines(b, features):
    """The same of whole lines, each read once: of features 4 KB apart a set of the first level holds eight."""
    quads = []
    for first in range(0, BLOCK_FEATURES, 4):
        rows = [load_as(b, address, VI32) for address in features[first : first + 4]]
        pairs = zip(_in_turns(b, *rows[:2], 1), _in_turns(b, *rows[2:], 1))
        quads.append([each for left, right in pairs for each in _in_turns(b, left, right, 2)])
    for place, four in enumerate(zip(*quads)):
        halves = zip(_even_odd(b, *four[:2]), _even_odd(b, *four[2:]))
        for odd, (left, right) in enumerate(halves):
            for at, lanes in enumerate(_even_odd(b, left, right)):
                yield place + 4 * odd + 8 * at, 0, lanes


def turn_group(isa: Isa):
    """Intrinsic (weight, w_stride, to, ahead): 32 inputs of 16 features, as float32; asks for those `ahead` bytes
    on."""
    turned = _by_lines if isa.has_avx512 else _by_halves

    @emits(types.void, intp, intp, intp, intp)
    def turn(b, weight, w_stride, to, ahead):
        features = [b.add(weight, b.mul(w_stride, I64(f))) for f in range(BLOCK_FEATURES)]
        for address in features:
            prefetch_value(b, b.add(address, ahead))
        for place, first, lanes in turned(b, features):
            store_as(b, low_halves(b, lanes), to, LINE_BYTES * place + 4 * first)
            store_as(b, high_halves(b, lanes), to, LINE_BYTES * (GROUP // 2 + place) + 4 * first)

    return turn
