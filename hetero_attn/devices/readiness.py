"""What of a machine keeps the GPU lane's kernels from being compiled or run, each thing with the way out.

Triton builds a small launcher in C when a kernel is first used, so a C compiler and Python's headers are needed on the
machine that runs, not only where packages are built; what it compiles is kept in a folder that must be writable.
"""

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hetero_attn.devices.libcuda import CudaError, LibCuda
from hetero_attn.errors import UnsupportedModelError

LEAST_CAPABILITY = (8, 0)  # bf16 products; below it Triton has no tensor-core path and spills kilobytes
COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Something in the way. stops: nothing runs on this GPU; else it is slower, or fails where nothing is compiled
    yet."""

    name: str
    found: str
    way_out: str
    stops: bool = False


def obstacles(
    index: int, cuda: Any = torch.cuda, find: Callable[[str], str | None] = shutil.which, library: Any = LibCuda
) -> Iterator[Obstacle]:
    """What is in the way of GPU `index`. cuda, find, library: torch.cuda, shutil.which and libcuda, or what a test
    has."""
    yield from _of_the_device(index, cuda, library)
    yield from _of_the_compiler(find)


def _of_the_device(index: int, cuda: Any, library: Any) -> Iterator[Obstacle]:
    """What the GPU or its driver cannot do."""
    capability = tuple(cuda.get_device_capability(index))
    if capability < LEAST_CAPABILITY:
        yield Obstacle(
            "compute capability",
            "{}.{} of {}, where the kernels need {}.{} (Ampere) or later".format(
                *capability, cuda.get_device_name(index), *LEAST_CAPABILITY
            ),
            "use another GPU (device='cuda:N') or device='cpu'",
            stops=True,
        )
    try:
        library()
    except (CudaError, AttributeError) as error:
        yield Obstacle(
            "stream memory operations",
            f"the driver's library does not offer them ({error})",
            "update the NVIDIA driver (12.0 or later)",
            stops=True,
        )


def _of_the_compiler(find: Callable[[str], str | None]) -> Iterator[Obstacle]:
    """What Triton misses to build its kernels and to keep them."""
    wanted = (os.environ["CC"],) if os.environ.get("CC") else COMPILERS
    if not any(map(find, wanted)):
        yield Obstacle(
            "C compiler",
            f"none of {', '.join(wanted)} is on the PATH, and Triton builds its launchers in C",
            "install one (apt install gcc) or name it in CC",
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        yield Obstacle(
            "Python headers",
            f"{header} is missing, and Triton's launchers include it",
            "install Python's development files (apt install python3-dev)",
        )
    folder = _kernel_cache()
    if not os.access(folder, os.W_OK):
        yield Obstacle(
            "GPU kernel cache",
            f"{folder} is not writable, so no kernel can be compiled or kept",
            "make it writable or name another folder in TRITON_CACHE_DIR",
        )


def check_ready(index: int, found: Callable[[int], Iterator[Obstacle]] = obstacles) -> None:
    """Raise UnsupportedModelError for what stops this GPU, and warn of all else that is in the way."""
    for obstacle in found(index):
        message = f"GPU {index}: {obstacle.name}: {obstacle.found}; {obstacle.way_out}"
        if obstacle.stops:
            raise UnsupportedModelError(message)
        warnings.warn(message, stacklevel=3)


def _kernel_cache() -> Path:
    """Triton's folder, or the nearest one above it that exists."""
    named = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(named) if named else home / ".triton" / "cache"
    return next(each for each in (folder, *folder.parents) if each.exists())
