"""Weights that are not numbers are refused by name while they load, and nothing is left behind."""

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn import LLM
from hetero_attn.errors import CheckpointError
from tests.support.toy import make_checkpoint

TENSORS = {
    "linear": "model.layers.1.mlp.up_proj.weight",
    "norm": "model.layers.0.input_layernorm.weight",
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "bias": "model.layers.2.self_attn.k_proj.bias",
}


def lane_threads() -> set[threading.Thread]:
    """The threads that lanes and kernel teams of this process have now."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(("cpu_kernels", "hetero-attn"))}


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_weight_that_is_no_number_is_named(tmp_path, name, value, device):
    path = make_checkpoint(tmp_path, "llama", biases=True)
    tensors = load_file(path / "model.safetensors")
    tensors[TENSORS[name]].view(-1)[7] = value
    save_file(tensors, path / "model.safetensors")
    threads = lane_threads()

    with pytest.raises(CheckpointError, match=TENSORS[name].replace(".", r"\.")) as error:
        LLM(path, dtype="bf16", device=device, gpu_memory="1200KiB", progress=False)

    assert "download" in str(error.value)
    assert lane_threads() <= threads


def test_the_same_checkpoint_undamaged_loads(tmp_path):
    path = make_checkpoint(tmp_path, "llama", biases=True)
    with LLM(path, dtype="bf16", device="emulated", gpu_memory="1200KiB", progress=False) as llm:
        assert torch.isfinite(llm.logits([1, 2, 3])).all()
