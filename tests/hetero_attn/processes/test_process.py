"""Whole processes: how much memory a load takes, and what a real Ctrl-C does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from tests.support.models.toy import make_checkpoint
from tests.support.processes.quick_python import quick_python

ROOT = Path(__file__).resolve().parents[3]

LOAD = """
import resource, sys
from hetero_attn import LLM
small, large, dtype = sys.argv[1:]
LLM(small, dtype=dtype, device="cpu", max_context=64, progress=False).close()  # imports, kernels, thread team
def rss_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def peak_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = rss_bytes()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
llm = LLM(large, dtype=dtype, device="cpu", max_context=64, progress=False)
loaded = llm.plan.workload.weight_bytes + llm.plan.workload.embed_bytes
print(before, peak_bytes(), loaded)
"""

INTERRUPTED = """
import sys
from hetero_attn import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="fp32", device=sys.argv[2], gpu_memory="8MiB", progress=False)
params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
expected = llm.generate("hello", params)[0].token_ids
print("ready", flush=True)
try:
    while True:
        llm.generate(["one prompt", "another prompt of another length"], SamplingParams(max_tokens=400, ignore_eos=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert llm.engine.kv_cache.free_sequences == llm.plan.max_batch, llm.engine.kv_cache.free_sequences
assert llm.generate("hello", params)[0].token_ids == expected
print("usable", flush=True)
"""


def write_wide_checkpoint(path: Path) -> int:
    """A shallow model of a few hundred MB, all zeros but its norms; returns the bytes of its largest tensor."""
    make_checkpoint(path, "llama", layers=2, hidden=60, num_heads=6, num_kv_heads=2)
    values = json.loads((path / "config.json").read_text())
    values |= {
        "hidden_size": 1536,
        "intermediate_size": 8192,
        "vocab_size": 32000,
        "num_hidden_layers": 4,
        "head_dim": 128,
    }
    values |= {"num_attention_heads": 12, "num_key_value_heads": 4, "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(values))
    config = ModelConfig.from_dir(path)
    tensors = {
        name: (torch.zeros if len(shape) > 1 else torch.ones)(shape, dtype=torch.bfloat16)
        for name, shape in decoder(config).tensors.items()
    }
    save_file(tensors, path / "model.safetensors")
    return max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.matrix  # an ordinary run has those of test_load_memory.py, which allow less
@pytest.mark.parametrize("dtype", ["bf16", "q4"])
def test_a_load_holds_no_second_copy_of_the_model(tmp_path, dtype):
    """Peak memory is at most 1.15 of the loaded weights and one tensor of the file."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    small = make_checkpoint(tmp_path / "small", "llama", layers=1)
    largest_bytes = write_wide_checkpoint(tmp_path / "large")
    command = [sys.executable, "-c", LOAD, str(small), str(tmp_path / "large"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    before, peak, loaded = map(int, done.stdout.split())

    assert peak - before <= 1.15 * loaded + largest_bytes


@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=pytest.mark.matrix)])
def test_control_c_ends_a_generation_and_leaves_the_engine_usable(tmp_path, device):
    path = make_checkpoint(tmp_path, "llama")
    process = subprocess.Popen(
        quick_python("-c", INTERRUPTED, path, device),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()

    assert output == "interrupted\nusable\n", errors
    assert process.returncode == 0
