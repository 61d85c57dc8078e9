"""The CPU lane: the ops of a transformer computed in place by CPU cores, written in numba.

    with CpuKernels() as ops:
        ops.linear(x, weight, "q4", None, out)

Knows nothing of models, placement or GPUs. `layout` describes the packed weights, `kv_layout` the KV pages;
`CpuKernels` holds the ops.
"""

from . import kv_layout, layout
from .kernels import CpuKernels
from .memory import HUGE_PAGE_BYTES, advise_huge_pages, fresh_memory

__all__ = ["HUGE_PAGE_BYTES", "CpuKernels", "advise_huge_pages", "fresh_memory", "kv_layout", "layout"]
