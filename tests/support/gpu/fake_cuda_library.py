"""The part of CUDA's driver library that the runtime calls, on a FakeCuda: pins, copies, and words in memory that streams
write and wait for."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from hetero_attn.devices.libcuda import DEVICE, Copy2D
from tests.support.gpu.fake_cuda import FakeCuda, FakeEvent


class _Function:
    """A function of the library: callable, and it takes the types that ctypes is told."""

    def __init__(self, work: Callable[..., int]) -> None:
        self._work = work

    def __call__(self, *arguments: Any) -> int:
        return self._work(*arguments) or 0


class FakeLibrary:
    """The functions of libcuda that `LibCuda` calls. refuse_pins: page-locking fails, as under a limit of the
    system."""

    def __init__(self, cuda: FakeCuda, refuse_pins: bool = False) -> None:
        self._cuda = cuda
        self._refuse_pins = refuse_pins
        self.registered: dict[int, int] = {}
        self.copies_before_failure: int | None = None
        self.memory_operations = 0

    def __getattr__(self, name: str) -> _Function:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Function(getattr(self, f"_{name.removesuffix('_v2')}"))

    def _cuGetErrorName(self, result: int, word: Any) -> None:
        ctypes.cast(word, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_FAKE"

    def _cuCtxGetCurrent(self, context: Any) -> None:
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = 7

    def _cuCtxSetCurrent(self, context: int) -> int:
        return 0 if context == 7 else 201

    def _locked(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self.registered.items())

    def _cuMemcpyHtoDAsync(self, target: int, source: int, count: int, stream: int) -> int:
        """Ordinary memory is taken into a buffer of the driver's before the call returns, as CUDA says it is."""
        keeper = None if self._locked(source) else ctypes.create_string_buffer(ctypes.string_at(source, count), count)
        start = source if keeper is None else ctypes.addressof(keeper)
        self._cuda.streams[stream].add(lambda keeper=keeper: ctypes.memmove(target, start, count) and None, "pull")
        return self._failure()

    def _failure(self) -> int:
        """CUDA_ERROR_UNKNOWN once, after as many copies as a test has set."""
        if self.copies_before_failure is None:
            return 0
        self.copies_before_failure -= 1
        if self.copies_before_failure >= 0:
            return 0
        self.copies_before_failure = None
        return 999

    def _cuMemcpyDtoDAsync(self, target: int, source: int, count: int, stream: int) -> None:
        self._cuda.streams[stream].add(lambda: ctypes.memmove(target, source, count) and None)

    def _cuMemcpyDtoHAsync(self, target: int, source: int, count: int, stream: int) -> None:
        """A copy to ordinary memory has been made when the call returns."""
        self._cuda.streams[stream].add(lambda: ctypes.memmove(target, source, count) and None, "push")
        if not self._locked(target):
            event = FakeEvent()
            event.record(self._cuda.streams[stream])
            event.wait()

    def _cuMemcpy2DAsync(self, request: Any, stream: int) -> None:
        copied = Copy2D.from_buffer_copy(ctypes.cast(request, ctypes.POINTER(Copy2D)).contents)
        source = copied.srcDevice if copied.srcMemoryType == DEVICE else copied.srcHost
        target = copied.dstDevice if copied.dstMemoryType == DEVICE else copied.dstHost

        def move() -> None:
            for row in range(copied.Height):
                ctypes.memmove(target + row * copied.dstPitch, source + row * copied.srcPitch, copied.WidthInBytes)

        self._cuda.streams[stream].add(move, "pull" if copied.dstMemoryType == DEVICE else "push")

    def _cuMemHostRegister(self, address: int, count: int, flags: int) -> int:
        pages = range(address // 4096, (address + count - 1) // 4096 + 1)
        taken = {
            page
            for start, size in self.registered.items()
            for page in range(start // 4096, (start + size - 1) // 4096 + 1)
        }
        assert all(stream.capture is None for stream in self._cuda.streams.values()), "page-locking in a capture"
        assert address % 4096 == 0 and not taken & set(pages), "page-locked ranges share a page"
        if self._refuse_pins:
            return 304
        self.registered[address] = count
        return 0

    def _cuMemHostUnregister(self, address: int) -> None:
        del self.registered[address]

    def _cuMemHostGetDevicePointer(self, mapped: Any, address: int, flags: int) -> None:
        ctypes.cast(mapped, ctypes.POINTER(ctypes.c_uint64))[0] = address

    def _cuStreamWriteValue32(self, stream: int, address: int, value: int, flags: int) -> None:
        self.memory_operations += 1
        word = ctypes.c_uint32.from_address(address)
        self._cuda.streams[stream].add(lambda: setattr(word, "value", value), "request")

    def _cuStreamWaitValue32(self, stream: int, address: int, value: int, flags: int) -> None:
        self.memory_operations += 1
        word = ctypes.c_uint32.from_address(address)

        def wait() -> None:
            deadline = time.monotonic() + 20
            while (word.value != value) if flags else (word.value - value) & 0x80000000:
                time.sleep(0)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"a flag stays at {word.value}, {value} is waited for")

        self._cuda.streams[stream].add(wait, "wait")
