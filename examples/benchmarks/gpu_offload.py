"""Everything there is to learn on a GPU machine, in the order in which it is worth the time.

    python gpu_offload.py --out DIR --minutes 25
    python gpu_offload.py --out DIR --minutes 1 --device emulated --quick       the same code without a GPU; no figure counts

    a  tests       pytest -m gpu: kernels against float64, toy models on three lanes, budgets
    b  handover    microseconds of a hop by events, flags and in a captured graph
    c  profile     the machine's rates, kept for the plans that follow
    d  offload     Llama-3.1-8B shape, bf16 and q4, with 25, 50 and 75 % of the weights on the GPU, context 1k:
                   decode, prefill 512 and 4096, predicted beside measured, the lanes' timeline
    e  peers       accelerate's device_map and, with --llama-bench, llama.cpp with its best -ngl, at the same caps
    f  context     16k and 64k tokens with the cache under a cap
    g  large       a 30B-class shape, q4, with 24 of its 60 layers: what a disk of 64 GiB holds beside the rest
    h  kernels     linear and attention alone against memory bandwidth, and torch's flash attention

Every result is a line of DIR/results.jsonl, written when it is known, so a run that is cut keeps what it has; parts
already there are not repeated. A part that fails is a line with its error, and the next one begins. No part starts after
its time is up. Checkpoints are random weights made here, one layer's values for all layers; --work-dir keeps them.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import MODEL_FILE, SHAPES, Shape, header_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARES = (0.25, 0.5, 0.75)
HOPS = 64  # as many as a token of 32 layers makes with two a layer
LARGE_SHAPES = {
    "8b": replace(SHAPES["llama-3.2-1b"], hidden_size=4096, num_layers=32, head_dim=128, intermediate_size=14_336),
    "30b": replace(
        SHAPES["llama-3.2-1b"], hidden_size=6656, num_layers=24, num_heads=52, num_kv_heads=4, head_dim=128,
        intermediate_size=17_920, vocab_size=32_000,
    ),
    "tiny": replace(SHAPES["tiny"], max_positions=2048),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the script. deadline: by `time.monotonic`. quick: toy shapes and few repetitions."""

    out: Path
    work_dir: Path
    device: str
    quick: bool
    deadline: float
    llama_bench: Path | None

    @property
    def time_left_s(self) -> float:
        """Seconds until no further part may start."""
        return self.deadline - time.monotonic()

    def known(self) -> set[str]:
        """Names of results that an earlier run wrote and that did not fail."""
        path = self.out / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {line["name"] for line in map(json.loads, lines) if "error" not in line}

    def write(self, name: str, **values: Any) -> None:
        """Append one result and show it."""
        line = json.dumps({"name": name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **values})
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line if len(line) < 400 else line[:400] + " ...", flush=True)


Part = tuple[str, Callable[[Run], dict[str, Any]]]


