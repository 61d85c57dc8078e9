"""What a load holds and leaves: no second copy of the weights, the page cache given back, nothing open after Ctrl-C."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from hetero_attn import LLM, plan_model
from hetero_attn.checkpoints.raw_file import RawFile
from hetero_attn.engine.build import build_engine
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.model import model_spec
from tests.support.models.toy import make_checkpoint

BESIDE = 64 << 20  # buffers of a run of units, and what Python and torch take meanwhile; 256 MB are allowed
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 1024}
LOAD = """
import json, sys
from hetero_attn import LLM
from hetero_attn.checkpoints.loading.load import Loader

def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def measured(loader, load=Loader.load):
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here, not from a profile before it
    before = kib("VmRSS")
    weights = load(loader)
    found.append((kib("VmHWM") - before) * 1024)
    return weights

found, Loader.load = [], measured
with LLM(sys.argv[1], dtype=sys.argv[2], device="cpu", max_context=64, num_threads=2, progress=False) as llm:
    packed = llm.plan.workload.weight_bytes + llm.plan.workload.embed_bytes
    print(json.dumps([found[0], packed, "numba" in sys.modules]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """134 MB of weights in bfloat16, any finite numbers."""
    path = make_checkpoint(tmp_path_factory.mktemp("large"), layers=1)
    values = json.loads((path / "config.json").read_text()) | SIZES | {"num_attention_heads": 8, "head_dim": 128}
    (path / "config.json").write_text(json.dumps(values | {"num_key_value_heads": 8, "tie_word_embeddings": True}))
    model, draw = model_spec(ModelConfig.from_dir(path)), np.random.default_rng(0)
    tensors = {}
    for name, shape in model.tensors.items():
        bits = draw.integers(0x3C00, 0x3E00, int(np.prod(shape)), np.uint16)
        tensors[name] = torch.from_numpy(bits).view(torch.bfloat16).view(shape)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("dtype", [pytest.param("auto", marks=pytest.mark.matrix), "q4"])
def test_no_second_copy_is_held(large, dtype):
    """The file in memory beside the weights, or these twice, would be more than is allowed.

    A process that compiled kernels is not looked at, but the next one: the compiler takes memory too.
    """
    command = [sys.executable, "-c", LOAD, str(large), dtype]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
        assert done.returncode == 0, done.stderr[-2000:]
        grown, packed, has_compiled = json.loads(done.stdout.splitlines()[-1])
        if not has_compiled:
            break
    file_bytes = (large / "model.safetensors").stat().st_size

    assert packed + min(packed, file_bytes) > 1.03 * packed + BESIDE or dtype == "q4" and file_bytes > BESIDE
    assert grown <= 1.03 * packed + BESIDE, (grown >> 20, packed >> 20)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")
@pytest.mark.parametrize(("free_share", "is_given_back"), [(1.5, True), (2.5, False)])
def test_the_page_cache_is_given_back_where_both_do_not_fit(tmp_path, monkeypatch, free_share, is_given_back):
    given, path = [], tmp_path / "x"
    path.write_bytes(bytes(10_000))
    file = RawFile(path)
    free = type("Memory", (), {"available": int(free_share * 10_000)})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, advice: given.append((at, size, advice)))
    file.close()

    assert given == ([(0, 10_000, os.POSIX_FADV_DONTNEED)] if is_given_back else [])


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_progress_counts_every_byte(tmp_path, device):
    counts, path = [], make_checkpoint(tmp_path, layers=2)
    planned = settle(LoadOptions(model=path, device=device, max_context=64, num_threads=2))
    build_engine(planned, progress=counts.append).close()

    assert sum(counts) == planned.plan.workload.weight_bytes
    assert len(counts) > 8


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed by Linux's /proc")
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_ctrl_c_in_the_middle_leaves_nothing_open(tmp_path, monkeypatch, device):
    path, before = make_checkpoint(tmp_path, layers=2), set(threading.enumerate())
    bytes_placed = plan_model(path, device=device, max_context=64).workload.weight_bytes

    def interrupt(bar, count):
        bar.n += count
        if bar.n > bytes_placed // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LLM(path, device=device, max_context=64, num_threads=2, progress=False)

    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()]
    assert not [link for link in links if str(tmp_path) in link]
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in left if name.startswith("cpu_kernels")]
    assert len(left) <= 1  # the tokenizer may still be opening
