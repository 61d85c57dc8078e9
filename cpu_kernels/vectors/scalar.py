"""Single numbers in memory and registers, atomics and what a thread asks of the system: for kernels, as intrinsics."""

import time

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels.vectors.vector import F32, HALF, I8, I32, I64, call_llvm, emits, float32, int32, intp, pointer

FLUSHES = 0x8040  # of x86's MXCSR: results, and operands, that are subnormal become zero


@emits(types.int64, types.int64, types.int64)
def least(b, x, y):
    """The smaller integer; the builtin min costs a compilation per kernel."""
    return b.select(b.icmp_signed("<", x, y), x, y)


@emits(types.int64, types.int64, types.int64)
def most(b, x, y):
    """The larger integer."""
    return b.select(b.icmp_signed(">", x, y), x, y)


@emits(float32, float32, float32)
def larger(b, x, y):
    """The larger float; a NaN on either side wins."""
    return b.select(b.fcmp_unordered(">", y, x), y, x)


@emits(float32, float32)
def power_of_two(b, x):
    """2**x of a whole x <= 0; 0 below -126, also for -inf."""
    is_small = b.fcmp_ordered(">=", x, ir.Constant(F32, -126.0))
    whole = b.fptosi(b.select(is_small, x, ir.Constant(F32, 0.0)), I32)
    bits = b.shl(b.add(whole, ir.Constant(I32, 127)), ir.Constant(I32, 23))
    return b.select(is_small, b.bitcast(bits, F32), ir.Constant(F32, 0.0))


@emits(float32, float32)
def round_up(b, x):
    """The next whole number; infinities and NaN stay what they are."""
    return call_llvm(b, "llvm.ceil.f32", F32, x)


@emits(types.int64, intp)
def load_i64(b, address):
    """One int64 at an address."""
    return b.load(pointer(b, address, I64), align=8)


@emits(int32, intp)
def load_i32(b, address):
    """One int32 at an address."""
    return b.load(pointer(b, address, I32), align=4)


@emits(types.int64, intp)
def load_byte(b, address):
    """One unsigned byte."""
    return b.zext(b.load(pointer(b, address, I8), align=1), I64)


@emits(types.int64, intp)
def load_word(b, address):
    """One uint32 at any address."""
    return b.zext(b.load(pointer(b, address, I32), align=1), I64)


@emits(float32, intp)
def load_half(b, address):
    """One float16 at any address, widened."""
    return b.fpext(b.load(pointer(b, address, HALF), align=1), F32)


@emits(float32, types.int64)
def as_float(b, bits):
    """The float32 with these bits."""
    return b.bitcast(b.trunc(bits, I32), F32)


@emits(types.void, types.int64, intp)
def store_word(b, value, address):
    """The low four bytes."""
    b.store(b.trunc(value, I32), pointer(b, address, I32), align=1)


@emits(float32, intp)
def load_scalar(b, address):
    """One float32 at an address."""
    return b.load(pointer(b, address, F32), align=4)


@emits(types.void, float32, intp)
def store_scalar(b, value, address):
    """One float32 at an address."""
    b.store(value, pointer(b, address, F32), align=4)


@emits(types.void, types.int64, intp)
def store_i64(b, value, address):
    """One int64 at an address."""
    b.store(value, pointer(b, address, I64), align=8)


@emits(types.int64, intp)
def load_acquire(b, address):
    """Atomic int64 load: what was written before the matching store_release is visible after it."""
    return b.load_atomic(pointer(b, address, I64), "acquire", 8)


def read_and_drop(b, address, offset=0):
    """Read the int64 at `address + offset` and drop it; an ordinary load that nobody uses would be left out."""
    b.load_atomic(pointer(b, address, I64, offset), "monotonic", 8)


@emits(types.void, intp)
def touch(b, address):
    """`read_and_drop` of an int64 at an address."""
    read_and_drop(b, address)


@emits(types.void, types.int64, intp)
def store_release(b, value, address):
    """Atomic int64 store, ordered after all earlier writes and against later atomic loads."""
    b.store_atomic(value, pointer(b, address, I64), "seq_cst", 8)


@emits(types.int64, intp, types.int64)
def fetch_add(b, address, value):
    """Atomic add; returns the value before."""
    return b.atomic_rmw("add", pointer(b, address, I64), value, "seq_cst")


@emits(types.void)
def pause(b):
    """Tell the core that this is a spin loop (x86); nothing elsewhere."""
    if "x86_64" in str(b.module.triple):
        call_llvm(b, "llvm.x86.sse2.pause", ir.VoidType())


@emits(types.void)
def yield_core(b):
    """Let another thread have the core: sched_yield()."""
    call_llvm(b, "sched_yield", I32)


@emits(types.void, intp)
def sleep_us(b, microseconds):
    """Sleep for so many microseconds: usleep()."""
    call_llvm(b, "usleep", I32, b.trunc(microseconds, I32))


@emits(types.int64)
def clock_ns(b):
    """clock_gettime() of a clock that only goes forward, in nanoseconds."""
    time_spec = cgutils.alloca_once(b, ir.ArrayType(I64, 2))
    call_llvm(b, "clock_gettime", I32, ir.Constant(I32, time.CLOCK_MONOTONIC), b.bitcast(time_spec, I8.as_pointer()))
    seconds, nanoseconds = (b.load(cgutils.gep_inbounds(b, time_spec, 0, part)) for part in range(2))
    return b.add(b.mul(seconds, ir.Constant(I64, 10**9)), nanoseconds)


@emits(types.int64)
def keep_subnormals(b):
    """Let this thread of an x86 CPU multiply subnormal numbers as they are; returns what `restore_arithmetic` takes.

    Another library may have them flushed to zero: torch.set_flush_denormal, or one that was built with -ffast-math.
    """
    control = cgutils.alloca_once(b, I32)
    at = b.bitcast(control, I8.as_pointer())
    call_llvm(b, "llvm.x86.sse.stmxcsr", ir.VoidType(), at)
    before = b.load(control)
    b.store(b.and_(before, ir.Constant(I32, ~FLUSHES)), control)
    call_llvm(b, "llvm.x86.sse.ldmxcsr", ir.VoidType(), at)
    return b.zext(before, I64)


@emits(types.void, types.int64)
def restore_arithmetic(b, before):
    """What `keep_subnormals` found."""
    control = cgutils.alloca_once(b, I32)
    b.store(b.trunc(before, I32), control)
    call_llvm(b, "llvm.x86.sse.ldmxcsr", ir.VoidType(), b.bitcast(control, I8.as_pointer()))


@emits(types.void, types.int64, types.int64, types.int64)
def call_kernel(b, address, arguments, thread):
    """Call a compiled kernel (arguments, thread) in the convention of compiler.py."""
    opaque = I8.as_pointer()
    signature = ir.FunctionType(I32, [opaque.as_pointer(), opaque, I64, I64])
    result = cgutils.alloca_once(b, opaque)
    b.call(b.inttoptr(address, signature.as_pointer()), [result, ir.Constant(opaque, None), arguments, thread])
