"""What planning must know of a GPU in this machine: how much of it is CUDA's own, and which catalogue entry it is."""

import os
import warnings
from dataclasses import replace
from functools import cache

import torch

from hetero_attn.errors import MemoryBudgetError, UnsupportedModelError
from placement.machine.hardware import HardwareProfile, catalogue_names
from placement.plan.memory import rounded_input_bytes
from placement.plan.plan import Plan
from placement.plan.units import format_bytes
from placement.plan.workload import Workload

# Beside the arena, whatever the model, by what torch's allocator and the driver said of an H100 after seven loads of an
# 8B model in two processes (examples/benchmarks/results/gpu/gpu_h100_2026-11-27.json). Torch held 344 to 425 MiB more
# than arena and rounded inputs: weights as bf16 (64), products (32 where torch cannot write them in place), a workspace
# of cuBLAS (32) for every stream so far, of which each load has new ones, the pool of captured steps, whole segments.
TEMPORARY_BYTES = 432 * 2**20
# CUDA took 69 to 73 MiB more than its context had at the load: modules of kernels used first later, and graphs.
LATE_CUDA_BYTES = 80 * 2**20
UNKNOWN_GPU = "rtx3060-ddr4"  # slow in everything, so its plans are right and only more careful than need be
SLACK_BYTES = 2**20  # what aligning every allocation may take


def device_index(device: str) -> int:
    """N of "cuda:N", 0 of "cuda"; raises UnsupportedModelError where this machine has no such GPU."""
    number = device.partition(":")[2] or "0"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not number.isdigit() or int(number) >= count:
        found = f"torch sees {count} GPU(s)" if count else "torch sees no CUDA GPU"
        raise UnsupportedModelError(
            f"device is {device!r}, but {found}; use device='cpu' or 'emulated', or see `hetero-attn doctor`"
        )
    return int(number)


def with_own_bytes(hardware: HardwareProfile, device: str) -> HardwareProfile:
    """The profile with what CUDA and the kernels' fixed temporaries take of the budget, measured where there is a
    GPU."""
    if not torch.cuda.is_available():
        return hardware
    own_bytes = context_bytes(device_index(device)) + LATE_CUDA_BYTES + TEMPORARY_BYTES + SLACK_BYTES
    return replace(hardware, gpu_context_bytes=own_bytes)


def temporary_bytes(workload: Workload) -> int:
    """The most that kernels allocate beside the arena: fixed parts, and the rounded copy of a linear's input."""
    return TEMPORARY_BYTES + rounded_input_bytes(workload)


def arena_bytes(plan: Plan, index: int) -> int:
    """GPU memory that a plan's allocations may take in all, an elastic one's in any plan of its budget.

    Raises MemoryBudgetError if CUDA's own takes more than was planned.
    """
    planned = plan.memory.gpu.get("context", 0)
    needed = context_bytes(index) + LATE_CUDA_BYTES + temporary_bytes(plan.workload) + SLACK_BYTES
    if needed > planned:
        least = plan.memory.gpu_bytes + needed - planned
        raise MemoryBudgetError(
            f"CUDA and its kernels take {format_bytes(needed)} of GPU {index}, but the plan leaves them "
            f"{format_bytes(planned)}; plan for this machine, or with gpu_memory of at least {format_bytes(least)}"
        )
    return plan.own_gpu_bytes if plan.workload.elastic else plan.memory.gpu_bytes - plan.memory.others_gpu_bytes


@cache
def context_bytes(index: int) -> int:
    """Bytes of a GPU that this process's CUDA context takes, cuBLAS included; the first call makes the context.

    The driver's own count of this process where it gives one; else what the GPU holds more than before. Where the
    context is there already, everything in use that is not this process's tensors counts then, to be safe.
    """
    before = None if torch.cuda.is_initialized() else _used_bytes(index)
    with torch.cuda.device(index):
        square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        torch.mm(square, square, out_dtype=torch.float32)
        torch.cuda.synchronize()
        after = _used_bytes(index)
        free, total = torch.cuda.mem_get_info()
        own = _own_bytes(str(torch.cuda.get_device_properties(index).uuid))
        # A slice of a GPU (MIG) is counted by CUDA alone: the driver's figures are those of the whole GPU.
        is_slice = " MIG " in torch.cuda.get_device_name(index)
        if own is None or is_slice:
            own = total - free if before is None or after is None or is_slice else after - before
        return max(0, own - torch.cuda.memory_reserved())


def gpu_profile(index: int, stored: HardwareProfile | None) -> HardwareProfile:
    """The rates to plan with: the measured ones, else those of the catalogue's machine with such a GPU.

    stored: this machine's profile, if one is kept.
    """
    if stored is not None and stored.has_gpu:
        return stored
    name = torch.cuda.get_device_name(index).lower().replace(" ", "")
    known = next((entry for entry in catalogue_names() if entry.partition("-")[0] in name), None)
    profile = HardwareProfile.named(known or UNKNOWN_GPU)
    warnings.warn(
        f"no measured profile of this machine: planning with the rates of {profile.name}; run `hetero-attn profile`",
        stacklevel=2,
    )
    total = torch.cuda.get_device_properties(index).total_memory
    return replace(profile, gpu_memory_bytes=total)


def _used_bytes(index: int) -> int | None:
    """Bytes in use on the GPU by all processes as the driver counts them; None without the library that asks it."""
    try:
        return torch.cuda.device_memory_used(index)
    except Exception:  # no nvidia-ml-py, or a driver that does not answer: each has a type of its own
        return None


def _own_bytes(uuid: str) -> int | None:
    """Bytes that this process has on a GPU as the driver counts them; None where it does not tell: without
    nvidia-ml-py, or in a container that numbers processes otherwise."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return next(process.usedGpuMemory for process in processes if process.pid == os.getpid())
    except Exception:  # each of these cases has a type of its own, and an older driver's are others
        return None
