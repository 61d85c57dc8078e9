"""See CpuKernels.set_flag and CpuKernels.await_flag."""

import ctypes
import threading
import time

import torch

from .cache import KernelStore, as_function
from .checks import expect
from .flag_layout import ADDRESS, BLOCK_BYTES, EXPIRED, NAPS, NAPS_AT_ONCE, VALUE


class _Block(threading.local):
    """The argument block of one thread's calls, made once: to make it takes longer than the call."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(BLOCK_BYTES)
        self._result = ctypes.c_int64()
        self.start, self.result = ctypes.addressof(self._memory), ctypes.addressof(self._result)
        words = (ctypes.c_int64.from_address(self.start + offset) for offset in (ADDRESS, VALUE, NAPS, EXPIRED))
        self.address, self.value, self.naps, self.expired = words


class Flags:
    """The two compiled functions; any threads may call at once."""

    def __init__(self, store: KernelStore) -> None:
        self._store = store  # owns the machine code
        self._set = as_function(store.address("flag_kernel", "set_flag"))
        self._await = as_function(store.address("flag_kernel", "await_flag"))
        self._block = _Block()

    def set(self, flag: torch.Tensor, value: int) -> None:
        """Write the value after everything that this thread has written before."""
        self._call(self._set, flag, value, 0)

    def wait(self, flag: torch.Tensor, value: int, timeout_s: float) -> bool:
        """Wait for the value; False where it is not there after about `timeout_s`."""
        if not self._call(self._await, flag, value, NAPS_AT_ONCE):
            return True
        deadline = time.monotonic() + timeout_s
        while self._call(self._await, flag, value, NAPS_AT_ONCE):
            if time.monotonic() > deadline:
                return False
        return True

    def _call(self, function: object, flag: torch.Tensor, value: int, naps: int) -> int:
        expect(flag.dtype == torch.int64 and flag.numel() == 1, "a flag is one int64")
        block = self._block
        block.address.value, block.value.value, block.naps.value = flag.data_ptr(), value, naps
        function(block.result, None, block.start, 0)
        return block.expired.value
