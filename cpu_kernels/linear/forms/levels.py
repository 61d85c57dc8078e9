"""Scales and minima of two levels as LLVM values: as a header packs them, or ready (ready.py)."""

from llvmlite import ir

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.records import run_of
from cpu_kernels.vectors.dot import pairs_of
from cpu_kernels.vectors.header_numbers import byte_numbers, halves
from cpu_kernels.vectors.vector import VF32, VI32, load_as


class PackedLevels:
    """Of 64 inputs of a superblock with a header K2M32, K2S16 or K2S32; group: which."""

    def __init__(self, item: WeightFormat, are_pairs: bool, b, superblock, group):
        runs = GROUP_INPUTS // run_of(item)
        self._b, self._superblock, self._are_pairs = b, superblock, are_pairs
        self.has_minima = item.header == "K2M32"
        self._numbers = b.add(superblock, b.mul(group, ir.Constant(group.type, 16 * runs)))
        self._scales = [byte_numbers(b, self._numbers, 64 + 16 * part, not self.has_minima) for part in range(runs)]

    def scale(self, part: int):
        """Of a run of inputs: int32, or where `are_pairs` int16 twice."""
        scale = self._scales[part]
        return pairs_of(self._b, scale, scale) if self._are_pairs else scale

    def d(self):
        """What the scales are multiplied by, float32."""
        return halves(self._b, self._superblock, 0)

    def dmin(self):
        """What the minima are multiplied by, float32."""
        return halves(self._b, self._superblock, 32)

    def minima(self):
        """Of both runs, as int16 pairs."""
        return pairs_of(self._b, *(byte_numbers(self._b, self._numbers, 192 + 16 * part, False) for part in (0, 1)))


class ReadyLevels:
    """The same, of a superblock of 64 inputs that is ready."""

    def __init__(self, item: WeightFormat, b, superblock):
        self._b, self._superblock, self.has_minima = b, superblock, item.header == "P2M32"

    def _line(self, place: int, kind):
        return load_as(self._b, self._superblock, kind, LINE_BYTES * place)

    def scale(self, part: int):
        """See PackedLevels."""
        return self._line((2 if self.has_minima else 1) + part, VI32)

    def d(self):
        """See PackedLevels."""
        return self._line(0, VF32)

    def dmin(self):
        """See PackedLevels."""
        return self._line(1, VF32)

    def minima(self):
        """See PackedLevels."""
        return self._line(4, VI32)
