"""Four bytes an instruction: products of signed bytes, and codes taken out of packed words."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot4(a, b, total):
    """total + the dot product of four signed bytes in each int32 of `a` and `b`."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def low_nibbles(packed):
    """The low nibble of each byte, four bytes an instruction."""
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def high_nibbles(packed):
    """The high nibble of each byte, four bytes an instruction."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def signed(packed):
    """Stored q + 128 as signed q, four bytes an instruction."""
    return tl.inline_asm_elementwise(
        "xor.b32 $0, $1, 0x80808080;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
    )
