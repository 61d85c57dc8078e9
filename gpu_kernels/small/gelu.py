"""gelu    y = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), gelu in its form by tanh."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.elementwise import GELU_FACTOR
from gpu_kernels.launching import Kernel, Shape

BLOCK = 1024
SHAPE = Shape(BLOCK=BLOCK, num_warps=4)


@Kernel
@triton.jit(do_not_specialize=["features"])
def _gelu_kernel(x, out, features, x_stride, out_stride, BLOCK: tl.constexpr):
    """grid: (rows, cdiv(features, BLOCK)). x, out: [rows, features]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    power = values * GELU_FACTOR * (1.0 + 0.044715 * values * values)
    tl.store(out + row * out_stride + columns, values / (1.0 + tl.exp(-power)), mask=inside)


def gelu(x: Tensor, out: Tensor) -> None:
    rows, features = out.shape
    assert x.shape == out.shape, (x.shape, out.shape)
    if rows and features:
        _gelu_kernel.launch(
            (rows, -(-features // BLOCK), 1), (x, out), (features,), (x.stride(0), out.stride(0)), SHAPE
        )