def parts(run: Run) -> Iterator[Part]:
    """Every measurement with its name, most wanted first."""
    if not run.quick:
        yield "tests", gpu_tests
    for handover in ("events", "flags", "graph"):
        yield f"handover {handover}", lambda run, handover=handover: hop(run, handover)
    yield "profile", profile
    shape, shares = ("tiny", SHARES[1:2]) if run.quick else ("8b", SHARES)
    prompts = (16, 64) if run.quick else (512, 4096)
    for dtype in ("q4",) if run.quick else ("q4", "bf16"):
        for share in shares:
            yield f"offload {shape} {dtype} {share:.0%}", offload(shape, dtype, share, prompts, context=1024)
    for share in shares:
        yield f"accelerate {shape} bf16 {share:.0%}", accelerate(shape, share)
        yield f"llama.cpp {shape} q4 {share:.0%}", llama_cpp(shape, share)
    for context in (512,) if run.quick else (16_384, 65_536):
        yield f"context {shape} q4 {context}", offload(shape, "q4", 0.5, (), context=context, depth=context - 256)
    if not run.quick:
        for share in shares:
            yield f"large 30b q4 {share:.0%}", offload("30b", "q4", share, (512,), context=1024)
    for dtype in ("bf16", "q8", "q4"):
        yield f"kernel linear {dtype}", lambda run, dtype=dtype: linear_kernel(run, dtype)
    yield "kernel attention", attention_kernels


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
    """Microseconds of one hop: 16 KiB to the host, an empty job, 16 KiB back; HOPS of them in a step."""
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
        if captures:
            with handover.record() as jobs, device.capture() as graph:
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
    shape: str, dtype: str, share: float, prompts: tuple[int, ...], context: int, depth: int = 0
) -> Callable[[Run], dict[str, Any]]:
    """Decode and prefill with `share` of the weights' bytes as the GPU's budget beside what CUDA itself takes."""

    def measure(run: Run) -> dict[str, Any]:
        from hetero_attn import LLM, benchmark
        from hetero_attn.trace import trace_steps

        gpu_memory, path = cap_bytes(run, shape, dtype, share), checkpoint(run, shape)
        tokens = 4 if run.quick else 64
        needed = max(context, depth + tokens + 2, *(prompt + 1 for prompt in prompts))
        with LLM(
            path, gpu_memory=gpu_memory, dtype=dtype, device=run.device, max_context=needed, max_batch=1, progress=False
        ) as llm:
            rows = []
            for prompt in prompts or (0,):
                report = benchmark.run(llm, prompt, tokens, (depth,), repetitions=1 if run.quick else 3)
                rows += [row for row in report.to_dict()["rows"] if row["name"] not in {seen["name"] for seen in rows}]
            trace = run.out / f"trace-{shape}-{dtype}-{share:.0%}-{context}.json"
            trace_steps(llm.engine, min((*prompts, 512, needed - 4)), 2).save(trace)
            arena = llm.engine.lanes.device.arena
            return {
                "rows": rows,
                "handover": llm.engine.lanes.handover.name,
                "gpu_memory": gpu_memory,
                "arena_peak_bytes": arena.peak_bytes,
                "reserved_bytes": torch.cuda.max_memory_reserved() if run.device.startswith("cuda") else None,
                "plan": llm.plan.table(),
                "trace": trace.name,
            }

    return measure


def accelerate(shape: str, share: float) -> Callable[[Run], dict[str, Any]]:
    """transformers with accelerate's device_map under the same cap: decode and a prompt of 512, bf16."""

    def measure(run: Run) -> dict[str, Any]:
        import transformers

        cap = cap_bytes(run, shape, "bf16", share)
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


