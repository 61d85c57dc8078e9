"""Python's processor time to queue one layer of a prompt for the GPU, on a machine without one.

    python examples/benchmarks/simulated/launches.py [--chunks 6] [--json]

A toy model, cut over GPU and stream as an 8B model is, runs its prompts on the CUDA driver's own code; kernels are
compiled for an H100, but their launcher, the driver library, streams and products do nothing. What is left is Python,
and torch's own calls. A second run counts launches and times the operations one by one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from cpu_kernels import CpuKernels
from hetero_attn.devices import CudaDriver, Device
from hetero_attn.devices.libcuda import LibCuda
from hetero_attn.engine.build import assemble, connect
from hetero_attn.engine.engine import Engine
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Means, Plan, build_plan
from placement.plan.workload import row_tier
from tests.support.gpu.silent_triton import Launches, silent_triton
from tests.support.models.runtime import toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint

ARCHITECTURE = 90
LAYERS = 4
PIECES = {"qkv": 1, "o": 1, "gate_up": 5, "down": 3}  # in which the streamed half arrives, as of an 8B model's layer
CHUNK = 80  # rows: more than the kernels for few rows take, few enough that torch's own copies take no time
REPETITIONS = 30


class SilentCuda:
    """`torch.cuda` whose streams and events do nothing."""

    stand_in = "cpu"

    def __init__(self) -> None:
        self._stream = SimpleNamespace(cuda_stream=1, wait_event=lambda event: None)

    def Stream(self, device: int) -> Any:
        """Streams differ by their handle alone."""
        return SimpleNamespace(cuda_stream=2, wait_event=lambda event: None)

    def Event(self, enable_timing: bool = False) -> Any:
        """An event that is reached."""
        return SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)

    def device(self, index: int) -> Any:
        """There is one device."""
        return nullcontext()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Kernels go to the stream."""
        before, self._stream = self._stream, stream
        yield
        self._stream = before

    def current_stream(self, index: int) -> Any:
        """Where kernels go."""
        return self._stream

    def synchronize(self) -> None:
        """Nothing runs."""

    def memory_reserved(self, index: int) -> int:
        """Nothing."""
        return 0

    def mem_get_info(self, index: int) -> tuple[int, int]:
        """(free, total)."""
        return 1 << 33, 1 << 33

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        """No limit."""

    def empty_cache(self) -> None:
        """Nothing is cached."""


class SilentLibrary:
    """libcuda whose calls succeed and do nothing, except that the address of host memory is its own."""

    def __getattr__(self, name: str) -> Any:
        function = _SilentFunction(name.startswith("cuMemHostGetDevicePointer"))
        setattr(self, name, function)
        return function


class _SilentFunction:
    def __init__(self, gives_address: bool) -> None:
        self._gives_address = gives_address

    def __call__(self, *arguments: Any) -> int:
        if self._gives_address:
            ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_uint64))[0] = arguments[1]
        return 0


@contextmanager
def silent_products(linear_layer: Any) -> Iterator[None]:
    """Let products be one call of torch each that multiplies nothing."""
    product = linear_layer._product
    linear_layer._product = lambda x, dense, out, accumulate, in_place: out.view_as(out)
    try:
        yield
    finally:
        linear_layer._product = product


