"""Small copies of rows by a kernel, where either side may be page-locked host memory that the GPU reaches over the bus,
and such rows added where they are wanted: what the CPU lane computed, onto the residual.

A copy of some KiB by the copy engine is mostly start-up; a kernel between two kernels of one stream has nearly none.

Host memory may have been written by the CPU since a kernel last read it, and the loads are ordinary ones: what the CPU
wrote is seen because a launch begins with nothing of host memory in a cache of the GPU, and because every copy is a
launch of its own, behind the wait for what it reads. A kernel that polled, or began before that wait had ended, would
need `ld.relaxed.sys`; Triton drops the modifier `.cv` of a load without a word
(tests/gpu_kernels/compiled/test_aot.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.launching import Kernel, Shape

COPY_BLOCK = 1024
COPY_SHAPE, ADD_SHAPE = (Shape(BLOCK=COPY_BLOCK, ADD=add, num_warps=4) for add in (False, True))


@Kernel
@triton.jit
def _copy_rows_kernel(target, source, columns, target_stride, source_stride, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """grid: (rows, cdiv(columns, BLOCK)). target, source: [rows, columns]. ADD: onto what the target holds."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(source + row * source_stride + column, mask=inside, other=0.0)
    if ADD:
        values += tl.load(target + row * target_stride + column, mask=inside, other=0.0)
    tl.store(target + row * target_stride + column, values, mask=inside)


def copy_rows(target: Tensor, source: Tensor) -> None:
    """target = source, both f32 [rows, columns] with any row stride, in GPU memory or in page-locked host memory.

    Triton's launcher asks the driver for the address by which the GPU reaches a tensor in page-locked memory.
    """
    _launch(target, source, COPY_SHAPE)


def add_rows(target: Tensor, source: Tensor) -> None:
    """target += source; tensors as those of `copy_rows`."""
    _launch(target, source, ADD_SHAPE)


def _launch(target: Tensor, source: Tensor, shape: Shape) -> None:
    rows, columns = target.shape
    assert source.shape == target.shape and source.dtype == target.dtype, (target.shape, source.shape)
    if rows and columns:
        _copy_rows_kernel.launch(
            (rows, -(-columns // COPY_BLOCK), 1),
            (target, source),
            (),
            (columns, target.stride(0), source.stride(0)),
            shape,
            by_address=False,
        )
