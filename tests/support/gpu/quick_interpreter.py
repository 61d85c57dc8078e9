"""Triton 3.6's interpreter without the work that it repeats: what a kernel computes and what is checked stays the same.

Most of its time goes into looking through `triton.language` anew at every call of a helper, into a test for overflow
whose answer only `debug` reads, which is off, and into types of shapes that it has made thousands of times. Private
names of one release, as in interpreter.py.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterOptions


def install() -> None:
    """Patch the interpreter of this process, once, and after all that changes what `triton.language` becomes."""
    assert not InterpreterOptions().debug, "the test for overflow has a reader"
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *arguments: None
    tl.core.block_type.__init__ = _make_block_type
    tl.core.tensor.__init__ = _make_tensor
    TritonSemantic.broadcast_impl_value = _quick_broadcast(TritonSemantic.broadcast_impl_value)
    interpreter._get_np_dtype = _quick_np_dtype(interpreter._get_np_dtype)
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # nothing is left to be patched or restored


@functools.cache
def _known_shape(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    """The shape as a type has it, its items, and its name."""
    shape = tl.core.tuple(list(sizes))
    return shape, validate_block_shape(shape), str(shape)


def _make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    shape = tl.core._unwrap_if_constexpr(shape) if isinstance(shape, tl.constexpr) else shape
    sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, name = _known_shape(sizes)
    self.name = f"<{name}, {element_ty}>"


@functools.cache
def _constant_shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """The shape as a tensor has it, and its items."""
    return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _constant_shape(tuple(type.shape.values) if type.is_block() else ())


def _quick_broadcast(broadcast: Any) -> Any:
    def together(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.type, rhs.type
        if left.is_block() == right.is_block() and (not left.is_block() or left.shape is right.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return together


def _quick_np_dtype(np_dtype: Any) -> Any:
    known = functools.cache(np_dtype)

    def of(tt_dtype: Any) -> np.dtype:
        scalar = tt_dtype.element_ty if isinstance(tt_dtype, tl.block_type) else tt_dtype
        return np_dtype(scalar) if isinstance(scalar, tl.pointer_type) else known(scalar)

    return of
