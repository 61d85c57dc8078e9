"""What a repacking kernel is written in: numbers of the same place in a superblock of 16 features, as vectors.

A superblock of 16 rows is first laid on a stage, dword by dword: 16 lanes of a register are then the same four bytes of
all features, and a line of a packed weight is one register. Which bytes are codes and how they are put together is the
same for every superblock, so that offsets and shifts are constants of the machine code.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.formats import BLOCK_FEATURES, LINE_BYTES
from cpu_kernels.vectors.vector import (
    I8,
    I32,
    I64,
    VI8,
    VI16,
    VI32,
    call_llvm,
    constant,
    emits,
    intp,
    load_as,
    store_as,
)

DWORD_BYTES = 4
SIGN = 1 << 31  # constants are written as signed numbers


class Lanes:
    """An unsigned number of 32 bits for each feature; operators with plain numbers or other lanes."""

    def __init__(self, b: ir.IRBuilder, value: ir.Value) -> None:
        self._b, self.value = b, value

    def _made(self, operation: str, other: "Lanes | int") -> "Lanes":
        operand = other.value if isinstance(other, Lanes) else constant(VI32, (other ^ SIGN) - SIGN)
        return Lanes(self._b, getattr(self._b, operation)(self.value, operand))

    def __and__(self, other: "Lanes | int") -> "Lanes":
        return self._made("and_", other)

    def __or__(self, other: "Lanes | int") -> "Lanes":
        return self._made("or_", other)

    def __xor__(self, other: "Lanes | int") -> "Lanes":
        return self._made("xor", other)

    def __mul__(self, other: int) -> "Lanes":
        return self._made("mul", other)

    def __sub__(self, other: int) -> "Lanes":
        return self._made("sub", other)

    def __lshift__(self, bits: int) -> "Lanes":
        return self._made("shl", bits) if bits else self

    def __rshift__(self, bits: int) -> "Lanes":
        return self._made("lshr", bits) if bits else self


class Stage:
    """A superblock of 16 rows: its bytes by their offset, little-endian. Each dword is loaded once."""

    def __init__(self, b: ir.IRBuilder, address: ir.Value) -> None:
        self._b, self._address = b, address
        self._loaded: dict[int, Lanes] = {}

    def word(self, at: int) -> Lanes:
        """Four bytes from `at` on."""
        index, bits = at // DWORD_BYTES, 8 * (at % DWORD_BYTES)
        low = self._dword(index)
        return low >> bits | self._dword(index + 1) << 32 - bits if bits else low

    def short(self, at: int) -> Lanes:
        """Two bytes, which no dword's end parts."""
        assert at % DWORD_BYTES < DWORD_BYTES - 1, at
        return self._dword(at // DWORD_BYTES) >> 8 * (at % DWORD_BYTES) & 0xFFFF

    def byte(self, at: int) -> Lanes:
        """One byte."""
        return self._dword(at // DWORD_BYTES) >> 8 * (at % DWORD_BYTES) & 0xFF

    def _dword(self, index: int) -> Lanes:
        if index not in self._loaded:
            self._loaded[index] = Lanes(self._b, load_as(self._b, self._address, VI32, LINE_BYTES * index))
        return self._loaded[index]


class Superblock:
    """Where a superblock of the packed weight is written, by offsets of its bytes; and what was wrong with it."""

    def __init__(self, b: ir.IRBuilder, address: ir.Value) -> None:
        self._b, self._address = b, address
        self._wrong: ir.Value = constant(ir.VectorType(ir.IntType(1), BLOCK_FEATURES), 0)

    def words(self, lanes: Lanes, at: int) -> None:
        """A line: four bytes of each feature."""
        store_as(self._b, lanes.value, self._address, at)

    def halves(self, lanes: Lanes, at: int) -> None:
        """Two bytes of each feature."""
        store_as(self._b, self._b.trunc(lanes.value, VI16), self._address, at)

    def bytes(self, lanes: Lanes, at: int) -> None:
        """One byte of each feature."""
        store_as(self._b, self._b.trunc(lanes.value, VI8), self._address, at)

    def refuse(self, lanes: Lanes, value: int) -> None:
        """A feature of these lanes whose number is `value`, or more, is wrong."""
        found = self._b.icmp_unsigned(">=", lanes.value, constant(VI32, value))
        self._wrong = self._b.or_(self._wrong, found)

    def is_good(self) -> ir.Value:
        """int64, 1 where nothing was wrong."""
        any_wrong = call_llvm(self._b, "llvm.vector.reduce.or.v16i32", I32, self._b.zext(self._wrong, VI32))
        return self._b.zext(self._b.icmp_unsigned("==", any_wrong, ir.Constant(I32, 0)), I64)


@emits(types.void, intp, intp, intp)
def stage_dword(b, source, stride, to):
    """The dwords at `source` of 16 rows, `stride` bytes from one to the next, side by side."""
    value, at = ir.Constant(VI32, ir.Undefined), source
    for feature in range(BLOCK_FEATURES):
        dword = b.load(b.inttoptr(at, I32.as_pointer()), align=1)
        value = b.insert_element(value, dword, ir.Constant(I32, feature))
        at = b.add(at, stride)
    store_as(b, value, to)


def stage_memory(size: int):
    """Function (): the address of so many bytes of the kernel's own stack."""

    @intrinsic
    def memory(context):
        def codegen(context, builder, signature, values):
            place = cgutils.alloca_once(builder, ir.ArrayType(I8, size))
            return builder.ptrtoint(place, I64)

        return types.int64(), codegen

    return memory
