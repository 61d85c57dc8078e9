"""GPTQ, AWQ and compressed-tensors models: the values of the file and nothing else, on every lane, or a refusal by name."""

import functools
import shutil

import pytest
import torch

from hetero_attn import Policy
from hetero_attn.errors import CheckpointError, UnsupportedModelError
from hetero_attn.planning.settle import plan_model
from tests.support.models.runtime import nmse
from tests.support.models.toy import hf_logits
from tests.support.quantised.int4_cases import INT4_CASES
from tests.support.quantised.int4_data import random_groups
from tests.support.quantised.int4_models import (
    edit_config,
    edit_tensors,
    gptq,
    gptq_config,
    gptq_of_8_bits,
    make_int4,
)
from tests.support.quantised.quantised_models import CUT, TOKENS, assert_lanes_agree, logits, one_other, replaced


@pytest.mark.parametrize("case", INT4_CASES)
def test_values_are_those_of_the_file_to_the_bit(int4_models, case):
    """Held in float32 the model and a checkpoint of its dequantised values are one and the same."""
    folder = int4_models(case)

    assert torch.equal(logits(folder / "int4", "fp32"), logits(folder / "plain", "fp32"))


@pytest.mark.parametrize("case", ["gptq", "awq", "compressed asymmetric"])
def test_lanes_agree_and_differ_from_the_file_by_the_rounding_of_activations_alone(int4_models, case):
    folder = int4_models(case)

    assert_lanes_agree(folder / "int4", folder / "plain")


def test_a_plan_knows_the_formats_and_reads_no_code(int4_models, monkeypatch):
    monkeypatch.setattr("hetero_attn.checkpoints.quantised.checkpoint.QuantisedCheckpoint.read", None)

    plan = plan_model(int4_models("gptq") / "int4", device="cpu", max_context=64)

    assert plan.workload.weight_dtype == "fp16+int4_g128"
    assert {plan.workload.format_of(shard) for shard in plan.workload.linears} == {"fp16", "int4_g128"}


def test_a_policy_holds_one_linear_otherwise(int4_models):
    policy = Policy.parse("version: 1\nrules:\n  - {match: layers.*.down, dtype: q8}\n")
    folder = int4_models("awq")

    assert 0 < nmse(logits(folder / "int4", policy=policy), logits(folder / "int4")) < 1e-3


@pytest.mark.parametrize(("each", "taken"), [(32, 1), (128, 0), (-1, 1)])
def test_symmetric_gptq_of_8_bits_is_held_packed_and_exactly(tmp_path, each, taken):
    """Such files were refused. Every code a byte may be, scales of either sign."""
    folder = make_int4(
        tmp_path,
        functools.partial(gptq_of_8_bits, taken=taken),
        gptq_config(each, sym=True, bits=8),
        each,
        remade=lambda groups, draw: groups._replace(
            codes=torch.randint(256, groups.codes.shape, generator=draw, dtype=torch.uint8),
            zeros=torch.full_like(groups.zeros, 128),
        ),
    )
    plan = plan_model(folder / "int4", device="cpu", max_context=64)

    assert {plan.workload.format_of(shard) for shard in plan.workload.linears} == {"fp16", "q8"}
    assert torch.equal(logits(folder / "int4", "fp32"), logits(folder / "plain", "fp32"))
    edit_tensors(folder / "int4", replaced("qzeros", one_other))
    with pytest.raises(CheckpointError, match="says sym, but .*up_proj.qzeros holds zero points"):
        logits(folder / "int4")


@pytest.mark.parametrize(("each", "taken"), [(32, 1), (64, 0), (-1, 1)])
def test_gptq_of_8_bits_with_zero_points_is_held_packed_and_exactly(tmp_path, each, taken):
    """Such files were refused. Every code that a byte may be, zero points on either side of the middle."""
    folder = make_int4(
        tmp_path,
        functools.partial(gptq_of_8_bits, taken=taken),
        gptq_config(each, bits=8, checkpoint_format="gptq" if taken else "gptq_v2"),
        each,
        remade=lambda groups, draw: groups._replace(
            codes=torch.randint(256, groups.codes.shape, generator=draw, dtype=torch.uint8),
            zeros=torch.randint(100, 157, groups.zeros.shape, generator=draw, dtype=torch.uint8),
            scales=groups.scales / 16,
        ),
    )
    plan = plan_model(folder / "int4", device="cpu", max_context=64)
    expected = logits(folder / "int4", kv_dtype="fp32")

    held = f"uint8_g{128 if each == -1 else each}"
    assert {plan.workload.format_of(shard) for shard in plan.workload.linears} == {"fp16", held}
    assert torch.equal(logits(folder / "int4", "fp32"), logits(folder / "plain", "fp32"))
    assert nmse(expected, hf_logits(folder / "plain", TOKENS)) < 3e-3
    cut = logits(folder / "int4", device="emulated", policy=Policy.parse(CUT), kv_dtype="fp32")
    assert nmse(cut, expected) <= 1e-4
    if taken:
        edit_tensors(folder / "int4", replaced("qzeros", lambda zeros: torch.full_like(zeros, -1)))
        with pytest.raises(
            UnsupportedModelError, match="up_proj.qzeros stores a zero point of 255 in the first version"
        ):
            logits(folder / "int4")


def test_gptq_may_quantise_single_linears_in_ways_of_their_own_or_not_at_all(int4_models, tmp_path):
    """Such files, of Qwen's mixtures among others, were refused."""
    shutil.copytree(int4_models("gptq"), tmp_path, dirs_exist_ok=True)
    finer, whole = "model.layers.1.mlp.gate_proj.", "model.layers.0.self_attn.o_proj."
    wide = "model.layers.1.mlp.down_proj."
    groups = {
        finer: (gptq, random_groups(256, 128, 32, 14)),
        wide: (gptq_of_8_bits, random_groups(128, 256, 64, 254, bits=8)),
    }
    groups = {name: (write, found._replace(zeros=found.zeros + 1)) for name, (write, found) in groups.items()}

    def in_file(tensors):
        for name in (finer, wide, whole):
            for part in ("qweight", "scales", "qzeros", "g_idx"):
                del tensors[name + part]
        for name, (write, found) in groups.items():
            each = found.codes.shape[1] // found.scales.shape[1]
            tensors |= {name + part: item for part, item in write(found, each).items()}
        tensors[whole + "weight"] = torch.eye(128).half()

    def in_plain(tensors):
        tensors |= {name + "weight": found.values for name, (_, found) in groups.items()}
        tensors[whole + "weight"] = torch.eye(128)

    edit_tensors(tmp_path / "int4", in_file)
    edit_tensors(tmp_path / "plain", in_plain)
    with pytest.raises(CheckpointError, match="down_proj.qzeros has shape"):
        logits(tmp_path / "int4", "fp32")
    ways = {r"-:.*o_proj": {}, r"+:.*gate.*": {"group_size": 32}, ".*down.*": {"bits": 8, "group_size": 64}}
    edit_config(tmp_path / "int4", quantization_config=gptq_config(128, dynamic=ways))

    held = {shard.weight_format for shard in plan_model(tmp_path / "int4", device="cpu").workload.linears}
    assert held == {"int4_g128", "int4_g32*1+int4_g128*1", "uint8_g64", "fp16"}
    assert torch.equal(logits(tmp_path / "int4", "fp32"), logits(tmp_path / "plain", "fp32"))
    assert nmse(logits(tmp_path / "int4"), logits(tmp_path / "int4", "fp32")) < 3e-3
