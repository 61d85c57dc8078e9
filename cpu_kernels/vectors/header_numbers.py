"""Numbers of a superblock's header as LLVM values, one for each of its 16 features; see formats/base.py."""

from cpu_kernels.vectors.vector import VF32, VHALF, VI8, VI16, VI32, constant, load_as


def halves(b, address, offset: int):
    """16 float16, widened."""
    return b.fpext(load_as(b, address, VHALF, offset), VF32)


def byte_numbers(b, address, offset: int, signed: bool):
    """16 bytes as int32."""
    values = load_as(b, address, VI8, offset)
    return b.sext(values, VI32) if signed else b.zext(values, VI32)


def exponents(b, address, offset: int):
    """16 powers of two, 2^(e - 128) of u8 e: no normal numbers below e = 2."""
    e = byte_numbers(b, address, offset, signed=False)
    normal = b.shl(b.sub(e, constant(VI32, 1)), constant(VI32, 23))
    small = b.shl(constant(VI32, 0x00200000), b.and_(e, constant(VI32, 1)))
    return b.bitcast(b.select(b.icmp_unsigned(">=", e, constant(VI32, 2)), normal, small), VF32)


def tensor_scales(b, superblock, runs):
    """scale(k): of run k of 16 inputs, a byte E4M3 at `runs` times or over the number of the tensor; see T16."""
    factor = load_as(b, superblock, VF32, 0)
    divides = b.fcmp_ordered("<", factor, constant(VF32, 0.0))

    def scale(k: int):
        # Shifted by 7, exponent and mantissa are those of a float16 that is 256 times smaller.
        half = b.shl(b.zext(load_as(b, runs, VI8, 16 * k), VI16), constant(VI16, 7))
        value = b.fpext(b.bitcast(half, VHALF), VF32)
        return b.select(divides, b.fdiv(value, b.fneg(factor)), b.fmul(value, factor))

    return scale
