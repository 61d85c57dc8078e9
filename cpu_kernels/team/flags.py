"""See CpuKernels.set_flag and CpuKernels.await_flag."""

import ctypes
import time
from collections.abc import Callable

import torch

from cpu_kernels.checks import expect
from cpu_kernels.team.flag_words import ADDRESS, BLOCK_BYTES, EXPIRED, NAPS, NAPS_AT_ONCE, VALUE
from cpu_kernels.team.store import KernelStore, as_function


def check_flag(flag: torch.Tensor) -> int:
    """The address of a flag; ValueError for what is none."""
    expect(flag.dtype == torch.int64 and flag.numel() == 1, "a flag is one int64")
    return flag.data_ptr()


class Flags:
    """The two compiled functions, each call with a block of its own, so that any threads may call at once."""

    def __init__(self, store: KernelStore) -> None:
        self._store = store  # owns the machine code
        self._set = as_function(store.address("team.flag_kernel", "set_flag"))
        self._await = as_function(store.address("team.flag_kernel", "await_flag"))

    def set(self, flag: torch.Tensor, value: int) -> None:
        """Write the value after everything that this thread has written before."""
        self._call(self._set, flag, value, 0)

    def wait(self, flag: torch.Tensor, value: int, timeout_s: float) -> bool:
        """Wait for the value; False where it is not there after about `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._call(self._await, flag, value, NAPS_AT_ONCE):
            if time.monotonic() > deadline:
                return False
        return True

    @staticmethod
    def _call(function: Callable[..., int], flag: torch.Tensor, value: int, naps: int) -> int:
        address = check_flag(flag)
        block = ctypes.create_string_buffer(BLOCK_BYTES)
        start = ctypes.addressof(block)
        for offset, word in ((ADDRESS, address), (VALUE, value), (NAPS, naps)):
            ctypes.c_int64.from_address(start + offset).value = word
        result = ctypes.c_int64()
        function(ctypes.addressof(result), None, start, 0)
        return ctypes.c_int64.from_address(start + EXPIRED).value
