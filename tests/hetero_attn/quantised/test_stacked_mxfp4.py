"""gpt-oss as it is published: all experts' MXFP4 blocks in one tensor, gate and up rows in turns; held as they are."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn import plan_model
from hetero_attn.checkpoints.sources import open_source
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.tensor_names import expert_tensor
from placement import Policy
from tests.support.models.moe import make_moe, moe_logits
from tests.support.models.runtime import model_logits, nmse
from tests.support.models.toy import edit_json

TOKENS = torch.randint(260, (24,), generator=torch.Generator().manual_seed(3)).tolist()
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
EXPERTS, HIDDEN, WIDTH = 8, 64, 96
UP = "model.layers.1.mlp.experts.gate_up_proj"
CUT = """
version: 1
rules:
  - match: "layers.*"
    gpu: 0.5
    stream: 0.25
    cpu: 0.25
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`stacked`, and `plain` with the values that transformers makes of it, in float32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, generator = tmp_path_factory.mktemp("gpt_oss"), torch.Generator().manual_seed(0)
    plain = make_moe(folder / "plain", "gpt_oss", layers=2, hidden_size=HIDDEN, intermediate_size=WIDTH)
    tensors = load_file(plain / "model.safetensors")
    stacked = dict(tensors)
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        experts, inputs, rows = stacked.pop(name).shape
        blocks = torch.randint(256, (experts, rows, inputs // 32, 16), generator=generator).byte()
        scales = torch.randint(119, 124, (experts, rows, inputs // 32), generator=generator).byte()
        stacked |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        assert tensors[name].shape == (experts, inputs, rows)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    write(folder / "stacked", plain, stacked)
    return folder


def write(path, plain, tensors):
    path.mkdir(parents=True, exist_ok=True)
    for file in plain.glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    edit_json(path / "config.json", quantization_config=CONFIG)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def logits(path, dtype="auto", device="cpu", **options):
    return model_logits(path, dtype, device, tokens=TOKENS, kv_dtype="fp32", **options)


def test_values_are_those_of_the_file_to_the_bit(folder):
    expected = logits(folder / "plain", "fp32")

    assert torch.equal(logits(folder / "stacked", "fp32"), expected)
    assert nmse(expected, moe_logits(folder / "plain", TOKENS)) < 1e-10


def test_experts_are_held_as_they_are_and_read_one_at_a_time(folder, monkeypatch):
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read.append(len(buffers[0])) or preadv(fd, buffers, at))
    workload = plan_model(folder / "stacked", device="cpu", max_context=64).workload
    experts = [shard for shard in workload.linears if shard.kind == "experts"]
    read.clear()
    with open_source(folder / "stacked") as source:
        rows = [source.read(expert_tensor(0, 3, part), slice(16, 32)) for part in ("gate", "up", "down")]

    assert {workload.format_of(shard) for shard in experts} == {"mxfp4"}
    packed = (2 * WIDTH * 128 + HIDDEN * 128) // 2 + (2 * WIDTH + HIDDEN) * 4  # inputs in whole superblocks of 128
    assert [shard.unit_bytes for shard in experts] == [packed] * 2
    assert [each.shape for each in rows] == [(16, HIDDEN // 32 * 17)] * 2 + [(16, WIDTH // 32 * 17)]
    assert max(read[1:]) <= 2 * WIDTH * HIDDEN // 2  # the codes of gate and up of one expert; the first is the header


def test_the_config_alone_gives_the_plan_of_the_files(folder, tmp_path):
    """It needed --dtype, and experts planned as q4 are larger."""
    (tmp_path / "config.json").write_bytes((folder / "stacked" / "config.json").read_bytes())
    alone, whole = (plan_model(path, device="cpu", max_context=64).workload for path in (tmp_path, folder / "stacked"))

    assert [alone.format_of(shard) for shard in alone.linears] == [whole.format_of(shard) for shard in whole.linears]
    assert (alone.weight_bytes, alone.embed_bytes) == (whole.weight_bytes, whole.embed_bytes)


@pytest.mark.parametrize("dtype", ["auto", "q8"])
def test_lanes_agree_and_differ_by_roundings_alone(folder, dtype):
    expected = logits(folder / "stacked", dtype)

    assert nmse(expected, logits(folder / "plain", "fp32")) < 3e-3
    cut = logits(folder / "stacked", dtype, "emulated", policy=Policy.parse(CUT))
    assert nmse(cut, expected) <= 1e-4


WRONG = {
    "no scales": (f"{UP}_scales", lambda x: None, "experts.0.gate_up_proj has no scales"),
    "fewer scales": (
        f"{UP}_scales",
        lambda x: x[:, :-2],
        r"gate_up_proj.scales has shape \[190, 2\], expected \[192, 2",
    ),
    "other blocks": (f"{UP}_blocks", lambda x: x[..., :8], r"gate_up_proj.blocks has shape .*blocks of 16 bytes"),
    "odd rows": (f"{UP}_blocks", lambda x: x[:, 1:], r"gate_up_proj.blocks has shape .*alternately of gate and up"),
    "other codes": (f"{UP}_blocks", lambda x: x.char(), r"gate_up_proj.blocks is I8, expected U8"),
    "NaN": (f"{UP}_scales", lambda x: x * 0 + 255, "experts.0.gate_proj.weight.*not finite"),
    "narrow": (f"{UP}_blocks", lambda x: x[:, :, :1], r"scales has shape .*expected \[192, 1\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(folder, tmp_path, case):
    name, change, message = WRONG[case]
    tensors = load_file(folder / "stacked" / "model.safetensors")
    changed = change(tensors.pop(name))
    write(tmp_path / "m", folder / "plain", tensors | ({} if changed is None else {name: changed.contiguous()}))

    with pytest.raises(CheckpointError, match=message):
        logits(tmp_path / "m")


def test_a_config_that_says_nothing_of_it_is_told(folder, tmp_path):
    write(tmp_path / "m", folder / "plain", load_file(folder / "stacked" / "model.safetensors"))
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    del values["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))

    with pytest.raises(CheckpointError, match="missing from the weight files"):
        logits(tmp_path / "m", "bf16")
