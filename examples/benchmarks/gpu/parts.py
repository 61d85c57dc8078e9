"""The parts of `gpu_offload.py` in their order, with the seconds that each may take on an H100 machine."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .experts import experts
from .kernel_parts import attention_kernels, linear_kernel, linear_stages
from .models import model, resize
from .peers import accelerate, llama_cpp
from .rates import rates
from .run import Part, Run
from .sanity import full_queue, hops, kernels, toy_model

ROOT = Path(__file__).resolve().parents[3]
GPU_TESTS = (
    "cuda/test_cuda_lanes.py",
    "cuda/test_cuda_models.py",
    "cuda/test_cuda_graph.py",
    "test_triton_attention.py",
    "test_triton_linear.py",
)
LEAST_TEST_S = 30.0
TIDY_S = 5.0  # kept back from the tests for the last lines


def parts(run: Run) -> Iterator[Part]:
    """Every measurement, most wanted first."""
    shape = "tiny" if run.quick else "8b"
    yield Part("sanity kernels", 25, kernels)
    yield Part("sanity toy model", 25, toy_model)
    for name in ("graph", "flags", "events"):
        yield Part(f"sanity hop {name}", 4, partial(hops, name=name, busy=False))
    yield Part("sanity hop graph busy", 4, partial(hops, name="graph", busy=True))
    yield Part("sanity full queue", 8, partial(full_queue, by="flags"))
    yield Part("rates", 30, rates)
    yield Part(f"model {shape} q4 75% auto", 45, model(shape, 0.75))
    yield Part(f"model {shape} q4 75% prompts", 40, model(shape, 0.75, "prompts"))
    for share in (0.5, 0.25):
        yield Part(f"model {shape} q4 {share:.0%} prompts", 40, model(shape, share, "prompts"))
    for slots in (0.25, 0.0):
        yield Part(f"experts s1 q4 {slots:.0%} slots", 30, experts(slots))
    yield Part("kernels linear", 15, linear_kernel)
    yield Part("kernels linear stages", 10, linear_stages)
    yield Part("kernels attention", 20, attention_kernels)
    for share in (0.5, 0.25):
        yield Part(f"model {shape} q4 {share:.0%} auto", 40, model(shape, share))
    yield Part(f"resize {shape} q4", 40, resize(shape, 0.75, 0.5))
    for share in (0.75, 0.5, 0.25) if run.llama_bench else ():
        yield Part(f"peer llama.cpp {shape} q4 {share:.0%}", 40, llama_cpp(shape, share))
    if run.has_gpu:
        yield Part("tests", min(180.0, max(LEAST_TEST_S, run.time_left_s - TIDY_S)), gpu_tests)
    yield Part(f"peer accelerate {shape} bf16 50%", 120, accelerate(shape, 0.5))
    yield Part("probe full queue by events", 8, partial(full_queue, by="events"))


def gpu_tests(run: Run) -> dict[str, Any]:
    """The tests that need a GPU, those of lanes, graphs and attention first; what ran until the time was up."""
    log = run.out / "tests.txt"
    names = [f"tests/gpu_kernels/{name}" for name in GPU_TESTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *names,
        "tests/gpu_kernels",
    ]
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as tests:
        try:
            returncode = tests.wait(max(LEAST_TEST_S, min(180.0, run.time_left_s - TIDY_S)))
        except subprocess.TimeoutExpired:
            tests.kill()
            returncode = None
    lines = log.read_text().splitlines()
    ends = {word: sum(f" {word} " in f"{line} " for line in lines) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = [line for line in lines if " FAILED" in line or " ERROR" in line][:20]
    found = {"returncode": returncode, "is_whole": returncode is not None, **ends, "failed": failed, "end": lines[-1:]}
    if failed or returncode not in (0, None):
        raise RuntimeError(f"the tests found faults: {found}")
    return found
