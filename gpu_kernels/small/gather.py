"""gather_columns    y_i = x_j, j = order_i."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.launching import Kernel, Shape

BLOCK = 1024
SHAPE = Shape(BLOCK=BLOCK, num_warps=4)


@Kernel
@triton.jit(do_not_specialize=["features"])
def _gather_kernel(x, order, out, features, x_stride, out_stride, BLOCK: tl.constexpr):
    """grid: (rows, cdiv(features, BLOCK)). x, out: [rows, features]. order: int32 [features]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    sources = tl.load(order + columns, mask=inside, other=0)
    values = tl.load(x + row * x_stride + sources, mask=inside, other=0.0)
    tl.store(out + row * out_stride + columns, values, mask=inside)


def gather_columns(x: Tensor, order: Tensor, out: Tensor) -> None:
    rows, features = out.shape
    assert x.shape == out.shape and order.shape == (features,), (x.shape, order.shape, out.shape)
    if rows and features:
        _gather_kernel.launch(
            (rows, -(-features // BLOCK), 1), (x, order, out), (features,), (x.stride(0), out.stride(0)), SHAPE
        )
