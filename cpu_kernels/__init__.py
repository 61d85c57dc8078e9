"""The CPU lane: the ops of a transformer computed in place by CPU cores, written in numba.

    with CpuKernels() as ops:
        ops.linear(x, weight, "q4", None, out)

Knows nothing of models, placement or GPUs. `formats` describes packed weights and KV pages, without importing torch or
numba; `contract` says what every op is given and writes; `CpuKernels` holds the ops. Names are imported when they are
first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpu_kernels.kernels import CpuKernels as CpuKernels
    from cpu_kernels.small.memory import HUGE_PAGE_BYTES as HUGE_PAGE_BYTES
    from cpu_kernels.small.memory import advise_huge_pages as advise_huge_pages
    from cpu_kernels.small.memory import advise_small_pages as advise_small_pages
    from cpu_kernels.small.memory import fresh_memory as fresh_memory

_HOMES = {
    "CpuKernels": "cpu_kernels.kernels",
    "HUGE_PAGE_BYTES": "cpu_kernels.small.memory",
    "advise_huge_pages": "cpu_kernels.small.memory",
    "advise_small_pages": "cpu_kernels.small.memory",
    "fresh_memory": "cpu_kernels.small.memory",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
