"""Measure a GPU, the bus, and both sides at work: what the three lanes need beside the CPU lane's own rates.

Everything is asked of a small interface, so that a fake with known rates can stand in for a GPU:

    memory_bytes, free_bytes        of the GPU; what is free of it
    ops                             the operations of the GPU kernels (linear, prefill_attention)
    empty(shape, dtype)             GPU memory;  host(shape, dtype, pinned): host memory
    copy(target, source)            queue a copy on a stream of its own, beside the kernels
    seconds(work)                   run `work` and return how long the GPU was at it
    kernel_seconds(work)            the same of kernels alone, as in a captured step: no launch is waited for
    now(), synchronize()            a clock in seconds; wait for all that is queued

`TorchGpu` is the real one. Copies and kernels are at least some megabytes, so their launches do not count; what
launches and hand-overs cost is measured with the runtime itself (hetero_attn.engine.runtime_costs).
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import ChunkKeys, Pages, Partial
from cpu_kernels.formats.weights import WEIGHT_DTYPES
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import CopyRate, DtypeRates
from placement.profilers.cpu_attention import decode_call, kv_pages
from placement.profilers.cpu_linear import SWEEP_BYTES, linear_call, packed
from placement.profilers.gpu_linear import few_rows, int8_products, kernels_s, row_rates
from placement.profilers.timing import Progress, beyond_caches, host_memory

OVERLAP_SHOWN_BY = "h100-server"
COPY_BYTES = (64 << 10, 1 << 20, 16 << 20, 128 << 20)
REPETITIONS = 5
IN_A_GRAPH = 4
HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, PREFILL_ROWS = 32, 8, 128, 64, 512
# Seconds that the slowest copies of one size may take in all: a narrow bus shortens the list, not the patience.
MOST_SECONDS = 2.0
LEAST_SHARE = 1e-6  # a share is above 0, whatever a clock says
LEAST_GAIN = 1.05  # of both sides together over the CPU lane alone, for which streaming in decode is worth its trouble


class TorchGpu:
    """A CUDA device by torch. ops: gpu_kernels, or another module with its functions."""

    def __init__(self, ops: Any, index: int = 0) -> None:
        self.ops = ops
        self._device = torch.device("cuda", index)
        self._copies = torch.cuda.Stream(self._device)

    @property
    def memory_bytes(self) -> int:
        """All memory of the GPU."""
        return torch.cuda.get_device_properties(self._device).total_memory

    @property
    def free_bytes(self) -> int:
        """Memory that nobody uses now."""
        return torch.cuda.mem_get_info(self._device)[0]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """GPU memory full of zeros."""
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        """Host memory, every page of it touched."""
        return torch.empty(shape, dtype=dtype, pin_memory=pinned, device="cpu").fill_(0)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy beside the kernels."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def seconds(self, work: Callable[[], object]) -> float:
        """Time between two events around `work`, on whichever of both streams is longer."""
        self.synchronize()
        start, kernels, copies = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        self._copies.wait_event(start)
        work()
        kernels.record()
        copies.record(self._copies)
        self.synchronize()
        return max(start.elapsed_time(kernels), start.elapsed_time(copies)) / 1e3

    def kernel_seconds(self, work: Callable[[], object]) -> float:
        """Median time of `work` in a captured graph that repeats it; it ran before, so nothing is compiled."""
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_A_GRAPH):
                work()
        graph.replay()
        return statistics.median(self.seconds(graph.replay) for _ in range(REPETITIONS)) / IN_A_GRAPH

    def now(self) -> float:
        """The system's clock."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Wait for both streams."""
        torch.cuda.synchronize(self._device)


def measure_gpu(
    gpu: Any, profile: HardwareProfile, on_progress: Progress = lambda what: None, ops: CpuKernels | None = None
) -> HardwareProfile:
    """The profile of the CPU lane with the GPU's, the bus's and the shared rates; takes some ten seconds.

    ops: CPU kernels with the profile's threads; made when not given.
    """
    bus = _bus(gpu, on_progress)
    kernels = _kernels(gpu, on_progress)
    on_progress("CPU lane while copies run")
    with CpuKernels(profile.cores) if ops is None else nullcontext(ops) as cpu:
        linear, cache = slowdowns(gpu, cpu, bus["h2d_bytes_per_s"])
    # How far lanes overlap takes a loaded model to see; until this machine has shown it, what another one has.
    shown = HardwareProfile.named(OVERLAP_SHOWN_BY)
    return replace(
        profile,
        overlap=shown.overlap,
        prompt_overlap=shown.prompt_overlap,
        overlap_source=shown.overlap_source,
        gpu_memory_bytes=gpu.memory_bytes,
        cpu_slowdown_while_copying=linear.cpu,
        cpu_attention_slowdown_while_copying=cache.cpu,
        copy_slowdown_while_computing=linear.copies,
        streams_in_decode=streaming_pays(linear, profile.cpu_linear_bytes_per_s.bf16, bus["h2d_bytes_per_s"]),
        **bus,
        **kernels,
    )


def _bus(gpu: Any, on_progress: Progress) -> dict[str, Any]:
    """The profile's rates of copies."""
    on_progress("copies over the bus")
    copies = copy_rates(gpu)
    large = max(copies, key=lambda rate: rate.h2d_pinned)  # weights stream in pieces of some megabytes
    return {
        "copies": copies,
        "h2d_bytes_per_s": large.h2d_pinned,
        "d2h_bytes_per_s": large.d2h_pinned,
        "h2d_pageable_bytes_per_s": large.h2d_pageable,
        "d2h_pageable_bytes_per_s": large.d2h_pageable,
    }


