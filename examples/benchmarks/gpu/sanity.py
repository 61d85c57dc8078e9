"""The first minute of `gpu_offload.py`: does the GPU compute what it should, do GPU and host wait as they should?"""

import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .checkpoints import checkpoint
from .kernel_parts import median_seconds, tensor_device
from .run import Run

ROOT = Path(__file__).resolve().parents[3]
HOPS = 100  # of a step
FLOATS = 4096  # 16 KiB each way
BUSY_BYTES, BUSY_COPIES = (16 << 20, 16)  # 5 ms of copies beside the 2 ms of a step's hops
QUEUED = 4096  # launches, four times what a stream takes before it blocks who launches
RELEASE_S, WORKER_S = 3.0, 0.5
TOY_NMSE = 5e-4  # of bf16 weights, as tests/gpu_kernels allow
TOY_STEPS = 6
SHARED = 'rules:\n  - {match: "layers.*.kv", kv: {gpu_heads: 1}}\n  - {match: "*", gpu: 0.4, stream: 0.3, cpu: 0.3}\n'


def kernels(run: Run) -> dict[str, Any]:
    """Every op once against float64, in the shapes of a large model; raises once all have run if any was wrong."""
    sys.path.insert(0, str(ROOT))
    from tests.support.kernels import kernel_checks as checks

    device, ops = tensor_device(run)
    bf16, dense = torch.bfloat16, checks.DENSE_NMSE
    calls: dict[str, Callable[[], None]] = {
        "linear q4, 1 row": partial(checks.check_linear, ops.linear, device, "q4", 1, 8, 4096),
        "linear q4, 16 rows": partial(checks.check_linear, ops.linear, device, "q4", 16, 8, 1024),
        "linear q4, 130 rows": partial(checks.check_linear, ops.linear, device, "q4", 130, 8, 1024, tolerance=dense),
        "linear q4, 130 rows added": partial(
            checks.check_linear, ops.linear, device, "q4", 130, 8, 1024, accumulate=True, tolerance=dense
        ),
        "decode_attention": partial(
            checks.check_decode, ops.decode_attention, device, bf16, 2, 4, 128, 64, 320, [(0, 320)]
        ),
        "prefill_attention": partial(
            checks.check_prefill, ops.prefill_attention, device, bf16, 70, 1, 4, 128, 64, 0, 98, 28, 0
        ),
        "merge": partial(checks.check_merge, ops.merge, device, 3, (4, 4, 128), [2]),
        "rms_norm": partial(checks.check_rms_norm, ops.rms_norm, device, 3, 4096),
        "rope_append": partial(checks.check_rope_append, ops.rope_append, device, bf16, 2, 4, 128, 128, (False, False)),
        "gelu_mul": partial(checks.check_gelu_mul, ops.gelu_mul, device, 3, 8),
        "silu_mul": partial(checks.check_silu_mul, ops.silu_mul, device, 3, 8),
        "add_rows": partial(checks.check_add_rows, ops.add_rows, device, 2, 4096),
        "copy_rows": partial(checks.check_copy_rows, ops.copy_rows, device, 2, 4096),
    }
    seconds, wrong = {}, {}
    for name, check in calls.items():
        started = time.perf_counter()
        try:
            check()
        except Exception as error:  # the others are worth knowing too
            wrong[name] = f"{type(error).__name__}: {error}"[:500]
        seconds[name] = round(time.perf_counter() - started, 2)
    if wrong:
        raise RuntimeError(f"wrong or failed: {wrong}; seconds: {seconds}")
    return {"seconds": seconds}


def toy_model(run: Run) -> dict[str, Any]:
    """A tiny model on three lanes, decoded through captured steps, beside the CPU lane alone."""
    from hetero_attn import LLM
    from placement import Policy

    path, ids = checkpoint(run, "tiny"), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    common = {"dtype": "bf16", "max_context": 256, "max_batch": 1, "num_threads": 2, "progress": False}
    logits, names = {}, {}
    for device in (run.device, "cpu"):
        placed = {} if device == "cpu" else {"policy": Policy.parse(SHARED, "shared"), "gpu_memory": "2GiB"}
        with LLM(path, device=device, **placed, **common) as llm:
            engine = llm.engine
            sequence = engine.kv_cache.open()
            rows = [engine.prefill(sequence, ids)]
            rows += [engine.decode_step([sequence], [7 + step])[0] for step in range(TOY_STEPS)]
            logits[device], names[device] = (
                torch.stack([row.float().cpu() for row in rows]),
                engine.lanes.handover.name,
            )
            engine.kv_cache.close(sequence)
    error = logits[run.device] - logits["cpu"]
    nmse = float((error.square().mean() / logits["cpu"].square().mean()).item())
    if not nmse < TOY_NMSE:
        raise RuntimeError(f"NMSE of the logits is {nmse:g}, more than {TOY_NMSE:g}; hand-over {names[run.device]}")
    return {"nmse": nmse, "handover": names[run.device]}


