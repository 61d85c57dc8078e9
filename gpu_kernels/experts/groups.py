"""What 64 inputs of a whole-number format add to a result, in the order of float32 operations of `ordered`."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.forms.unpack import Form

_LOW_HALF = tl.constexpr(0x0F0F0F0F)


@triton.jit
def _permuted(low, high, selector):
    """Four of the eight bytes of `high` and `low`, by the nibbles of the selector's lower half."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _looked_up(packed, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr):
    """(entries of the four low nibbles, of the four high ones) of a table of 16 signed bytes, T0 the first four."""
    index, upper = packed & 0x77777777, 0x32103210 | ((packed >> 1) & 0x44444444)
    t0, t1 = tl.full(packed.shape, T0, tl.int32), tl.full(packed.shape, T1, tl.int32)
    t2, t3 = tl.full(packed.shape, T2, tl.int32), tl.full(packed.shape, T3, tl.int32)
    first = _permuted(_permuted(t0, t1, index), _permuted(t2, t3, index), upper)
    index, upper = (index >> 16) & 0x7777, (upper >> 16) & 0x7777
    last = _permuted(_permuted(t0, t1, index), _permuted(t2, t3, index), upper)
    even, odd = tl.full(packed.shape, 0x6420, tl.int32), tl.full(packed.shape, 0x7531, tl.int32)
    return _permuted(first, last, even), _permuted(first, last, odd)


@triton.jit
def _less(words, OFFSET: tl.constexpr):
    """Unsigned bytes below 64 less an offset of at most 64, as signed bytes."""
    if OFFSET == 0:
        return words
    else:
        return ((words | -2139062144) - OFFSET * 0x01010101) ^ -2139062144  # 0x80808080: no byte borrows from the next


