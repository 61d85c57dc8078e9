"""The parts of `gpu_offload.py`: tests, hand-overs, the profile, whole models alone and beside their peers."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_kernel_parts import attention_kernels, linear_kernel, median_seconds
from gpu_run import Part, Run
from random_checkpoint import MODEL_FILE, SHAPES, Shape, header_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARES = (0.75, 0.5, 0.25)
DRAWN_VALUES = 4_000_037  # a prime, so that no two rows of a matrix are equal
HOPS = 64  # as many as a token of 32 layers makes with two a layer
LARGE_SHAPES = {
    "8b": replace(SHAPES["llama-3.2-1b"], hidden_size=4096, num_layers=32, head_dim=128, intermediate_size=14_336),
    "30b": replace(
        SHAPES["llama-3.2-1b"], hidden_size=6656, num_layers=24, num_heads=52, num_kv_heads=4, head_dim=128,
        intermediate_size=17_920, vocab_size=32_000,
    ),
    "tiny": replace(SHAPES["tiny"], max_positions=2048),
}  # fmt: skip



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
    for dtype in ("q4",) if run.quick else ("q4", "bf16"):
        yield f"offload {shape} {dtype}", offload(shape, dtype, shares, prompts, 1024)
    for share in shares:
        yield f"llama.cpp {shape} q4 {share:.0%}", llama_cpp(shape, share)
        yield f"accelerate {shape} bf16 {share:.0%}", accelerate(shape, share)
    for context in (512,) if run.quick else (16_384, 65_536):
        yield f"context {shape} q4 {context}", offload(shape, "q4", (0.5,), (), context)
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
                device.copy(host[0], there[0], device.compute)
                handover.submit(lambda: None, True)
                handover.order_device()
                device.copy(there[1], host[1], device.compute)

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
            handover.join()
            device.synchronize(device.record(device.compute))

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
        from hetero_attn import LLM

        started, path = time.monotonic(), checkpoint(run, shape)
        written = time.monotonic()
        llm = LLM(
            path, gpu_memory=cap_bytes(shape, dtype, shares[0], run.quick), dtype=dtype, device=run.device,
            max_context=max((context, *(prompt + 1 for prompt in prompts))), max_batch=1, progress=False,
            elastic=len(shares) > 1,
        )  # fmt: skip
        with llm:
            loaded = time.monotonic()
            for share in shares:
                if share != shares[0]:
                    llm.resize(cap_bytes(shape, dtype, share, run.quick))
                name = f"offload {shape} {dtype} {share:.0%} @ {context}"
                run.write(name, **measured(run, llm, prompts, context, name.replace(" ", "-").replace("%", "")))
        return {"checkpoint_s": written - started, "load_s": loaded - written}

    return measure


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
        "refused_pins": sorted(device.refused_kinds),
        "plan": llm.plan.table(),
        "trace": trace.name,
    }


def accelerate(shape: str, share: float) -> Callable[[Run], dict[str, Any]]:
    """transformers with accelerate's device_map under the same cap: decode and a prompt of 512, bf16."""

    def measure(run: Run) -> dict[str, Any]:
        import transformers

        cap = cap_bytes(shape, "bf16", share, run.quick)
        placed = {"device_map": "auto", "max_memory": {0: cap, "cpu": "100GiB"}} if run.device != "emulated" else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint(run, shape), dtype=torch.bfloat16, **placed
        ).eval()
        prompt = torch.ones((1, 16 if run.quick else 512), dtype=torch.long, device=model.device)
        tokens = 2 if run.quick else 8

        def generate(count: int) -> None:
            with torch.inference_mode():
                model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

        generate(1)
        first, all_tokens = (median_seconds(lambda count=count: generate(count), 1) for count in (1, 1 + tokens))
        return {"prefill_tokens_per_s": prompt.numel() / first, "decode_tokens_per_s": tokens / (all_tokens - first)}

    return measure


def llama_cpp(shape: str, share: float) -> Callable[[Run], dict[str, Any]]:
    """llama-bench, Q4_0, with as many layers on the GPU as fit the same cap; reports the best of three counts."""

    def measure(run: Run) -> dict[str, Any]:
        if run.llama_bench is None:
            return {"skipped": "no --llama-bench"}
        gguf = run.work_dir / f"{shape}-q4_0.gguf"
        if not gguf.exists():
            command = [sys.executable, HERE / "random_checkpoint.py", "gguf", checkpoint(run, shape), gguf]
            subprocess.run([*map(str, command), "--type", "Q4_0"], check=True)
        layers = LARGE_SHAPES[shape].num_layers
        fitting = int(layers * share)
        rows = []
        for count in sorted({max(0, fitting - 1), fitting, min(layers, fitting + 1)}):
            command = [run.llama_bench, "-m", gguf, "-ngl", count, "-p", 512, "-n", 64, "-o", "json"]
            answer = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
            if answer.returncode == 0:
                rows += [
                    {"ngl": count, "n_prompt": row["n_prompt"], "tokens_per_s": row["avg_ts"]}
                    for row in json.loads(answer.stdout)
                ]
        return {"rows": rows}

    return measure


def make_device(run: Run) -> Any:
    """A small device for the hand-overs."""
    from hetero_attn.devices import CudaDriver, Device, EmulatedDriver
    from hetero_attn.devices.machine import device_index

    emulated = run.device == "emulated"
    return Device(EmulatedDriver() if emulated else CudaDriver(device_index(run.device), 1 << 20, 1 << 28))


def cap_bytes(shape: str, dtype: str, share: float, quick: bool = False) -> int:
    """The GPU budget that leaves room for `share` of the weights beside what else must be there."""
    from placement.hardware import WEIGHT_BYTES

    dims = [size for size in LARGE_SHAPES[shape].tensors().values() if len(size) == 2]
    weights = sum(rows * columns for rows, columns in dims) * WEIGHT_BYTES[dtype]
    fixed = 64 << 20 if quick else 2 << 30  # context, temporaries, activations, cache
    return int(share * weights) + fixed


def checkpoint(run: Run, shape: str) -> Path:
    """A checkpoint of the shape, made on first use: the values of one layer serve for all, so it takes seconds."""
    directory = run.work_dir / shape
    if not (directory / MODEL_FILE).exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(LARGE_SHAPES[shape].config(), indent=2))
        write_repeated(LARGE_SHAPES[shape], directory / MODEL_FILE)
    return directory


def write_repeated(shape: Shape, path: Path) -> None:
    """One safetensors file; tensors of equal shape hold equal values."""
    generator, made = np.random.Generator(np.random.SFC64(0)), {}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(header_of(shape))
        for dims in shape.tensors().values():
            if dims not in made:
                made[dims] = random_bits(generator, dims)
            made[dims].tofile(file)
    partial.rename(path)


def random_bits(generator: np.random.Generator, dims: tuple[int, ...]) -> np.ndarray:
    """bf16 values of variance 1 / columns, some megabytes of them over and over; ones for norms."""
    if len(dims) == 1:
        return np.full(dims, 0x3F80, dtype=np.uint16)
    values = generator.random(DRAWN_VALUES, dtype=np.float32)
    values -= 0.5
    values *= np.float32((12 / dims[1]) ** 0.5)
    return np.resize((values.view(np.uint32) >> 16).astype(np.uint16), dims)
