"""Python's time to queue a layer of a prompt: the runtime's own code and wrappers, compiled kernels that launch nothing.

Triton compiles for a GPU that is not there; a launcher that returns at once stands in for CUDA's, and the streams and
events are the fakes of `fake_cuda`, whose queues take everything. Torch's small calls run on toy tensors on the CPU, where
they cost about what queueing them costs. So a run times what the calling thread does, and counts it.

    python -m tests.support.queueing        prints microseconds a layer, and a launch by Triton's way and by kept forms
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver as triton_driver

from cpu_kernels import CpuKernels
from gpu_kernels.device_ops import DeviceOps
from hetero_attn.devices import Device
from hetero_attn.engine.build import assemble, connect
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from placement.machine.hardware import HardwareProfile
from tests.support.ahead_of_time import _NamedTarget
from tests.support.fake_cuda import fake_driver
from tests.support.runtime import THREADS, toy_workload, uniform_plan
from tests.support.toy import make_checkpoint

LAYERS, ROWS, REPETITIONS = 8, 128, 9
SHAPE = {"layers": LAYERS, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "hidden": 256, "intermediate": 768}


@contextmanager
def launches_stubbed(seen: Counter | None = None) -> Iterator[None]:
    """Kernels are compiled, once, and their launches return at once; `seen` counts them by name."""

    def launch(kernel: Any, *arguments: Any) -> None:
        if seen is not None:
            seen[kernel.name] += 1

    def run(kernel: Any) -> Any:
        return lambda *arguments: launch(kernel, *arguments)

    active = triton_driver._active
    triton_driver.set_active(_NamedTarget(90))
    try:
        no_handles = mock.patch.object(CompiledKernel, "_init_handles", lambda kernel: None)
        with mock.patch.object(CompiledKernel, "run", property(run)), no_handles, products_stubbed():
            yield
    finally:
        triton_driver._active = active


def products_stubbed() -> Any:
    """Products multiply a single row: on a CPU they would take far longer than queueing them does."""
    from gpu_kernels import linear_layer

    if hasattr(linear_layer, "_product"):
        product = linear_layer._product
        return mock.patch.object(
            linear_layer, "_product", lambda x, dense, out, *how: product(x[:1, :64], dense[:, :64], out[:1], *how)
        )
    product = linear_layer._dense_product
    return mock.patch.object(
        linear_layer, "_dense_product", lambda x, dense: product(x[:1, :64], dense[:, :64]).expand(len(x), -1)
    )


@contextmanager
def prompt_engine(folder: Path) -> Iterator[Any]:
    """A toy of quantised weights, half at home on the GPU and half streamed in a few pieces, kernels as on CUDA."""
    path = make_checkpoint(folder, "llama", **SHAPE)
    workload = toy_workload(path, "q4", max_context=512, page_size=64, prefill_chunk=ROWS, max_batch=1)
    workload = replace(workload, staging_piece_bytes=64 << 10) if hasattr(workload, "staging_piece_bytes") else workload
    plan = uniform_plan(workload, 0.5, 0.5, 2, gpu_tokens=workload.full_tokens)
    fake = fake_driver(plan.gpu_memory_bytes + (1 << 20))
    fake.fake.current._queue.maxsize = 0
    device = Device(fake, plan.gpu_memory_bytes)
    for stream in (device.compute, device.copies):
        stream._queue.maxsize = 0
    lanes = connect(plan, CpuKernels(THREADS), device, ThreadPoolExecutor(1), "flags")
    profile = HardwareProfile.named("emulated")
    engine = assemble(PlannedModel(path, ModelConfig.from_dir(path), "q4", "cuda", profile, plan), lanes)
    device.ops = fake.ops = DeviceOps("cpu")
    try:
        yield engine
    finally:
        engine.close()
        fake.fake.stop()


def queueing_s(engine: Any) -> float:
    """Seconds that queueing one layer of a prompt's chunk takes, the best of some: disturbances only add."""
    times, sequence = [], engine.kv_cache.open()
    for _ in range(REPETITIONS):
        started = time.thread_time()
        engine.prefill(sequence, range(10, 10 + ROWS), logits=False)
        times.append((time.thread_time() - started) / LAYERS)
        engine.kv_cache.rewind(sequence, 0)
    engine.kv_cache.close(sequence)
    return min(times[1:])


def main() -> None:
    """Print the figures."""
    seen: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder, launches_stubbed(seen), prompt_engine(Path(folder)) as engine:
        layer_s = queueing_s(engine)
    kernels = {name: count / REPETITIONS / LAYERS for name, count in seen.items()}
    print(f"queueing a layer: {1e6 * layer_s:.0f} us; {sum(kernels.values()):.1f} kernels, {kernels}")
    print(f"a launch: {1e6 * launch_s():.1f} us")


def launch_s() -> float:
    """Seconds of one launch of a kernel with eight arguments, as the wrappers make it."""
    from gpu_kernels.elementwise import rms_norm

    x, weight = torch.zeros(4, 256), torch.zeros(256)
    with launches_stubbed():
        rms_norm(x, weight, 1e-6, x)
        times = []
        for _ in range(9):
            started = time.thread_time()
            for _ in range(200):
                rms_norm(x, weight, 1e-6, x)
            times.append((time.thread_time() - started) / 200)
    return statistics.median(times)


if __name__ == "__main__":
    main()