@triton.jit
def code_words(
    codes,
    line,
    mask,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
):
    """Signed codes of 64 inputs, four in an int32: (low, high) of `line`, 0 to 7.

    codes: pointers to int32, of the first code line and of a feature; the shapes of codes, line and mask broadcast. Of
    8 bits low are inputs 4 line to 4 line + 3 and high those 32 behind them; else 8 line and following, and 4 behind.
    """
    packed = tl.load(codes + line * 16, mask=mask, other=0)
    if BITS == 8:
        return packed ^ -2139062144, tl.load(codes + line * 16 + 128, mask=mask, other=0) ^ -2139062144
    elif T0 != 0 or T1 != 0:
        return _looked_up(packed, T0, T1, T2, T3)
    else:
        low, high = packed & _LOW_HALF, (packed >> 4) & _LOW_HALF
        if BITS == 5:
            upper = tl.load(codes + (8 + line // 4) * 16, mask=mask, other=0) >> (line % 4 * 2)
            low, high = low | ((upper & 0x01010101) << 4), high | (((upper >> 1) & 0x01010101) << 4)
        if BITS == 6:
            upper = tl.load(codes + (8 + line // 2) * 16, mask=mask, other=0) >> (line % 2 * 4)
            low, high = low | ((upper & 0x03030303) << 4), high | (((upper >> 2) & 0x03030303) << 4)
        return _less(low, OFFSET), _less(high, OFFSET)


@triton.jit
def _half(header, mask, offset):
    return tl.load((header + offset).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _number(header, mask, offset):
    return tl.load((header + offset).to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)


@triton.jit
def _byte(header, mask, offset, SIGNED: tl.constexpr):
    found = tl.load(header + offset, mask=mask, other=0)
    return (found.to(tl.int8, bitcast=True) if SIGNED else found).to(tl.int32)


@triton.jit
def _power(header, mask, offset):
    """2^(e - 128) of a byte e: no normal numbers below e = 2."""
    exponent = _byte(header, mask, offset, False)
    bits = tl.where(exponent >= 2, (exponent - 1) << 23, 0x00200000 << tl.minimum(exponent, 1))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _of_tensor(header, factor, mask, offset):
    """A byte E4M3 times or over the number of the tensor."""
    byte = tl.load(header + offset, mask=mask, other=0)
    value = (byte.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(factor < 0, tl.div_rn(value, -factor), value * factor)


@triton.jit
def _group_total(d0, d1, d2, d3, x0, x1, block, feature, mask, inside, HEADER: tl.constexpr, TOGETHER: tl.constexpr):
    """Sums of scale * dot product, and of minimum * sum of the inputs; arguments as those of `add_group`."""
    bytes1, bytes2, bytes4 = block + feature, block + 2 * feature, block + 4 * feature
    if HEADER == "S32" or HEADER == "SM32":
        total = tl.fma(d1.to(tl.float32), _half(bytes2, mask, 32), d0.to(tl.float32) * _half(bytes2, mask, 0))
        if HEADER == "SM32":
            total = tl.fma(x0.to(tl.float32), _half(bytes2, mask, 64), total)
            total = tl.fma(x1.to(tl.float32), _half(bytes2, mask, 96), total)
    elif HEADER == "E32":
        at = 32 * inside
        total = tl.fma(d1.to(tl.float32), _power(bytes1, mask, at + 16), d0.to(tl.float32) * _power(bytes1, mask, at))
    elif HEADER == "T16":
        at, of_all = 64 + 64 * inside, _number(bytes4, mask, 0)
        total = d0.to(tl.float32) * _of_tensor(bytes1, of_all, mask, at)
        total = tl.fma(d1.to(tl.float32), _of_tensor(bytes1, of_all, mask, at + 16), total)
        total = tl.fma(d2.to(tl.float32), _of_tensor(bytes1, of_all, mask, at + 32), total)
        total = tl.fma(d3.to(tl.float32), _of_tensor(bytes1, of_all, mask, at + 48), total)
    elif HEADER == "F128":
        total = d0.to(tl.float32) * _number(bytes4, mask, 0)
    elif HEADER == "SZ32" or HEADER == "SI32":
        at = 2 * inside
        early = d0 - _byte(bytes1, mask, 64 * TOGETHER + 16 * at, HEADER == "SI32") * x0
        late = d1 - _byte(bytes1, mask, 64 * TOGETHER + 16 * at + 16, HEADER == "SI32") * x1
        scaled = early.to(tl.float32) * _half(bytes2, mask, 32 * at)
        total = tl.fma(late.to(tl.float32), _half(bytes2, mask, 32 * at + 32), scaled)
    elif HEADER == "SZ64" or HEADER == "SZ128" or HEADER == "SI64" or HEADER == "SI128":
        EACH: tl.constexpr = 1 if HEADER == "SZ64" or HEADER == "SI64" else 2
        SIGNED: tl.constexpr = HEADER == "SI64" or HEADER == "SI128"
        at = inside // EACH
        whole = d0 - _byte(bytes1, mask, 32 * TOGETHER // EACH + 16 * at, SIGNED) * (x0 + x1)
        total = whole.to(tl.float32) * _half(bytes2, mask, 32 * at)
    elif HEADER == "K2S16":
        at = 64 + 64 * inside
        whole = d0 * _byte(bytes1, mask, at, True) + d1 * _byte(bytes1, mask, at + 16, True)
        whole += d2 * _byte(bytes1, mask, at + 32, True) + d3 * _byte(bytes1, mask, at + 48, True)
        total = whole.to(tl.float32) * _half(bytes2, mask, 0)
    else:
        at = 64 + 32 * inside
        whole = d0 * _byte(bytes1, mask, at, HEADER == "K2S32") + d1 * _byte(bytes1, mask, at + 16, HEADER == "K2S32")
        total = whole.to(tl.float32) * _half(bytes2, mask, 0)
        if HEADER == "K2M32":
            taken = x0 * _byte(bytes1, mask, at + 128, False) + x1 * _byte(bytes1, mask, at + 144, False)
            total = tl.fma(taken.to(tl.float32), -_half(bytes2, mask, 32), total)
    return total


@triton.jit
def add_group(
    result,
    d0,
    d1,
    d2,
    d3,
    x0,
    x1,
    factor,
    x_sum,
    block,
    feature,
    mask,
    inside,
    HEADER: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """`result` and what 64 inputs add, `inside` their number in a superblock of TOGETHER such.

    d0 .. d3: int32 dot products of the runs that `runs_of` counts; x0, x1: int32 sums of both halves of the inputs;
    factor, x_sum: the activations' float32 scale, and that times the sum of all. block: pointers to the superblock of
    each column, feature: which of its 16 a column is. All of them broadcast to the shape of `result`.
    """
    if HEADER == "SM64":
        halves = block + 2 * feature
        scaled = d0.to(tl.float32) * _half(halves, mask, 0)
        added = tl.fma(_half(halves, mask, 32), x_sum, tl.fma(scaled, factor, result))
    else:
        total = _group_total(d0, d1, d2, d3, x0, x1, block, feature, mask, inside, HEADER, TOGETHER)
        added = tl.fma(total, factor, result)
    return added


def runs_of(header: str) -> int:
    """Runs of 64 inputs whose dot products `add_group` takes apart from each other: 1, 2 or 4."""
    if header in ("K2S16", "T16"):
        return 4
    return 1 if header in ("SM64", "F128", "SZ64", "SZ128", "SI64", "SI128") else 2


def takes_sums(form: Form) -> bool:
    """Whether `add_group` reads the sums of halves of the inputs."""
    return form.has_zero_points or form.header in ("SM32", "K2M32")


def table_words(table: tuple[int, ...]) -> tuple[int, ...]:
    """A table of 16 signed bytes as four int32; zeros where there is none."""
    data = bytes(value & 255 for value in table or (0,) * 16)
    return tuple(int.from_bytes(data[at : at + 4], "little", signed=True) for at in (0, 4, 8, 12))
