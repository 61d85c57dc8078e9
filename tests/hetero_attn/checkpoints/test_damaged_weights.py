"""Weights that are not numbers are refused by name while they load, and nothing is left behind."""

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn import LLM
from hetero_attn.checkpoints.loading.numbers import CHECKED_AT_ONCE, all_finite
from hetero_attn.errors import CheckpointError
from tests.support.models.toy import make_checkpoint

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_bits_tell_which_numbers_are_finite(dtype, value):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, 1.0], dtype=dtype)
    values = values.repeat(2 * CHECKED_AT_ONCE // 5)

    assert all_finite(values) and all_finite(values[:0]) and all_finite(values.view(-1, 2)[:, :1])
    for place in (0, CHECKED_AT_ONCE - 1, CHECKED_AT_ONCE, len(values) - 1):
        damaged = values.clone()
        damaged[place] = value

        assert not all_finite(damaged)
