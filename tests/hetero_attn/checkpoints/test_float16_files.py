"""Checkpoints in float16 stay float16: 11 significant bits, of which bfloat16 has 8."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn import LLM, plan_model
from hetero_attn.checkpoints.files import SINGLE_NAME
from hetero_attn.tools import verify
from tests.support.models.runtime import model_logits, nmse
from tests.support.models.toy import edit_json, hf_logits, make_checkpoint

TOKENS = torch.randint(260, (40,), generator=torch.Generator().manual_seed(3)).tolist()
EXACT, ROUNDED = 1e-10, 1e-6  # of float32 sums in another order; of weights with 8 bits


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A model in float16 whose every weight matrix has numbers that bfloat16 cannot hold."""
    path = make_checkpoint(tmp_path_factory.mktemp("halves"), layers=1, dtype=torch.float16, tied=True)
    tensors = load_file(path / SINGLE_NAME)
    assert all(not torch.equal(each.bfloat16().half(), each) for each in tensors.values() if each.dim() > 1)
    return path


def error(path, **options) -> float:
    """Of the logits, against transformers with the same values in float32."""
    return nmse(model_logits(path, tokens=TOKENS, kv_dtype="fp32", **options), hf_logits(path, TOKENS))


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("dtype", ["auto", "fp16", torch.float16])
def test_nothing_is_rounded(halves, device, dtype):
    assert error(halves, dtype=dtype, device=device) <= EXACT


def test_a_dtype_that_is_asked_for_rounds(halves):
    """So the test above can fail: as bfloat16, which all of it was once, this model is another."""
    assert error(halves, dtype="bf16") > ROUNDED


def test_the_plan_says_so_and_sizes_it(halves):
    plan = plan_model(halves, device="cpu", max_context=64)
    rounded = plan_model(halves, device="cpu", max_context=64, dtype="bf16")

    assert {plan.workload.format_of(shard) for shard in plan.workload.linears} == {"fp16"}
    assert plan.workload.weight_dtype == "fp16"
    assert plan.workload.weight_bytes == rounded.workload.weight_bytes
    assert plan.workload.embed_bytes == rounded.workload.embed_bytes


def test_the_files_are_believed_and_not_the_config(halves, tmp_path):
    for name in ("config.json", SINGLE_NAME):
        (tmp_path / name).write_bytes((halves / name).read_bytes())
    edit_json(tmp_path / "config.json", dtype="bfloat16", torch_dtype=...)

    assert plan_model(tmp_path, device="cpu", max_context=64).workload.weight_dtype == "fp16"
    (tmp_path / SINGLE_NAME).unlink()
    assert plan_model(tmp_path, device="cpu", max_context=64).workload.weight_dtype == "bf16"
    edit_json(tmp_path / "config.json", dtype="float16")
    assert plan_model(tmp_path, device="cpu", max_context=64).workload.weight_dtype == "fp16"


def test_dtypes_that_lie_mixed_stay_mixed(halves, tmp_path):
    """Most of a file decided for all of it: here the rest would have been rounded, or refused as damaged."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((halves / name).read_bytes())
    tensors = load_file(halves / SINGLE_NAME)
    tensors = {name: each.bfloat16() if ".mlp." in name else each for name, each in tensors.items()}
    tensors |= {name: each.float() + 2e-5 for name, each in tensors.items() if "o_proj" in name}
    save_file(tensors, tmp_path / SINGLE_NAME, {"format": "pt"})

    plan = plan_model(tmp_path, device="cpu", max_context=64)

    by_kind = {shard.kind: plan.workload.format_of(shard) for shard in plan.workload.linears}
    assert by_kind == {"qkv": "fp16", "o": "fp32", "gate_up": "bf16", "down": "bf16", "head": "fp16"}
    assert plan.workload.weight_dtype == "bf16+fp16+fp32"
    assert error(tmp_path, dtype="fp32") <= EXACT
    assert error(tmp_path) <= 1e-4  # activations meet bfloat16 weights as bfloat16
    halved = plan_model(tmp_path, device="cpu", max_context=64, dtype="fp16")
    assert {halved.workload.format_of(shard) for shard in halved.workload.linears} == {"bf16", "fp16"}


def test_other_numbers_are_never_made_float16(halves, tmp_path):
    """Asked for fp16, weights beyond its range become bfloat16, as torch.float16 always meant here."""
    path = make_checkpoint(tmp_path, layers=1, dtype=torch.bfloat16)

    assert plan_model(path, device="cpu", max_context=64, dtype="fp16").workload.weight_dtype == "bf16"


def test_verify_passes(halves):
    with LLM(halves, device="emulated", max_context=64, progress=False, num_threads=2) as llm:
        report = verify.run(llm, TOKENS[:16], 2)

    assert report.passed, report.table()
    assert json.loads(json.dumps(report.to_dict()))["weight_dtype"] == "fp16"
