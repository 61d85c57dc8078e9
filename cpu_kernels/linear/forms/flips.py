"""Codes of eight bits as magnitudes and flips, for many rows on AVX2; formats/base.py has the lines.

An input whose bits are flipped, where the code is negative, is -x - 1, so that its product is less by the magnitude.
What the magnitudes of a run's negative codes add up to is the same for every row: sums begin there. An exclusive or has
all four vector ports of a Zen, a sign the two of products alone.
"""

from llvmlite import ir

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.records import run_of
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.dot import V32I8, emit_dot4_256, in_parts, together
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import I32, VI32, constant, load_as, store_as

WORDS = GROUP_INPUTS // 4


class FlippedWords:
    """The words of 64 inputs, read from their lines."""

    def __init__(self, b, lines):
        self._b, self._lines = b, lines

    def _line(self, place: int):
        return load_as(self._b, self._lines, VI32, LINE_BYTES * place)

    def __call__(self, k: int):
        """Magnitudes and flips of inputs 4k..4k+3."""
        return self._line(2 * k), self._line(2 * k + 1)

    def start(self, part: int):
        """Where the sums of a run begin."""
        return self._line(2 * WORDS + part)


def store_flips(isa: Isa, item: WeightFormat, b, word, to) -> None:
    """The lines of 64 inputs; word(k): their codes, of a table what `CodeSums.table` makes of them."""
    sums, run, ones = CodeSums(isa, item.largest_code), run_of(item), constant(V32I8, 1)
    starts = [constant(VI32, 0)] * (GROUP_INPUTS // run)
    for k in range(WORDS):
        halves = sums.operand(b, word(k), is_from_table=bool(item.table))
        flips = [b.sext(b.icmp_signed("<", signed, constant(V32I8, 0)), V32I8) for _, signed in halves]
        start = in_parts(b, starts[4 * k // run], ir.VectorType(I32, 8))
        for half, ((magnitude, _), flip) in enumerate(zip(halves, flips)):
            store_as(b, magnitude, to, LINE_BYTES * 2 * k + 32 * half)
            store_as(b, flip, to, LINE_BYTES * (2 * k + 1) + 32 * half)
            start[half] = emit_dot4_256(isa, b, start[half], b.and_(magnitude, flip), ones)
        starts[4 * k // run] = together(b, start)
    for place, start in enumerate(starts):
        store_as(b, start, to, LINE_BYTES * (2 * WORDS + place))
