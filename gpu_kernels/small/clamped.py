"""clamped_silu_mul  y = (u + 1) * (g / (1 + exp(-alpha g))), g = min(gate, limit), u = up between -limit and limit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.elementwise import ordered_exp
from gpu_kernels.launching import Kernel, Shape

BLOCK = 1024
SHAPE = Shape(BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)  # bits as on every other lane


@Kernel
@triton.jit(do_not_specialize=["units"])
def _clamped_kernel(gate_up, out, units, alpha, limit, in_stride, out_stride, BLOCK: tl.constexpr):
    """grid: (rows, cdiv(units * 16, BLOCK)). gate_up: [rows, units * 32], units of 16 gate | 16 up; out: [rows,
    units * 16]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns // 16 < units
    source = gate_up + row * in_stride + columns // 16 * 32 + columns % 16
    gate = tl.minimum(tl.load(source, mask=inside, other=0.0), limit)
    up = tl.maximum(tl.minimum(tl.load(source + 16, mask=inside, other=0.0), limit), -limit)
    gated = tl.div_rn(gate, 1.0 + ordered_exp(gate * -alpha))
    tl.store(out + row * out_stride + columns, (up + 1.0) * gated, mask=inside)


def clamped_silu_mul(gate_up: Tensor, alpha: float, limit: float, out: Tensor) -> None:
    rows, width = gate_up.shape
    assert width % 32 == 0 and out.shape == (rows, width // 2), (gate_up.shape, out.shape)
    if rows and width:
        grid = (rows, -(-(width // 2) // BLOCK), 1)
        strides = gate_up.stride(0), out.stride(0)
        _clamped_kernel.launch(grid, (gate_up, out), (width // 32, alpha, limit), strides, SHAPE)