def linear_kernel(run: Run, dtype: str) -> dict[str, Any]:
    """The GPU's linear by rows, weight bytes and operations a second; the bytes of two layers, larger than any cache."""
    from cpu_kernels.layout import BLOCK_FEATURES, block_bytes

    features = 256 if run.quick else 32_768
    device, ops = tensor_device(run)
    weight = torch.full((features // BLOCK_FEATURES, block_bytes(dtype, 4096)), 60, dtype=torch.uint8, device=device)
    rows = []
    for count in (1, 4, 16, 64, 512) if not run.quick else (1, 16):
        x, out = torch.randn(count, 4096, device=device), torch.empty(count, features, device=device)
        seconds = device_seconds(run, lambda x=x, out=out: ops.linear(x, weight, dtype, None, out))
        operations = 2 * count * features * 4096
        rows.append({"rows": count, "bytes_per_s": weight.numel() / seconds, "ops_per_s": operations / seconds})
    return {"rows": rows, "copy_bytes_per_s": copy_rate(run)}


def attention_kernels(run: Run) -> dict[str, Any]:
    """Decode over 16k tokens in bytes a second, prefill in operations a second, each beside torch's own attention."""
    device, ops = tensor_device(run)
    heads, groups, head_dim, page = 32, 8, 128, 64
    tokens, rows = (256, 32) if run.quick else (16_384, 4096)
    pages = tokens // page * groups
    k, v = (torch.randn(pages, page, head_dim, device=device).bfloat16() for _ in range(2))
    table = torch.arange(pages, dtype=torch.int32, device=device).view(-1, groups).T.contiguous()
    start, stop = (torch.full((1,), value, dtype=torch.int32, device=device) for value in (0, tokens))
    q, out = (torch.randn(rows, heads, head_dim, device=device) for _ in range(2))
    lse = torch.empty(rows, heads, device=device)
    scale = head_dim**-0.5
    decode = device_seconds(
        run, lambda: ops.decode_attention(q[:1], k, v, table[None], start, stop, scale, out[:1], lse[:1])
    )
    prefill = device_seconds(run, lambda: ops.prefill_attention(q, k, v, table, 0, rows, 0, 0, scale, out, lse))
    dense = [
        torch.randn(1, count, length, head_dim, device=device).bfloat16()
        for count, length in ((heads, rows), (groups, tokens))
    ]
    attend = torch.nn.functional.scaled_dot_product_attention
    flash_decode = device_seconds(run, lambda: attend(dense[0][:, :, :1], dense[1], dense[1], enable_gqa=True))
    short = dense[1][:, :, :rows]
    flash_prefill = device_seconds(run, lambda: attend(dense[0], short, short, is_causal=True, enable_gqa=True))
    operations = 2 * rows * rows * heads * head_dim  # half of 4 MNK: causal
    return {
        "decode_bytes_per_s": 2 * k.nbytes / decode,
        "torch_decode_bytes_per_s": 2 * k.nbytes / flash_decode,
        "prefill_ops_per_s": operations / prefill,
        "torch_prefill_ops_per_s": operations / flash_prefill,
        "copy_bytes_per_s": copy_rate(run),
    }


def copy_rate(run: Run) -> float:
    """Bytes a second read and written by a copy within the memory that kernels use: the ceiling."""
    device, _ = tensor_device(run)
    source = torch.zeros((1 << 20) if run.quick else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(run, lambda: target.copy_(source))


def tensor_device(run: Run) -> tuple[str, Any]:
    """Where kernel tensors live, and the operations there."""
    import gpu_kernels
    from gpu_kernels import reference

    return ("cpu", reference) if run.device == "emulated" else (run.device, gpu_kernels)


def make_device(run: Run) -> Any:
    """A small device for the hand-overs."""
    from hetero_attn.devices import CudaDriver, Device, EmulatedDriver
    from hetero_attn.devices.machine import device_index

    emulated = run.device == "emulated"
    return Device(EmulatedDriver() if emulated else CudaDriver(device_index(run.device), 1 << 20, 1 << 28))


def device_seconds(run: Run, work: Callable[[], object]) -> float:
    """Median seconds of one call, all of its kernels ended."""

    def settled() -> None:
        work()
        if run.device != "emulated":
            torch.cuda.synchronize()

    calls = 1 if run.quick else 20

    def many() -> None:
        for _ in range(calls):
            work()
        settled()

    return median_seconds(many, 1 if run.quick else 5) / (calls + 1)


def median_seconds(work: Callable[[], object], repetitions: int) -> float:
    """Median time of `work`, warmed up once."""
    work()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def cap_bytes(run: Run, shape: str, dtype: str, share: float) -> int:
    """The GPU budget that leaves room for `share` of the weights beside what else must be there."""
    from placement.hardware import WEIGHT_BYTES

    dims = [size for size in LARGE_SHAPES[shape].tensors().values() if len(size) == 2]
    weights = sum(rows * columns for rows, columns in dims) * WEIGHT_BYTES[dtype]
    fixed = 64 << 20 if run.quick else 2 << 30  # context, temporaries, activations, cache
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
    """bf16 values of variance 1 / columns, uniform because that is quick to draw; ones for norms."""
    if len(dims) == 1:
        return np.full(dims, 0x3F80, dtype=np.uint16)
    values = generator.random(dims, dtype=np.float32)
    values -= 0.5
    values *= np.float32((12 / dims[1]) ** 0.5)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def machine(run: Run) -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if run.device.startswith("cuda") else "none (emulated: no figure counts)"
    return {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}


def main() -> None:
    """Read the command line and run the parts until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or emulated")
    parser.add_argument("--quick", action="store_true", help="toy shapes: does every part run?")
    parser.add_argument("--work-dir", type=Path, help="where checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench binary built for this GPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work_dir, deadline = options.work_dir or Path(temporary), time.monotonic() + 60 * options.minutes
        run = Run(options.out, work_dir, options.device, options.quick, deadline, options.llama_bench)
        run_parts(run)


def run_parts(run: Run) -> None:
    """Every part that is not known yet and begins in time; a failure is a result like any other."""
    known = run.known()
    run.write("machine", **machine(run))
    for name, measure in parts(run):
        if name in known:
            continue
        if run.time_left_s <= 0:
            run.write("end", reason=f"the time was up before {name!r}")
            return
        started = time.monotonic()
        try:
            values = measure(run)
        except Exception as error:  # whatever it is, the next part may still work
            values = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
        run.write(name, took_s=round(time.monotonic() - started, 1), **values)
    run.write("end", reason="every part ran")


if __name__ == "__main__":
    main()
