"""Peers of `gpu_offload.py` under the same cap: accelerate's device_map and llama.cpp's layers on the GPU."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .checkpoints import LARGE_SHAPES, cap_bytes, checkpoint
from .kernel_parts import median_seconds
from .run import Run

BENCHMARKS = Path(__file__).resolve().parents[1]


def accelerate(shape: str, share: float) -> Callable[[Run], dict[str, Any]]:
    """transformers with accelerate's device_map under the same cap: decode and a prompt of 512, bf16."""

    def measure(run: Run) -> dict[str, Any]:
        import transformers

        cap = cap_bytes(shape, "bf16", share, run.quick)
        placed = {"device_map": "auto", "max_memory": {0: cap, "cpu": "100GiB"}} if run.has_gpu else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint(run, shape), dtype=torch.bfloat16, **placed
        ).eval()
        prompt = torch.ones((1, 16 if run.quick else 512), dtype=torch.long, device=model.device)
        tokens = 2 if run.quick else 4

        def generate(count: int) -> None:
            with torch.inference_mode():
                model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

        generate(1)
        first, all_tokens = (median_seconds(lambda count=count: generate(count), 1) for count in (1, 1 + tokens))
        return {"prefill_tokens_per_s": prompt.numel() / first, "decode_tokens_per_s": tokens / (all_tokens - first)}

    return measure


def llama_cpp(shape: str, share: float) -> Callable[[Run], dict[str, Any]]:
    """llama-bench, Q4_0, decode at context 1k and prompts, each with the better of two batch sizes."""

    def measure(run: Run) -> dict[str, Any]:
        gguf, layers, cap = (*fitting_layers(run, shape, share), cap_bytes(shape, "q4", share))
        decode, peak = llama_bench(run, gguf, layers, "-p", 0, "-n", 32, "-d", 990, "-r", 3)
        prompts, prompt_peak = llama_bench(
            run, gguf, layers, "-p", "512,4096", "-n", 0, "-ub", "512,2048", "-b", 4096, "-r", 2
        )
        return {
            "cap_bytes": cap,
            "ngl": layers,
            "peak_bytes": peak,
            "prompt_peak_bytes": prompt_peak,
            "rows": decode + prompts,
        }

    return measure


def fitting_layers(run: Run, shape: str, share: float) -> tuple[Path, int]:
    """The model as GGUF, and the most layers on the GPU that keep llama.cpp under the cap."""
    gguf, layers = gguf_file(run, shape), LARGE_SHAPES[shape].num_layers
    few = max(0, int(share * layers) - 2)
    _, peak = llama_bench(run, gguf, few, "-p", 0, "-n", 1, "-d", 990, "-r", 1)
    room = cap_bytes(shape, "q4", share) - peak
    return gguf, min(layers + 1, few + int(room // (gguf.stat().st_size // (layers + 2))))


def llama_bench(run: Run, gguf: Path, layers: int, *options: object) -> tuple[list[dict[str, Any]], int]:
    """The rows of one llama-bench run with flash attention, and the most GPU memory that it had meanwhile."""
    command = [run.llama_bench, "-m", gguf, "-ngl", layers, "-fa", 1, "-o", "json", *options]
    before = peak = torch.cuda.device_memory_used()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        with ThreadPoolExecutor(1) as reader:
            answer = reader.submit(child.communicate)
            while not answer.done():
                peak = max(peak, torch.cuda.device_memory_used())
                time.sleep(0.02)
    output, complaint = answer.result()
    if child.returncode:
        raise RuntimeError(f"llama-bench ended with {child.returncode}: {complaint[-500:]}")
    wanted = ("n_prompt", "n_gen", "n_depth", "n_ubatch", "n_threads", "no_kv_offload", "avg_ts", "stddev_ts")
    return [{name: row.get(name) for name in wanted} for row in json.loads(output)], peak - before


def gguf_file(run: Run, shape: str) -> Path:
    """The checkpoint as Q4_0, made on first use."""
    gguf = run.work_dir / f"{shape}-q4_0.gguf"
    if not gguf.exists():
        command = [sys.executable, BENCHMARKS / "models/random_checkpoint.py", "gguf", checkpoint(run, shape), gguf]
        subprocess.run([*map(str, command), "--type", "Q4_0"], check=True)
    return gguf
