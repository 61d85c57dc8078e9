"""Sums of unsigned codes times int8 inputs, word by word, as an instruction set adds them fastest; exact in int32.

  unsigned   vpdpbusd, or the arithmetic of `dot4`: codes as they are
  pairs      AVX2, codes up to 129: vpmaddubsw gives int16 sums of two products, which cannot saturate; as many are
             added in int16 as it holds, then widened by one vpmaddwd
  magnitudes AVX2, larger codes: |code - 128| times the input with the sign of code - 128, at most 128 * 127 * 2
  flips      the same of codes that are magnitudes and masks already: inputs meet an exclusive or in place of a sign,
             and sums begin with the magnitudes of negative codes (linear/forms/flips.py)
  signed     arm64 sdot: codes up to 127 as they are, larger ones less 128

Where codes lose 128 (`takes_128`), a format's own offset of 128 is thereby taken, and no correction has to be added.
"""

from dataclasses import dataclass

from llvmlite import ir

from cpu_kernels.vectors.dot import (
    V8I32,
    V16I16,
    V32I8,
    emit_dot2_256,
    emit_dot4,
    emit_sdot,
    in_parts,
    pair_products,
    together,
)
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import VI32, call_llvm, constant, in_order

LARGEST_INPUT, LARGEST_SHORT = 127, 32767
TOP_BITS = -0x7F7F7F80  # bit 7 of every byte


