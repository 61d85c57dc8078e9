"""What only a trial tells of a GPU's driver: how much host memory it page-locks, whether its streams wait for flags.

For `doctor`; a load finds out by itself, locks what it can and takes the hand-over that works.
"""

from typing import Any, NamedTuple

import torch

from cpu_kernels import fresh_memory
from hetero_attn.devices.device import PAGE_BYTES
from hetero_attn.devices.libcuda import CudaError

FIRST_STEP_BYTES, LAST_STEP_BYTES = 1 << 30, 64 << 20


class Locked(NamedTuple):
    """size_bytes: page-locked at once. is_limit: whether more was refused, to within LAST_STEP_BYTES."""

    size_bytes: int
    is_limit: bool


def lockable(library: Any, most_bytes: int) -> Locked:
    """Page-lock host memory piece by piece up to `most_bytes`, smaller pieces where one is refused; all is given back.

    library: a `LibCuda`; the calling thread has a CUDA context.
    """
    pieces: list[torch.Tensor] = []
    locked, step, refused = 0, FIRST_STEP_BYTES, False
    try:
        while step >= LAST_STEP_BYTES and locked + step <= most_bytes:
            piece = fresh_memory((step,), torch.uint8)
            if library.register(piece.data_ptr(), step):
                pieces.append(piece)
                locked += step
            else:
                refused, step = True, step // 2
    finally:
        for piece in pieces:
            library.unregister(piece.data_ptr())
    return Locked(locked, refused)


def why_no_memory_operations(library: Any, stream: int, synchronize: Any) -> str | None:
    """What goes wrong when a stream writes a flag in page-locked memory and waits for it; None where nothing does.

    stream: its handle. synchronize(): waits for it.
    """
    memory = torch.zeros(2 * PAGE_BYTES, dtype=torch.uint8, device="cpu")
    flag = memory[-memory.data_ptr() % PAGE_BYTES :][:4].view(torch.int32)
    if not library.register(flag.data_ptr(), PAGE_BYTES):
        return "not one page of host memory can be page-locked"
    try:
        address = library.device_address(flag.data_ptr())
        library.write_value(stream, address, 1)
        library.wait_value(stream, address, 1)
        synchronize()
    except (CudaError, RuntimeError) as error:
        return str(error)
    finally:
        library.unregister(flag.data_ptr())
    return None if flag.item() == 1 else f"a flag that a stream set to 1 holds {flag.item()}"