def _kernels(gpu: Any, on_progress: Progress) -> dict[str, Any]:
    """The profile's rates of linears and attention on the GPU."""
    few = DtypeRates(*(few_rows(gpu, dtype, on_progress) for dtype in WEIGHT_DTYPES))
    int8 = int8_products(gpu, on_progress)
    rows = row_rates(gpu, few, int8.rows, on_progress)
    on_progress("attention on the GPU")
    return {
        "gpu_bytes_per_s": max(few.of(dtype) for dtype in WEIGHT_DTYPES),
        "gpu_flops": DtypeRates(*(max(rate.ops_per_s.of(dtype) for rate in rows) for dtype in WEIGHT_DTYPES)),
        "gpu_rows": rows,
        "gpu_int8_ops_per_s": int8.ops_per_s,
        "gpu_q8_int8_rows": int8.rows["q8"],
        "gpu_q4_int8_rows": int8.rows["q4"],
        "gpu_attention_ops_per_s": gpu_attention_rate(gpu),
    }


def copy_rates(gpu: Any) -> tuple[CopyRate, ...]:
    """Both ways, pinned and pageable, by size; sizes that take too long are left out."""
    rates = []
    for size in COPY_BYTES:
        device = gpu.empty((size,), torch.uint8)
        found = []
        for pinned in (True, False):
            host = gpu.host((size,), torch.uint8, pinned)
            for target, source in ((device, host), (host, device)):
                found.append(size / _median(gpu, lambda target=target, source=source: gpu.copy(target, source)))
        h2d_pinned, d2h_pinned, h2d_pageable, d2h_pageable = found
        rates.append(CopyRate(size, h2d_pinned, d2h_pinned, h2d_pageable, d2h_pageable))
        slowest = min(found)
        if 8 * size / slowest * (REPETITIONS + 1) * 4 > MOST_SECONDS:
            break
    return tuple(rates)


def gpu_attention_rate(gpu: Any) -> float:
    """Operations a second of a chunk over itself and as many tokens before it."""
    pages = 2 * PREFILL_ROWS // PAGE_TOKENS
    cached = Pages(*(gpu.empty((pages * KV_HEADS, PAGE_TOKENS, HEAD_DIM), torch.bfloat16) for _ in range(2)))
    keys = ChunkKeys(gpu.empty((KV_HEADS, pages), torch.int32), 0, 2 * PREFILL_ROWS, PREFILL_ROWS)
    q, out = (gpu.empty((PREFILL_ROWS, HEADS, HEAD_DIM), torch.float32) for _ in range(2))
    into = Partial(out, gpu.empty((PREFILL_ROWS, HEADS), torch.float32))
    taken = kernels_s(gpu, lambda: gpu.ops.prefill_attention(q, cached, keys, 0.1, into))
    return 4 * HEAD_DIM * HEADS * PREFILL_ROWS * (PREFILL_ROWS + (PREFILL_ROWS + 1) / 2) / taken


class Together(NamedTuple):
    """Rates of CPU work and of copies to the GPU side by side, each as a share of its rate alone."""

    cpu: float
    copies: float


def slowdowns(gpu: Any, ops: CpuKernels, h2d_bytes_per_s: float) -> tuple[Together, Together]:
    """How copies and CPU work slow each other: a one-row linear, and attention over the cache."""
    memory = host_memory(beyond_caches(SWEEP_BYTES))
    weight, pages = packed("bf16", memory), kv_pages("bf16", HEAD_DIM, memory)
    return (
        shares_together(gpu, linear_call(ops, weight, "bf16", 1), h2d_bytes_per_s),
        shares_together(gpu, decode_call(ops, pages, HEADS // KV_HEADS, HEAD_DIM), h2d_bytes_per_s),
    )


def streaming_pays(together: Together, cpu_bytes_per_s: float, h2d_bytes_per_s: float) -> bool:
    """Whether a CPU lane and copies read more of DRAM side by side than the CPU lane reads alone."""
    both = cpu_bytes_per_s * together.cpu + h2d_bytes_per_s * together.copies
    return both >= LEAST_GAIN * cpu_bytes_per_s


def shares_together(gpu: Any, work: Callable[[], object], h2d_bytes_per_s: float) -> Together:
    """CPU work while copies to the GPU run all along, in turns with each alone; shares of at most 1.

    The work ends before the copies do; what is then left of them tells how far they had come beside it.
    """
    host, device = (make((COPY_BYTES[2],), torch.uint8) for make in (lambda *a: gpu.host(*a, True), gpu.empty))
    alone_s = _clock(gpu, work)
    # Three times what the work takes alone: even half as fast it ends while copies run.
    count = max(2, int(3 * alone_s * h2d_bytes_per_s / host.nbytes) + 1)

    def copy_all() -> None:
        for _ in range(count):
            gpu.copy(device, host)

    shares = []
    for _ in range(REPETITIONS):
        alone_s, copies_s = _clock(gpu, work), gpu.seconds(copy_all)
        copy_all()
        beside_s, left_s = _clock(gpu, work), _clock(gpu, gpu.synchronize)
        shares.append(Together(alone_s / beside_s, max(LEAST_SHARE, copies_s - left_s) / beside_s))
    return Together(*(min(1.0, statistics.median(part)) for part in zip(*shares, strict=True)))


def _clock(gpu: Any, work: Callable[[], object]) -> float:
    started = gpu.now()
    work()
    return gpu.now() - started


def _median(gpu: Any, work: Callable[[], object]) -> float:
    """Median GPU time of one call, warmed up."""
    work()
    return statistics.median(gpu.seconds(work) for _ in range(REPETITIONS))
