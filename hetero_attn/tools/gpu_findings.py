"""What `doctor` finds of the GPUs: what the driver reports, what is in the way, and what only a trial tells."""

import resource
from collections.abc import Callable, Iterator
from typing import Any

from hetero_attn.tools.findings import GIB, Finding, Verdict, gib

MOST_LOCKED_BYTES = 4 * GIB  # to be tried: about a second


def gpus() -> Iterator[Finding]:
    """NVIDIA GPUs as the driver reports them, and whether torch can use them."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver or no device: the library has a type for each
        yield Finding("gpu", "NVIDIA", "none found; device=cpu and device=emulated work")
        return
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        for index in range(pynvml.nvmlDeviceGetCount()):
            yield _gpu(pynvml, index, driver)
            yield from _slices(pynvml, index)
        yield _cuda_torch()
        yield from _in_the_way()
        yield from _tried()
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, index: int, driver: str) -> Finding:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    capacity = pynvml.nvmlDeviceGetMemoryInfo(handle)
    text = f"{pynvml.nvmlDeviceGetName(handle)}, {gib(capacity.free)} free of {gib(capacity.total)}, driver {driver}"
    try:
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        width, most = pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle), pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
    except pynvml.NVMLError:
        return Finding("gpu", f"cuda:{index}", f"{text}, PCIe link unknown")
    text += f", PCIe {generation}.0 x{width}"
    if width < most:
        return Finding(
            "gpu",
            f"cuda:{index}",
            text,
            "note",
            f"the link runs at x{width} of x{most} and streams slower by as much: look at the slot",
        )
    return Finding("gpu", f"cuda:{index}", text)


def _cuda_torch() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("gpu", "torch", "missing", "problem", "pip install torch")
    if torch.cuda.is_available():
        return Finding("gpu", "torch", f"built for CUDA {torch.version.cuda}, sees {torch.cuda.device_count()} GPU(s)")
    return Finding(
        "gpu",
        "torch",
        f"{torch.__version__} cannot use the GPU",
        "note",
        "device=cuda will not work: install a CUDA build of torch that fits the driver",
    )


def _in_the_way() -> Iterator[Finding]:
    """What keeps the GPU lane's kernels from being compiled or run."""
    try:
        import torch

        from hetero_attn.devices.readiness import obstacles

        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            for each in obstacles(index):
                verdict: Verdict = "problem" if each.stops else "note"
                yield Finding("gpu", f"cuda:{index} {each.name}", each.found, verdict, each.way_out)
    except ImportError:
        return


def _slices(pynvml: Any, index: int) -> Iterator[Finding]:
    """The slices of a GPU in MIG mode: each has memory of its own, and a process sees one of them."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        if not pynvml.nvmlDeviceGetMigMode(handle)[0]:
            return
        count = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except (pynvml.NVMLError, AttributeError):  # a GPU, or a library, that has no such mode
        return
    for number in range(count):
        try:
            part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            memory = pynvml.nvmlDeviceGetMemoryInfo(part)
        except pynvml.NVMLError:  # no slice of this number
            continue
        text = f"{gib(memory.free)} free of {gib(memory.total)}, of which plans are made"
        yield Finding("gpu", f"cuda:{index} MIG slice {number}", text)


def _tried() -> Iterator[Finding]:
    """What the driver does when it is asked to page-lock host memory and to let a stream wait for a flag."""
    try:
        import psutil
        import torch

        from hetero_attn.devices.libcuda import LibCuda

        if not torch.cuda.is_available():
            return
        torch.cuda.synchronize()  # makes the context
        library, stream = LibCuda(), torch.cuda.Stream()
    except (ImportError, RuntimeError, AttributeError):  # said where obstacles are
        return
    most_bytes = min(MOST_LOCKED_BYTES, psutil.virtual_memory().available // 4)
    yield page_locking(library, most_bytes)
    yield memory_operations(library, stream.cuda_stream, stream.synchronize)


def page_locking(library: Any, most_bytes: int) -> Finding:
    """How much host memory can be page-locked at once, by trying up to `most_bytes`. library: a `LibCuda`."""
    from hetero_attn.devices.probes import lockable

    found = lockable(library, most_bytes)
    if not found.is_limit:
        return Finding("gpu", "page-locked memory", f"at least {gib(found.size_bytes)}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else gib(soft)
    return Finding(
        "gpu",
        "page-locked memory",
        f"{gib(found.size_bytes)} at once, more is refused (ulimit -l is {limit})",
        "note",
        f"weights that are streamed beyond it are copied through a buffer, at half the speed or less: raise ulimit -l "
        f"or the container's memlock, under WSL2 `memory` in .wslconfig, or stream less with pinned_memory: "
        f"{found.size_bytes >> 20}MiB in a policy",
    )


def memory_operations(library: Any, stream: int, synchronize: Callable[[], None]) -> Finding:
    """Whether a stream writes and waits for flags in host memory, which the fastest hand-overs need."""
    from hetero_attn.devices.probes import why_no_memory_operations

    reason = why_no_memory_operations(library, stream, synchronize)
    if reason is None:
        return Finding("gpu", "stream memory operations", "work")
    return Finding(
        "gpu",
        "stream memory operations",
        f"do not work ({reason})",
        "note",
        "hand-overs go by events, about 100 us instead of 15: update the driver (WSL2, vGPU and some MIG slices have "
        "none)",
    )