@dataclass(frozen=True, slots=True)
class CodeSums:
    """How sums of a format's codes, 0 to `largest`, are made on an instruction set.

    are_flips: whether many rows are given codes as magnitudes and flips.
    """

    isa: Isa
    largest: int
    are_flips: bool = False

    @property
    def kind(self) -> str:
        """One of those above."""
        if self.isa.name == "neon":
            return "signed"
        if self.isa.name != "avx2":
            return "unsigned"
        if 2 * LARGEST_INPUT * self.largest <= LARGEST_SHORT:
            return "pairs"
        return "flips" if self.are_flips else "magnitudes"

    def left_of(self, offset: int) -> int:
        """What is left to be taken of a format's offset."""
        return offset - 128 if self.takes_128 else offset

    @property
    def takes_128(self) -> bool:
        """Whether what is summed is code - 128."""
        return self.kind in ("magnitudes", "flips") or self.kind == "signed" and self.largest > 127

    def table(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """A table of codes as what is summed."""
        return tuple(code ^ 128 for code in codes) if self.takes_128 else codes

    def operand(self, b, codes, is_from_table: bool = False):
        """A word of codes, <16 x i32>, or of flips a pair, as `Sum.add` takes it: what rows share of the work.

        is_from_table: whether they are entries of `table` already.
        """
        if not self.takes_128:
            return codes
        if self.are_flips:
            return list(zip(*(in_parts(b, line, V32I8) for line in codes)))
        if not is_from_table:
            codes = b.xor(codes, constant(codes.type, TOP_BITS))
        if self.kind == "signed":
            return codes
        halves, keeps_least = in_parts(b, codes, V32I8), ir.Constant(ir.IntType(1), 0)
        return [(call_llvm(b, "llvm.abs.v32i8", V32I8, half, keeps_least), half) for half in halves]

    @property
    def takes_scales(self) -> bool:
        """Whether a scale is multiplied as products are widened, for nothing; flips leave no registers for scales."""
        return self.kind in ("pairs", "magnitudes")

    @property
    def widens(self) -> bool:
        """Whether products are widened by a multiplication, from the int16 of AVX2."""
        return self.takes_scales or self.kind == "flips"

    def pairs_hold(self, offset: int, inputs: int) -> bool:
        """Whether int16 sums hold the products of so many inputs once the offset is taken from the codes.

        On the way they may pass over, as int16 comes round again, but no instruction's two products may.
        """
        farthest = max(offset, self.largest - offset)
        return self.kind == "pairs" and farthest * LARGEST_INPUT * inputs // 2 <= LARGEST_SHORT

    def sum(self, b, start, scale=None, pairs=None):
        """A sum that begins with `start`, <16 x i32>; what is added to it is multiplied by `scale()`, where it
        `takes_scales`: of int16 twice in every lane, asked for where it is used.

        pairs: where `pairs_hold` all that is added, what their int16 sums begin with, <16 x i32>, which is multiplied
        too.
        """
        if not self.widens:
            return {"unsigned": Sum, "signed": SignedSum}[self.kind](self, b, start)
        factor = scale or (lambda: constant(VI32, 0x00010001))
        if pairs is not None:
            return HeldSum(self, b, start, factor, pairs)
        return {"pairs": PairSum, "magnitudes": MagnitudeSum, "flips": FlippedSum}[self.kind](self, b, start, factor)

    def settle(self, b, sums) -> None:
        """Between two words of several rows: what the next one takes is not begun before, as registers are few."""
        if not self.widens:
            return
        growing = [total.growing() for total in sums]
        settled = in_order(b, [b.bitcast(part, V8I32) for parts in growing for part in parts])
        for row, total in enumerate(sums):
            total.grown(settled[2 * row : 2 * row + 2])


class Sum:
    """A growing sum: LLVM values, while the code of a loop body is written."""

    def __init__(self, how: CodeSums, b, start):
        self._how, self._b, self._total = how, b, start

    def add(self, operand, x) -> None:
        """Add a word's products with x, <16 x i32> of four int8 each."""
        self._total = emit_dot4(self._how.isa, self._b, self._total, operand, x)

    def total(self):
        """<16 x i32>."""
        return self._total


class SignedSum(Sum):
    """Of sdot."""

    def add(self, operand, x) -> None:
        """See Sum."""
        self._total = emit_sdot(self._b, self._total, operand, x)


class WidenedSum(Sum):
    """Of int16 sums, widened by vpmaddwd with a factor."""

    def __init__(self, how: CodeSums, b, start, factor):
        super().__init__(how, b, start)
        self._factor = factor

    def growing(self):
        """The two registers of what is being added up."""
        return in_parts(self._b, self._total, V8I32)

    def grown(self, halves) -> None:
        """Go on with these in their place."""
        self._total = together(self._b, halves)

    def _widen(self, shorts) -> None:
        """Add two registers of int16 sums times the factor."""
        factor = in_parts(self._b, self._factor(), V16I16)
        halves = zip(in_parts(self._b, self._total, V8I32), shorts, factor)
        self._total = together(self._b, [emit_dot2_256(self._how.isa, self._b, *half) for half in halves])


class PairSum(WidenedSum):
    """Of vpmaddubsw: int16 sums beside the int32 ones, as long as they fit."""

    def __init__(self, how: CodeSums, b, start, factor):
        super().__init__(how, b, start, factor)
        self._shorts, self._held = [], 0

    @property
    def _is_full(self) -> bool:
        """Whether another word's products would not fit."""
        return (self._held + 1) * 2 * LARGEST_INPUT * self._how.largest > LARGEST_SHORT

    def growing(self):
        """See WidenedSum."""
        return self._shorts if self._held else super().growing()

    def grown(self, halves) -> None:
        """See WidenedSum."""
        if self._held:
            self._shorts = [self._b.bitcast(half, V16I16) for half in halves]
        else:
            super().grown(halves)

    def add(self, operand, x) -> None:
        """See Sum."""
        b = self._b
        products = [pair_products(b, *pair) for pair in zip(in_parts(b, operand, V32I8), in_parts(b, x, V32I8))]
        self._shorts = products if self._held == 0 else [b.add(*both) for both in zip(self._shorts, products)]
        self._held += 1
        if self._is_full:
            self._flush()

    def total(self):
        """See Sum."""
        if self._held:
            self._flush()
        return self._total

    def _flush(self) -> None:
        self._widen(self._shorts)
        self._shorts, self._held = [], 0


class HeldSum(PairSum):
    """Of vpmaddubsw, all of it in int16 until the end, beginning with what takes the offset."""

    def __init__(self, how: CodeSums, b, start, factor, pairs):
        super().__init__(how, b, start, factor)
        self._shorts, self._held = in_parts(b, pairs, V16I16), 1

    @property
    def _is_full(self) -> bool:
        return False


class MagnitudeSum(WidenedSum):
    """Of vpmaddubsw on magnitudes; two of its sums do not fit in int16."""

    def add(self, operand, x) -> None:
        """See Sum."""
        b, parts = self._b, zip(operand, in_parts(self._b, x, V32I8))
        self._widen([pair_products(b, half[0], self._signed(inputs, half[1])) for half, inputs in parts])

    def _signed(self, inputs, codes):
        """Inputs with the signs of codes."""
        return call_llvm(self._b, "llvm.x86.avx2.psign.b", V32I8, inputs, codes)


class FlippedSum(MagnitudeSum):
    """The same of inputs that are flipped, -x - 1, where codes are negative."""

    def _signed(self, inputs, flips):
        return self._b.xor(inputs, flips)
