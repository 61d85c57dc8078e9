"""What Triton 3.6's interpreter needs so that a green test there means something; applied once by the tests' conftest.

The interpreter keeps bfloat16 as raw 16-bit patterns, and multiplies those patterns. `install` makes it honest:

- bf16 operands of a dot and of a cast have their values; float32 to bf16 rounds to nearest even, as the GPU does;
- bf16 arithmetic outside of these is an error, since no kernel here may do it;
- a masked load without `other=` yields garbage, as on a GPU, instead of zeros;
- a dot whose inner dimension a tensor core cannot take is an error;
- the PTX that kernels use (dp4a, prmt, and operations on four bytes at once) is computed;
- a fused multiply-add rounds once;
- a loop bound may be a loaded scalar under numpy >= 2.4.

Touches private names of one release, which is why the test extra pins triton.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.support.gpu import quick_interpreter

# On four bytes in a register, none of which carries into another.
BYTE_OPERATIONS = {
    "and.b32 $0, $1, 0x0F0F0F0F;": lambda data: data & 15,
    "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }": lambda data: data >> 4,
    "xor.b32 $0, $1, 0x80808080;": lambda data: data ^ 128,
}


def install() -> None:
    """Patch the interpreter of this process; calling it again changes nothing more."""
    if getattr(InterpreterBuilder, "honest", False):
        return
    InterpreterBuilder.honest = True
    for name in (
        "create_si_to_fp",
        "create_ui_to_fp",
        "create_fp_to_si",
        "create_fp_to_ui",
        "create_fp_ext",
        "create_fp_trunc",
    ):
        setattr(InterpreterBuilder, name, _wrap_cast(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_fp_to_fp = _wrap_cast(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.binary_op = _wrap_binary(InterpreterBuilder.binary_op)
    InterpreterBuilder.create_dot = _wrap_dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.create_masked_load = _wrap_masked_load(InterpreterBuilder.create_masked_load)
    InterpreterBuilder.create_inline_asm = _inline_asm
    InterpreterBuilder.create_fma = _fused
    interpreter._patch_lang_tensor = _wrap_patch_tensor(interpreter._patch_lang_tensor)
    quick_interpreter.install()


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of bf16 bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bf16 bit patterns of float32, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.where(np.isnan(values), bits | np.uint32(1 << 22), bits + np.uint32(0x7FFF) + even)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _wrap_cast(cast: Any) -> Any:
    def honest_cast(self: Any, source: TensorHandle, target: Any, *rest: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        if _is_bf16(source) and target.scalar == tl.float32:
            return _widened(source)
        assert not _is_bf16(source), f"cast of bf16 to {target}: go through float32"
        return cast(self, source, target, *rest)

    return honest_cast


def _wrap_binary(binary_op: Any) -> Any:
    def honest_binary(self: Any, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        assert not (_is_bf16(left) or _is_bf16(right)), f"bf16 arithmetic ({op}): cast to float32 first"
        return binary_op(self, left, right, op)

    return honest_binary


def _wrap_dot(create_dot: Any) -> Any:
    def honest_dot(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *rest: Any) -> TensorHandle:
        assert a.dtype.scalar == b.dtype.scalar, f"dot of {a.dtype} and {b.dtype}"
        least = 256 // a.dtype.scalar.primitive_bitwidth if a.dtype.scalar.primitive_bitwidth == 8 else 16
        assert a.data.shape[-1] >= least, f"dot of {a.data.shape} and {b.data.shape}: inner dimension under {least}"
        return create_dot(self, _widened(a), _widened(b), c, *rest)

    return honest_dot


def _wrap_masked_load(masked_load: Any) -> Any:
    def honest_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> TensorHandle:
        loaded = masked_load(self, pointers, mask, other, *rest)
        if other is None:
            garbage = np.frombuffer(b"\xff\xff\xff\xff\xff\xff\xff\x7f"[-loaded.data.itemsize :], loaded.data.dtype)[0]
            loaded.data = np.where(np.broadcast_to(mask.data, loaded.data.shape), loaded.data, garbage)
        return loaded

    return honest_load


def _inline_asm(
    self: Any, asm: str, constraints: str, values: list, types: list, is_pure: bool, pack: int
) -> TensorHandle:
    if asm == "dp4a.s32.s32 $0, $1, $2, $3;" and pack == 1:
        words = (np.ascontiguousarray(handle.data, dtype=np.int32) for handle in values)
        result = TensorHandle(_dp4a(*words), tl.int32)
    elif asm == "prmt.b32 $0, $1, $2, $3;" and pack == 1:
        result = TensorHandle(_permuted(*(handle.data for handle in values)), tl.int32)
    else:
        assert asm in BYTE_OPERATIONS and pack == 4, f"no emulation of {asm!r}"
        result = TensorHandle(BYTE_OPERATIONS[asm](values[0].data.view(np.uint8)).view(np.int8), tl.int8)
    result.get_result = lambda index: result
    return result


def _dp4a(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    products = a[..., None].view(np.int8).astype(np.int32) * b[..., None].view(np.int8).astype(np.int32)
    return (products.sum(-1) + total).astype(np.int32)


def _permuted(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    assert not (selector & 0x8888).any(), "prmt that replicates signs"
    data = np.stack((low, high), -1).astype(np.int32).view(np.uint8)
    places = np.stack([selector >> (4 * byte) & 7 for byte in range(4)], -1)
    return np.take_along_axis(data, places.astype(np.int64), -1).view(np.int32)[..., 0]


def _fused(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """The product is exact in float64; its sum is rounded to odd there, which the second rounding cannot shift."""
    assert all(handle.data.dtype == np.float32 for handle in (x, y, z)), "fma of another type than float32"
    product, added = np.broadcast_arrays(x.data.astype(np.float64) * y.data.astype(np.float64), z.data.astype(float))
    total = np.ascontiguousarray(product + added)
    seen = total - product
    rest = (product - (total - seen)) + (added - seen)
    is_cut = np.isfinite(rest) & (rest != 0) & (total.view(np.int64) % 2 == 0)
    odd = (total.view(np.int64) + np.where((rest > 0) == (total > 0), 1, -1)).view(np.float64)
    return TensorHandle(np.where(is_cut, odd, total).astype(np.float32), tl.float32)


def _wrap_patch_tensor(patch_tensor: Any) -> Any:
    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    return patch
