"""GPTQ, AWQ and compressed-tensors models: the values of the file and nothing else, on every lane, or a refusal by name."""

import functools
import shutil
from functools import partial

import pytest
import torch

from hetero_attn import Policy
from hetero_attn.errors import CheckpointError, HeteroError, UnsupportedModelError
from hetero_attn.planning.settle import plan_model
from tests.support.int4_models import (
    awq,
    awq_config,
    compressed,
    compressed_config,
    edit_config,
    edit_tensors,
    gptq,
    gptq_config,
    gptq_of_8_bits,
    make_int4,
    words,
)
from tests.support.runtime import model_logits, nmse
from tests.support.toy import hf_logits

TOKENS = torch.randint(260, (24,), generator=torch.Generator().manual_seed(5)).tolist()
logits = partial(model_logits, tokens=TOKENS)
CUT = "version: 1\nrules:\n  - {match: layers.*, gpu: 0.5, stream: 0.25, cpu: 0.25}\n"
gptq_v2 = functools.partial(gptq, taken=0)


def symmetric(groups, each):
    """compressed-tensors without zero points, which are then all 8."""
    return {part: item for part, item in compressed(groups, each).items() if part != "weight_zero_point"}


# writer, config, inputs of a group, further arguments of make_int4
CASES = {
    "gptq": (gptq, gptq_config(128), 128, {}),
    "gptq sym": (gptq, gptq_config(64, sym=True), 64, {"symmetric": True}),
    "gptq sym that declares the first version and is the second": (
        gptq_v2,
        gptq_config(32, sym=True),
        32,
        {"symmetric": True, "family": "qwen2"},
    ),
    "gptq v2": (gptq_v2, gptq_config(32, checkpoint_format="gptq_v2"), 32, {}),
    "gptq whole rows": (gptq, gptq_config(-1), -1, {}),
    "awq": (awq, awq_config(64), 64, {}),
    "awq 128": (awq, awq_config(128), 128, {"family": "qwen3"}),
    "compressed asymmetric": (compressed, compressed_config(32), 32, {}),
    "compressed symmetric": (symmetric, compressed_config(128, symmetric=True), 128, {"symmetric": True}),
    "compressed rows": (compressed, compressed_config(-1), -1, {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with `int4` and `plain` by case, made when first asked for."""
    made = {}

    def make(case):
        if case not in made:
            write, config, each, more = CASES[case]
            made[case] = make_int4(tmp_path_factory.mktemp("model"), write, config, each, **more)
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_file_to_the_bit(models, case):
    """Held in float32 the model and a checkpoint of its dequantised values are one and the same."""
    folder = models(case)

    assert torch.equal(logits(folder / "int4", "fp32"), logits(folder / "plain", "fp32"))


@pytest.mark.parametrize("case", ["gptq", "awq", "compressed asymmetric"])
def test_lanes_agree_and_differ_from_the_file_by_the_rounding_of_activations_alone(models, case):
    folder = models(case)
    expected = logits(folder / "int4", kv_dtype="fp32")

    assert nmse(expected, hf_logits(folder / "plain", TOKENS)) < 3e-3
    cut = logits(folder / "int4", device="emulated", policy=Policy.parse(CUT), kv_dtype="fp32")
    assert nmse(cut, expected) <= 1e-4


def test_a_plan_knows_the_formats_and_reads_no_code(models, monkeypatch):
    monkeypatch.setattr("hetero_attn.checkpoints.quantised.checkpoint.QuantisedCheckpoint.read", None)

    plan = plan_model(models("gptq") / "int4", device="cpu", max_context=64)

    assert plan.workload.weight_dtype == "fp16+int4_g128"
    assert {plan.workload.format_of(shard) for shard in plan.workload.linears} == {"fp16", "int4_g128"}


def test_a_policy_holds_one_linear_otherwise(models):
    policy = Policy.parse("version: 1\nrules:\n  - {match: layers.*.down, dtype: q8}\n")
    folder = models("awq")

    assert 0 < nmse(logits(folder / "int4", policy=policy), logits(folder / "int4")) < 1e-3


def copy(models, tmp_path, case):
    return shutil.copytree(models(case) / "int4", tmp_path / "int4")


UP = "model.layers.0.mlp.up_proj."


def without(part):
    return lambda tensors: tensors.pop(UP + part)


def replaced(part, make):
    def change(tensors):
        tensors[UP + part] = make(tensors[UP + part])

    return change


def one_more(found):
    return torch.where(found == 1, 0, found)


def one_other(found):
    found = found.clone()
    found[0, 0] ^= 1
    return found


BAD = {
    "no zero points": ("gptq", without("qzeros"), CheckpointError, "up_proj has no qzeros"),
    "no scales": ("awq", without("scales"), CheckpointError, "up_proj has no scales"),
    "no shape of zeros": ("compressed asymmetric", without("weight_zero_point"), CheckpointError, "weight_zero_point"),
    "groups of other sizes": ("gptq v2", replaced("g_idx", one_more), CheckpointError, "g_idx is no such order"),
    "g_idx too short": ("gptq", replaced("g_idx", lambda found: found[:-1]), CheckpointError, "g_idx has shape"),
    "float codes": ("gptq", replaced("qweight", torch.Tensor.float), CheckpointError, "qweight is F32, expected I32"),
    "codes of one dimension": ("awq", replaced("qweight", torch.Tensor.flatten), CheckpointError, "expected a matrix"),
    "fewer groups": ("awq", replaced("scales", lambda found: found[:1]), CheckpointError, "group_size in config.json"),
    "groups that do not divide": (
        "gptq sym",
        replaced("scales", lambda found: found[:1].repeat(3, 1)),
        CheckpointError,
        "scales for 3 groups",
    ),
    "zeros of another shape": (
        "awq",
        replaced("qzeros", lambda found: found[:, :-1]),
        CheckpointError,
        "qzeros has shape",
    ),
    "another output width": (
        "awq",
        replaced("scales", lambda found: found[:, 8:]),
        CheckpointError,
        "scales has shape",
    ),
    "another model": (
        "compressed asymmetric",
        replaced("weight_packed", lambda found: found[:8]),
        CheckpointError,
        "weight_scale has shape",
    ),
    "weight_shape lies": (
        "compressed asymmetric",
        replaced("weight_shape", lambda found: found + 8),
        CheckpointError,
        "weight_shape says",
    ),
    "sym with other zeros": ("gptq sym", replaced("qzeros", one_other), CheckpointError, "says sym, but .*zero points"),
    "a zero point that wraps": (
        "gptq",
        replaced("qzeros", lambda found: found | 15),
        UnsupportedModelError,
        "zero point of 15",
    ),
    "a scale that is not finite": (
        "awq",
        replaced("scales", lambda found: found.fill_(torch.inf)),
        CheckpointError,
        "not finite",
    ),
    "both forms": (
        "gptq",
        lambda tensors: tensors.__setitem__(UP + "weight", torch.zeros(256, 128)),
        CheckpointError,
        "both quantised and plain",
    ),
    "a bias that is not zero": (
        "gptq",
        lambda tensors: tensors.__setitem__(UP + "bias", torch.ones(256)),
        CheckpointError,
        "up_proj.bias would be ignored",
    ),
    "nothing quantised": (
        "gptq",
        lambda tensors: [
            tensors.pop(name)
            for name in list(tensors)
            if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
        ],
        CheckpointError,
        "no tensor is called qweight",
    ),
}


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


def scatter(tensors):
    """Give one linear the order of inputs that act-order leaves: every other input first."""
    order = torch.cat((torch.arange(1, 128, 2), torch.arange(0, 128, 2)))
    found = tensors[UP + "qweight"].t()
    codes = ((found[..., None] >> (4 * torch.arange(8, dtype=torch.int32))) & 15).flatten(1)
    tensors[UP + "qweight"] = words(codes[:, order]).t()
    tensors[UP + "g_idx"] = tensors[UP + "g_idx"][order]
    return order


def test_groups_that_act_order_scattered_are_float32_and_said_so(models, tmp_path):
    shutil.copytree(models("gptq v2") / "plain", tmp_path / "plain")
    path, orders = copy(models, tmp_path, "gptq v2"), []
    edit_tensors(path, lambda tensors: orders.append(scatter(tensors)))
    edit_tensors(
        tmp_path / "plain",
        lambda tensors: tensors.__setitem__(UP + "weight", tensors[UP + "weight"][:, orders[0]]),
    )

    with pytest.warns(UserWarning, match="1 quantised linears .*up_proj.* float32, exactly but large.*act-order"):
        assert torch.equal(logits(path, "fp32"), logits(tmp_path / "plain", "fp32"))


@pytest.mark.parametrize("name", BAD)
def test_files_that_contradict_themselves_are_refused_by_name(models, tmp_path, name):
    case, change, kind, message = BAD[name]
    path = copy(models, tmp_path, case)
    edit_tensors(path, change)

    with pytest.raises(kind, match=message):
        logits(path)


def test_biases_that_are_zero_are_no_matter(models, tmp_path):
    path = copy(models, tmp_path, "gptq")
    edit_tensors(path, lambda tensors: tensors.__setitem__(UP + "bias", torch.zeros(256)))

    assert torch.equal(logits(path), logits(models("gptq") / "int4"))


CONFIGS = {
    "bits": (gptq_config(128, bits=3), "bits is 3, not run; read is 4 or 8"),
    "version": (awq_config(64, version="gemv"), "version is 'gemv', not run; read is gemm"),
    "checkpoint_format": (gptq_config(128, checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    "dynamic": (gptq_config(128, dynamic={"x": {}}), "dynamic"),
    "group_size": (gptq_config(0), "group_size is 0, expected -1 or"),
    "format": (
        compressed_config(32) | {"format": "marlin-24"},
        "format is 'marlin-24', not run; read is pack-quantized or int-quantized",
    ),
    "config_groups": (compressed_config(32) | {"config_groups": 7}, "config_groups"),
    "weights": (compressed_config(32) | {"config_groups": {"a": []}}, "no weights object"),
    "method": ({"quant_method": "aqlm"}, "quantised by 'aqlm'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_says_and_is_not_read_is_refused_with_what_is(models, tmp_path, name):
    config, message = CONFIGS[name]
    path = copy(models, tmp_path, "gptq")
    edit_config(path, quantization_config=config)

    with pytest.raises(HeteroError, match=message):
        plan_model(path, device="cpu", max_context=64)
