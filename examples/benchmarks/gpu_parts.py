"""The parts of `gpu_offload.py`: tests, hand-overs, the profile, whole models alone and beside their peers."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_checkpoints import cap_bytes, checkpoint
from gpu_kernel_parts import attention_kernels, linear_kernel, median_seconds
from gpu_peers import accelerate, llama_cpp, llama_cpp_depths
from gpu_run import Part, Run

ROOT = Path(__file__).resolve().parents[2]
SHARES = (0.75, 0.5, 0.25)
HOPS = 64  # as many as a token of 32 layers makes with two a layer


def parts(run: Run) -> Iterator[Part]:
    """Every measurement with its name, most wanted first."""
    if not run.quick:
        yield "tests", gpu_tests
    for handover in ("events", "flags", "graph"):
        yield f"handover {handover}", lambda run, handover=handover: hop(run, handover)
    yield "profile", profile
    for dtype in ("bf16", "q8", "q4"):
        yield f"kernel linear {dtype}", lambda run, dtype=dtype: linear_kernel(run, dtype)
    yield "kernel attention", attention_kernels
    shape, shares = ("tiny", SHARES[1:2]) if run.quick else ("8b", SHARES)
    prompts = (16, 64) if run.quick else (512, 4096)
    depths = (128,) if run.quick else (1024, 4096, 16_384)
    yield f"offload {shape} q4", offload(shape, "q4", shares, prompts, 1024)
    for share in shares:
        yield f"llama.cpp {shape} q4 {share:.0%}", llama_cpp(shape, share)
    yield f"depth {shape} q4", depth(shape, "q4", shares[-2:], depths if run.quick else (0, *depths, 65_536))
    for share in shares[-2:]:
        yield f"llama.cpp depth {shape} q4 {share:.0%}", llama_cpp_depths(shape, share, depths)
    if not run.quick:
        yield f"offload {shape} bf16", offload(shape, "bf16", shares, prompts, 1024)
    for share in shares:
        yield f"accelerate {shape} bf16 {share:.0%}", accelerate(shape, share)
    if not run.quick:
        yield "large 30b q4", offload("30b", "q4", SHARES, (512,), 1024)


def gpu_tests(run: Run) -> dict[str, Any]:
    """The tests that need a GPU; once more under compute-sanitizer's race check where that is installed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(60, run.time_left_s))
    (run.out / "tests.txt").write_text(tests.stdout + tests.stderr)
    found = {"returncode": tests.returncode, "summary": tests.stdout.strip().splitlines()[-1:]}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return found | {"racecheck": "compute-sanitizer is not installed"}
    races = subprocess.run(
        [sanitizer, "--tool", "racecheck", *command, "-k", "decode or merge"], cwd=ROOT, capture_output=True, text=True,
        timeout=max(60, min(180, run.time_left_s)),
    )  # fmt: skip
    return found | {"racecheck": races.stdout.strip().splitlines()[-1:]}


def hop(run: Run, name: str) -> dict[str, Any]:
    """Microseconds of one hop: 16 KiB to the host, an empty job, 16 KiB back; HOPS of them in a step.

    The first step runs plainly, as a model's does: kernels are compiled, and flags made for as many jobs.
    """
    from cpu_kernels import CpuKernels
    from hetero_attn.flag_handover import FlagHandover
    from hetero_attn.handover import EventHandover

    device = make_device(run)
    floats = 4096
    host, there = (make((2, floats), torch.float32, "activations") for make in (device.host_empty, device.empty))
    with CpuKernels(2) as kernels, ThreadPoolExecutor(1) as worker, device.current():
        captures = name == "graph"
        handover = (
            EventHandover(device, worker) if name == "events" else FlagHandover(device, worker, kernels, captures)
        )

        def queue() -> None:
            for _ in range(HOPS):
                device.copy(host[:1], there[:1], device.compute)
                handover.submit(lambda: None, True)
                handover.order_device()
                device.copy(there[1:], host[1:], device.compute)

        def settle() -> None:
            handover.join()
            device.synchronize(device.record(device.compute))

        queue()
        settle()
        step = queue
        queue()
        handover.join()
        device.synchronize(device.record(device.compute))
        if captures:
            with handover.record(ops_only=True) as jobs, device.capture() as graph:
                queue()

            def step() -> None:
                handover.replay(jobs)
                graph.replay()

        def settled() -> None:
            step()
            settle()

        seconds = median_seconds(settled, 3 if run.quick else 30)
    device.close()
    return {"us_per_hop": 1e6 * seconds / HOPS, "hops": HOPS}


def profile(run: Run) -> dict[str, Any]:
    """`hetero-attn profile`, kept for the plans."""
    if run.quick:
        return {"skipped": "quick: plans use the catalogue"}
    from hetero_attn import profile_machine

    return {"profile": profile_machine().to_dict()}