@contextmanager
def queueing_engine(plan_of: Any, folder: Path) -> Iterator[Engine]:
    """A toy model of LAYERS layers on the silent device."""
    path = make_checkpoint(
        folder, "llama", layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=64, hidden=128, intermediate=512
    )
    plan = plan_of(toy_workload(path, "q4", page_size=16, prefill_chunk=CHUNK, max_context=8 * CHUNK, max_batch=1))
    driver = CudaDriver(0, plan.gpu_memory_bytes + (1 << 20), 1 << 20, SilentCuda(), LibCuda(SilentLibrary()))
    lanes = connect(plan, CpuKernels(1), Device(driver, plan.gpu_memory_bytes), None)
    planned = PlannedModel(path, ModelConfig.from_dir(path), "q4", "cuda", HardwareProfile.named("emulated"), plan)
    engine = assemble(planned, lanes)
    for linear in engine.weights.linears[:-1]:
        streamed = linear.dram.shape[0] // 2
        linear.piece_blocks = max(1, -(-streamed // PIECES[linear.spec.name.rsplit(".", 1)[-1]]))
    try:
        yield engine
    finally:
        engine.close()


def prompt_plan(workload: Any) -> Plan:
    """Half of every linear at home, half streamed; a part of the cache stays on the GPU."""
    plan = uniform_plan(workload, gpu=0.5, stream=0.5, gpu_kv_heads=2, gpu_tokens=3 * CHUNK)
    return build_plan(workload, plan.linears, plan.kv, Means(device="cuda", gpu_memory_bytes=64 << 20, num_threads=1))


def time_chunks(engine: Engine, chunks: int) -> list[float]:
    """Seconds for which the layers of each chunk of a prompt are queued."""
    seconds, layers = [], engine.forward.layers

    def timed(step: Any) -> None:
        started = time.thread_time()
        layers(step)
        seconds.append(time.thread_time() - started)

    engine.forward.layers = timed
    sequence = engine.kv_cache.open()
    for _ in range(chunks):
        engine.prefill(sequence, [1] * CHUNK, logits=False)
    engine.kv_cache.close(sequence)
    engine.forward.layers = layers
    return seconds


class TimedOps:
    """Operations of a device, each timed and its Triton launches counted."""

    def __init__(self, ops: Any, launches: Launches) -> None:
        self._ops, self._launches = ops, launches
        self.calls: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0])

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._ops, name)

        def timed(*arguments: Any) -> Any:
            launched, started = self._launches.count, time.thread_time()
            result = op(*arguments)
            row = self.calls[name]
            row[0] += 1
            row[1] += time.thread_time() - started
            row[2] += self._launches.count - launched
            return result

        return timed


def measure(chunks: int, repetitions: int) -> dict[str, Any]:
    """Microseconds a layer of the first chunk and of the last, the least of some runs, and the ops of both."""
    from gpu_kernels import linear_layer

    with (
        silent_products(linear_layer),
        tempfile.TemporaryDirectory() as folder,
        silent_triton(ARCHITECTURE) as launches,
        queueing_engine(prompt_plan, Path(folder)) as engine,
    ):
        time_chunks(engine, chunks)
        runs = [time_chunks(engine, chunks) for _ in range(repetitions)]
        least = [min(each) * 1e6 / LAYERS for each in zip(*runs, strict=True)]
        first_layer = [linear for linear in engine.weights.layer_linears if linear.spec.layer == 0]
        pieces = sum(len([*linear.pieces(row_tier(CHUNK))]) for linear in first_layer)
        found = {"streamed_pieces": pieces, "us_per_layer": {"first chunk": least[0], "last chunk": least[-1]}}
        for name, chunk in (("first chunk", 0), ("last chunk", chunks - 1)):
            found[name] = operations(engine, launches, chunk)
    return found


def operations(engine: Engine, launches: Launches, chunk: int) -> dict[str, Any]:
    """Calls and launches a layer and microseconds a call of every op in a chunk of a prompt; launches of all of
    them."""
    device, sequence = engine.lanes.device, engine.kv_cache.open()
    for _ in range(chunk):
        engine.prefill(sequence, [1] * CHUNK, logits=False)
    plain, timed = device.ops, TimedOps(device.ops, launches)
    device.ops = timed
    engine.prefill(sequence, [1] * CHUNK, logits=False)
    device.ops = plain
    engine.kv_cache.close(sequence)
    found = {
        op: {"calls": calls / LAYERS, "launches": launched / LAYERS, "us": 1e6 * seconds / calls}
        for op, (calls, seconds, launched) in sorted(timed.calls.items())
    }
    return found | {"launches": sum(row["launches"] for row in found.values())}


def show(found: dict[str, Any], console: Console) -> None:
    """Print one table for each chunk."""
    for name, microseconds in found["us_per_layer"].items():
        table = Table("op", "calls a layer", "launches a layer", "us a call", title=name)
        for op, row in found[name].items():
            if op != "launches":
                table.add_row(op, f"{row['calls']:.1f}", f"{row['launches']:.1f}", f"{row['us']:.1f}")
        console.print(table)
        launches = found[name]["launches"]
        console.print(
            f"{name}: {microseconds:.0f} us a layer, {launches:.1f} launches, {microseconds / launches:.1f} us a launch"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=6, help="of the prompt; older ones leave the GPU")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.chunks, arguments.repetitions)
    print(json.dumps(found, indent=1)) if arguments.json else show(found, Console())


if __name__ == "__main__":
    main()