def hops(run: Run, name: str, busy: bool) -> dict[str, Any]:
    """Microseconds of a hop: 16 KiB to the host, a job, 16 KiB back; HOPS of them in a step.

    The mean is of empty programs of the thread team (captured) or empty jobs. p50 and p95 are the times from one job to
    the next, where each is a Python function that looks at the clock. busy: copies run to the GPU meanwhile.
    """
    from cpu_kernels import CpuKernels
    from hetero_attn.lanes.flag_handover import FlagHandover
    from hetero_attn.lanes.handover import EventHandover

    stamps: list[float] = []
    with (
        closing(make_device(run)) as device,
        CpuKernels(2) as kernels,
        ThreadPoolExecutor(1) as worker,
        device.current(),
    ):
        host, there = (make((2, FLOATS), torch.float32, "activations") for make in (device.host_empty, device.empty))
        source, target = (make((BUSY_BYTES,), torch.uint8, "weights") for make in (device.host_empty, device.empty))
        captures = name == "graph"
        handover = (
            EventHandover(device, worker) if name == "events" else FlagHandover(device, worker, kernels, captures)
        )

        def queue(job: Callable[[], None]) -> None:
            for _ in range(HOPS):
                device.copy(host[:1], there[:1], device.compute)
                handover.submit(job, True)
                handover.order_device()
                device.copy(there[1:], host[1:], device.compute)

        def step(job: Callable[[], None], ops_only: bool) -> Callable[[], None]:
            """Run once, plainly, as a model's first step does; then ready to be timed."""
            queue(job)
            settle()
            work = partial(queue, job)
            if captures:
                with handover.record(ops_only=ops_only) as jobs, device.capture() as graph:
                    queue(job)
                work = partial(_replay, handover, jobs, graph)

            def settled() -> None:
                if busy:
                    for _ in range(BUSY_COPIES):
                        device.copy(target, source, device.copies)
                work()
                settle()

            return settled

        def settle() -> None:
            handover.join()
            for stream in (device.compute, device.copies):
                device.synchronize(device.record(stream))

        def stamp() -> None:
            stamps.append(time.perf_counter())

        empty, stamped = step(_nothing, True), step(stamp, False)
        hop_s = None if busy else median_seconds(empty, 3 if run.quick else 20) / HOPS
        between: list[float] = []
        for _ in range(3 if run.quick else 10):
            stamps.clear()
            stamped()
            between += [later - earlier for earlier, later in pairwise(stamps)]
    between.sort()
    return {
        "us_per_hop": hop_s and 1e6 * hop_s,
        "p50_us": 1e6 * statistics.median(between),
        "p95_us": 1e6 * between[int(0.95 * len(between))],
        "most_us": 1e6 * between[-1],
        "hops": len(between),
    }


def full_queue(run: Run, by: str) -> dict[str, Any]:
    """Launches far beyond what a stream takes, queued behind a wait of the GPU that a worker has to end.

    by: `flags`, the worker waits for a flag that the GPU set, as the runtime's; `events`, it waits in the driver for
    an event long reached. Somebody else ends the GPU's wait after RELEASE_S, and that says that the worker was stuck.
    """
    if not run.has_gpu:
        return {"skipped": "an emulated GPU runs its work at once, so no queue is ever full"}
    from cpu_kernels import CpuKernels

    found: dict[str, Any] = {}
    with closing(make_device(run)) as device, CpuKernels(1) as host_ops, device.current():
        flags = device.host_empty((2, 16), torch.int64, "flags").zero_()
        request, done = flags[0, :1], flags[1, :1]
        numbers = torch.zeros(64, device=run.device)
        numbers.add_(1)
        event = device.record(device.compute)
        device.synchronize(event)
        host_ops.set_flag(flags[0, 1:2], 1)  # both compile, if nobody has asked yet
        host_ops.await_flag(flags[0, 1:2], 1, RELEASE_S)
        device.write_flag(request, 1)
        device.wait_flag(done, 1, exactly=True)
        started = time.perf_counter()

        def serve() -> None:
            time.sleep(WORKER_S)
            if by == "events":
                device.synchronize(event)
            else:
                host_ops.await_flag(request, 1, RELEASE_S)
            host_ops.set_flag(done, 1)
            found["worker_s"] = time.perf_counter() - started

        def release() -> None:
            found["released"] = "worker_s" not in found
            done.fill_(1)

        worker, timer = (threading.Thread(target=serve, daemon=True), threading.Timer(RELEASE_S, release))
        worker.start()
        timer.start()
        for _ in range(QUEUED):
            numbers.add_(1)
        found["queued_s"] = time.perf_counter() - started
        device.synchronize(device.record(device.compute))
        found["ended_s"] = time.perf_counter() - started
        worker.join()
        timer.cancel()
        right = bool((numbers == QUEUED + 1).all())
    return {"ended_unaided": not found.pop("released", False), "right": right, **found}


def make_device(run: Run) -> Any:
    """A small device for the hand-overs."""
    from hetero_attn.devices import CudaDriver, Device, EmulatedDriver
    from hetero_attn.devices.machine import device_index

    return Device(CudaDriver(device_index(run.device), 1 << 26, 1 << 28) if run.has_gpu else EmulatedDriver())


def _replay(handover: Any, jobs: Any, graph: Any) -> None:
    handover.replay(jobs)
    graph.replay()


def _nothing() -> None:
    """A job without work."""
