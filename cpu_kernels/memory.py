"""What memory can do: a read-only sweep as the ceiling of every op, and huge pages for large tensors."""

import ctypes
import mmap

import torch

from .checks import expect
from .team import Team

HUGE_PAGE_BYTES = 2 << 20


def sweep(team: Team, tensor: torch.Tensor) -> None:
    """See CpuKernels.sweep."""
    expect(tensor.is_contiguous() and tensor.device.type == "cpu", "sweep needs a contiguous CPU tensor")
    team.run(("memory_kernel", "sweep"), 64 * team.num_threads, tensor.data_ptr(), tensor.nbytes)


def advise_huge_pages(tensor: torch.Tensor) -> bool:
    """Ask the system to back `tensor` by huge pages; best before its first write. False where it cannot be asked.

    Streaming reads gain 5 to 15 % from fewer address translations. Content is never changed.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    first = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    size = (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if size <= 0:
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise(first, size, mmap.MADV_HUGEPAGE) == 0