def offload(
    shape: str, dtype: str, shares: tuple[float, ...], prompts: tuple[int, ...], context: int
) -> Callable[[Run], dict[str, Any]]:
    """A model loaded once, then resized from share to share: each is a result of its own.

    A share is that of the weights' bytes which the budget holds beside what else must be on the GPU.
    """

    def measure(run: Run) -> dict[str, Any]:
        started, path = time.monotonic(), checkpoint(run, shape)
        written, longest = time.monotonic(), max((context, *(prompt + 1 for prompt in prompts)))
        llm = load(run, path, dtype, cap_bytes(shape, dtype, shares[0], run.quick), longest, len(shares) > 1)
        loaded = time.monotonic()
        for share in shares:
            name, cap = f"offload {shape} {dtype} {share:.0%} @ {context}", cap_bytes(shape, dtype, share, run.quick)
            if share != shares[0]:
                llm = resized(run, llm, name, lambda cap=cap: load(run, path, dtype, cap, longest, True), cap)
            run.write(name, **measured(run, llm, prompts, context, name.replace(" ", "-").replace("%", "")))
        llm.close()
        return {"checkpoint_s": written - started, "load_s": loaded - written}

    return measure


def load(run: Run, path: Path, dtype: str, gpu_memory: int, max_context: int, elastic: bool) -> Any:
    """An `LLM` for one sequence."""
    from hetero_attn import LLM

    return LLM(
        path,
        gpu_memory=gpu_memory,
        dtype=dtype,
        device=run.device,
        max_context=max_context,
        max_batch=1,
        progress=False,
        elastic=elastic,
    )


def resized(run: Run, llm: Any, name: str, load_anew: Callable[[], Any], gpu_memory: int) -> Any:
    """The model under another budget; where it cannot be resized, which is a result, it is loaded again."""
    from hetero_attn.errors import HeteroError

    try:
        llm.resize(gpu_memory)
        return llm
    except HeteroError as error:
        run.write(f"resize to {name}", error=str(error))
        llm.close()
        return load_anew()


def measured(run: Run, llm: Any, prompts: tuple[int, ...], context: int, name: str) -> dict[str, Any]:
    """Decode at the end of the context and each prompt from its beginning, the plan, and the lanes' timeline."""
    from hetero_attn import benchmark
    from hetero_attn.trace import trace_steps

    tokens, repetitions = (4, 1) if run.quick else (32, 3)
    reports = [benchmark.run(llm, 0, tokens, (context - tokens - 2,), repetitions)]
    reports += [benchmark.run(llm, prompt, 0, (0,), repetitions) for prompt in prompts]
    trace = run.out / f"trace-{name}.json"
    trace_steps(llm.engine, min((*prompts, 512, context - 4)), 2).save(trace)
    device = llm.engine.lanes.device
    return {
        "rows": [row for report in reports for row in report.to_dict()["rows"]],
        "table": "".join(report.table() for report in reports),
        "handover": llm.engine.lanes.handover.name,
        "gpu_memory": llm.plan.gpu_memory_bytes,
        "arena_peak_bytes": device.arena.peak_bytes,
        "reserved_bytes": torch.cuda.max_memory_reserved() if run.device.startswith("cuda") else None,
        "used_bytes": run.used_bytes,
        "refused_pins": sorted(device.refused_kinds),
        "plan": llm.plan.table(),
        "trace": trace.name,
    }


def depth(
    shape: str, dtype: str, shares: tuple[float, ...], depths: tuple[int, ...]
) -> Callable[[Run], dict[str, Any]]:
    """Decode on top of more and more tokens in the cache, most of which the cap leaves no room for on the GPU."""

    def measure(run: Run) -> dict[str, Any]:
        from hetero_attn import benchmark

        tokens = 4 if run.quick else 32
        first = cap_bytes(shape, dtype, shares[0], run.quick)
        with load(run, checkpoint(run, shape), dtype, first, max(depths) + tokens + 2, elastic=True) as llm:
            for share in shares:
                if share != shares[0]:
                    llm.resize(cap_bytes(shape, dtype, share, run.quick))
                report = benchmark.run(llm, 0, tokens, depths, 1 if run.quick else 2)
                run.write(
                    f"depth {shape} {dtype} {share:.0%}", rows=report.to_dict()["rows"], table=report.table(),
                    plan=llm.plan.table(), gpu_memory=llm.plan.gpu_memory_bytes,
                )  # fmt: skip
        return {}

    return measure


def make_device(run: Run) -> Any:
    """A small device for the hand-overs."""
    from hetero_attn.devices import CudaDriver, Device, EmulatedDriver
    from hetero_attn.devices.machine import device_index

    emulated = run.device == "emulated"
    return Device(EmulatedDriver() if emulated else CudaDriver(device_index(run.device), 1 << 20, 1 << 28))
