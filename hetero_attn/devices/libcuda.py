"""The calls of the CUDA driver that torch does not offer, by ctypes: copies of rows, page-locking, stream flags.

Addresses and streams are plain integers. Every failure is a CudaError that names the call and CUDA's own word for it.
"""

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from hetero_attn.errors import HeteroError

HOST, DEVICE = 1, 2  # CUmemorytype
PORTABLE, MAPPED = 1, 2  # flags of cuMemHostRegister
WAIT_GEQ = 0  # of cuStreamWaitValue32: signed distance >= 0, so the counter may wrap
WAIT_EQ = 1
_SIGNATURES = {
    "cuGetErrorName": (c_int, c_void_p),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemcpy2DAsync_v2": (c_void_p, c_void_p),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (c_void_p, c_void_p, c_uint),
    "cuStreamWriteValue32_v2": (c_void_p, c_uint64, c_uint, c_uint),
    "cuStreamWaitValue32_v2": (c_void_p, c_uint64, c_uint, c_uint),
}


class CudaError(HeteroError):
    """A call of the CUDA driver failed. Exit code 5."""


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = [
        ("srcXInBytes", c_size_t),
        ("srcY", c_size_t),
        ("srcMemoryType", c_int),
        ("srcHost", c_void_p),
        ("srcDevice", c_uint64),
        ("srcArray", c_void_p),
        ("srcPitch", c_size_t),
        ("dstXInBytes", c_size_t),
        ("dstY", c_size_t),
        ("dstMemoryType", c_int),
        ("dstHost", c_void_p),
        ("dstDevice", c_uint64),
        ("dstArray", c_void_p),
        ("dstPitch", c_size_t),
        ("WidthInBytes", c_size_t),
        ("Height", c_size_t),
    ]


class LibCuda:
    """libcuda, or what a test puts in its place; raises CudaError where the machine has none."""

    def __init__(self, library: Any = None) -> None:
        try:
            self._library = library or ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"the CUDA driver library cannot be loaded ({error}); install the NVIDIA driver") from error
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int

    def current_context(self) -> int:
        """The calling thread's context, 0 for none."""
        context = c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        return context.value or 0

    def set_context(self, context: int) -> None:
        """Make a context the calling thread's."""
        self._call("cuCtxSetCurrent", context)

    def copy(self, target: tuple[int, int], source: tuple[int, int], count: int, stream: int) -> None:
        """Queue a copy of `count` bytes; target and source are (HOST or DEVICE, address), one of them DEVICE."""
        direction = {(DEVICE, HOST): "HtoD", (HOST, DEVICE): "DtoH", (DEVICE, DEVICE): "DtoD"}[target[0], source[0]]
        self._call(f"cuMemcpy{direction}Async_v2", target[1], source[1], count, stream)

    def copy_rows(
        self,
        target: tuple[int, int],
        target_pitch: int,
        source: tuple[int, int],
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        """Queue a copy of `rows` rows of `width` bytes that start every `pitch` bytes; see `copy`."""
        request = Copy2D(WidthInBytes=width, Height=rows, srcPitch=source_pitch, dstPitch=target_pitch)
        request.srcMemoryType, request.dstMemoryType = source[0], target[0]
        setattr(request, "srcDevice" if source[0] == DEVICE else "srcHost", source[1])
        setattr(request, "dstDevice" if target[0] == DEVICE else "dstHost", target[1])
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(request), stream)

    def register(self, address: int, count: int) -> bool:
        """Page-lock host memory and map it into the device's addresses; False where the system refuses."""
        return self._library.cuMemHostRegister_v2(address, count, PORTABLE | MAPPED) == 0

    def unregister(self, address: int) -> None:
        """Undo `register`: the memory is ordinary again."""
        self._call("cuMemHostUnregister", address)

    def device_address(self, address: int) -> int:
        """The address by which the device reaches registered host memory."""
        mapped = c_uint64()
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(mapped), address, 0)
        return mapped.value

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Queue a write of a 32-bit value, visible after everything that was queued before it."""
        self._call("cuStreamWriteValue32_v2", stream, address, value, 0)

    def wait_value(self, stream: int, address: int, value: int, flags: int = WAIT_GEQ) -> None:
        """Queue a wait for a 32-bit value to be at least (WAIT_GEQ) or exactly (WAIT_EQ) `value`."""
        self._call("cuStreamWaitValue32_v2", stream, address, value, flags)

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            word = c_char_p()
            self._library.cuGetErrorName(result, ctypes.byref(word))
            raise CudaError(f"{name} failed: {(word.value or b'unknown').decode()} ({result})")
