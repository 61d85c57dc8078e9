"""What `gpu_offload.py` compares with, under the same cap: accelerate's device_map and llama.cpp's layers on the GPU."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_checkpoints import LARGE_SHAPES, cap_bytes, checkpoint
from gpu_kernel_parts import median_seconds
from gpu_run import Run

HERE = Path(__file__).resolve().parent


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


def llama_cpp(shape: str, shares: tuple[float, ...], depths: tuple[int, ...]) -> Callable[[Run], dict[str, Any]]:
    """llama-bench, Q4_0, with the most layers on the GPU that keep it under the same cap, found by its real use."""

    def measure(run: Run) -> dict[str, Any]:
        if run.llama_bench is None:
            return {"skipped": "no --llama-bench"}
        gguf, shape_of = gguf_file(run, shape), LARGE_SHAPES[shape]
        layer_bytes = gguf.stat().st_size // (shape_of.num_layers + 2)
        for share in shares:
            cap, name = cap_bytes(shape, "q4", share), f"llama.cpp {shape} q4 {share:.0%}"
            layers = max(0, int(share * shape_of.num_layers) - 2)
            _, peak = llama_bench(run, gguf, layers, "-p", 0, "-n", 1, "-r", 1)
            layers = min(shape_of.num_layers + 1, layers + int((cap - peak) // layer_bytes))
            decode, peak = llama_bench(run, gguf, layers, "-p", 0, "-n", 32, "-d", 990)
            prompts, prompt_peak = llama_bench(
                run, gguf, layers, "-p", "512,4096", "-n", 0, "-ub", "512,2048", "-b", 4096, "-r", 2
            )
            rows = decode + prompts
            if depths:
                rows += llama_bench(run, gguf, layers, "-p", 0, "-n", 32, "-r", 1, "-d", _listed(depths))[0]
                rows += llama_bench(run, gguf, layers, "-p", 0, "-n", 32, "-r", 1, "-d", _listed(depths), "-nkvo", 1)[0]
            run.write(name, cap_bytes=cap, ngl=layers, peak_bytes=max(peak, prompt_peak), rows=rows)
        return {}

    return measure


def llama_bench(run: Run, gguf: Path, layers: int, *options: object) -> tuple[list[dict[str, Any]], int]:
    """The rows of one llama-bench run with flash attention, and the most GPU memory that was in use meanwhile."""
    command = [run.llama_bench, "-m", gguf, "-ngl", layers, "-fa", 1, "-o", "json", *options]
    peak = 0
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
    return [{name: row.get(name) for name in wanted} for row in json.loads(output)], peak


def gguf_file(run: Run, shape: str) -> Path:
    """The checkpoint as Q4_0, made on first use."""
    gguf = run.work_dir / f"{shape}-q4_0.gguf"
    if not gguf.exists():
        command = [sys.executable, HERE / "random_checkpoint.py", "gguf", checkpoint(run, shape), gguf]
        subprocess.run([*map(str, command), "--type", "Q4_0"], check=True)
    return gguf


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
