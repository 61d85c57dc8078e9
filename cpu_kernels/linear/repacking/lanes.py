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
    picked,
    splat_value,
    store_as,
)

DWORD_BYTES = 4
QUAD = 4  # dwords that are read of a row at once
SIGN = 1 << 31  # constants are written as signed numbers
VD32 = ir.VectorType(I32, QUAD)


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


def dwords_of_rows(b, source, stride):
    """The dwords at `source` of 16 rows, `stride` bytes from one to the next, side by side."""
    value, at = ir.Constant(VI32, ir.Undefined), source
    for feature in range(BLOCK_FEATURES):
        dword = b.load(b.inttoptr(at, I32.as_pointer()), align=1)
        value = b.insert_element(value, dword, ir.Constant(I32, feature))
        at = b.add(at, stride)
    return value


@emits(types.void, intp, intp, intp)
def stage_dword(b, source, stride, to):
    """A line of the stage: four bytes of each of 16 rows."""
    store_as(b, dwords_of_rows(b, source, stride), to)


@emits(types.void, intp, intp, intp, intp)
def stage_last(b, source, stride, to, count):
    """A line of the stage: the last `count` bytes, below four, of the four at `source`, zeros behind them."""
    bits = b.trunc(b.sub(ir.Constant(I64, 32), b.mul(count, ir.Constant(I64, 8))), I32)
    store_as(b, b.lshr(dwords_of_rows(b, source, stride), splat_value(b, bits)), to)


@emits(types.void, intp, intp, intp)
def stage_quad(b, source, stride, to):
    """Four lines of the stage: 16 bytes of each of 16 rows, which are read at once and turned within 128 bits."""
    rows = []
    for _ in range(BLOCK_FEATURES):
        rows.append(b.load(b.inttoptr(source, VD32.as_pointer()), align=1))
        source = b.add(source, stride)
    # Part L of the i-th of these is row 4L + i.
    first, second, third, fourth = (_side_by_side(b, rows[place::QUAD]) for place in range(QUAD))
    pairs = [(_interleaved(b, first, second, 1, part), _interleaved(b, third, fourth, 1, part)) for part in range(2)]
    for line in range(QUAD):
        left, right = pairs[line // 2]
        store_as(b, _interleaved(b, left, right, 2, line % 2), to, LINE_BYTES * line)


def _side_by_side(b, parts):
    """Four vectors of four as one of 16."""
    halves = [picked(b, *parts[at : at + 2], list(range(8))) for at in (0, 2)]
    return picked(b, *halves, list(range(16)))


def _interleaved(b, left, right, size, part):
    """Of every 128 bits the lower (part 0) or upper half, items of `size` dwords of both vectors by turns."""
    own = [QUAD * lane + 2 * part + item for lane in range(QUAD) for item in range(2)]
    order = [start + lane for at in range(0, len(own), size) for start in (0, 16) for lane in own[at : at + size]]
    return picked(b, left, right, order)


def stage_memory(size: int):
    """Function (): the address of so many bytes of the kernel's own stack."""

    @intrinsic
    def memory(context):
        def codegen(context, builder, signature, values):
            place = cgutils.alloca_once(builder, ir.ArrayType(I8, size))
            place.align = LINE_BYTES
            return builder.ptrtoint(place, I64)

        return types.int64(), codegen

    return memory
