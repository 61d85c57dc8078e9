"""GPTQ, AWQ and compressed-tensors models: the values of the file and nothing else, on every lane, or a refusal by name."""

import functools
import shutil
from functools import partial

import pytest
import torch

from hetero_attn import Policy
from hetero_attn.errors import CheckpointError, HeteroError, UnsupportedModelError
from hetero_attn.planning.settle import plan_model
from tests.support.int4_data import random_groups
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


def test_gptq_may_quantise_single_linears_in_ways_of_their_own_or_not_at_all(models, tmp_path):
    """Such files, of Qwen's mixtures among others, were refused."""
    shutil.copytree(models("gptq"), tmp_path, dirs_exist_ok=True)
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


def scatter(folder, linears, bits=4):
    """Give linears of `folder`/int4 and `folder`/plain the order of inputs that act-order leaves; one order for each
    number of inputs."""

    def order_of(inputs):
        return torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))

    def in_file(tensors):
        for prefix in linears:
            found, index = tensors[f"{prefix}qweight"].t(), tensors[f"{prefix}g_idx"]
            shifts = bits * torch.arange(32 // bits, dtype=torch.int32)
            codes = ((found[..., None] >> shifts) & (1 << bits) - 1).flatten(1)[:, order_of(len(index))]
            stored = words(codes) if bits == 4 else codes.to(torch.uint8).contiguous().view(torch.int32)
            tensors |= {f"{prefix}qweight": stored.t(), f"{prefix}g_idx": index[order_of(len(index))]}

    def in_plain(tensors):
        for name in (f"{prefix}weight" for prefix in linears):
            tensors[name] = tensors[name][:, order_of(tensors[name].shape[1])]

    edit_tensors(folder / "int4", in_file)
    edit_tensors(folder / "plain", in_plain)


LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
LINEARS += ("mlp.up_proj", "mlp.down_proj")
ALL_LINEARS = [f"model.layers.{layer}.{linear}." for layer in range(2) for linear in LINEARS]
EIGHT_BITS = functools.partial(gptq_of_8_bits, taken=0)
# writer, config, inputs of a group, further arguments of make_int4, bits, what the linears are held in
ACT_ORDER = {
    "4 bits": (gptq_v2, gptq_config(32, checkpoint_format="gptq_v2"), 32, {"family": "qwen3"}, 4, "int4_g32"),
    "4 bits, symmetric": (gptq, gptq_config(64, sym=True), 64, {"symmetric": True}, 4, "int4_g64"),
    "8 bits": (EIGHT_BITS, gptq_config(64, bits=8, checkpoint_format="gptq_v2"), 64, {}, 8, "uint8_g64"),
}


@pytest.mark.parametrize("case", ACT_ORDER)
def test_act_order_is_held_packed_and_exactly(tmp_path, case):
    """Such linears were held as float32, eight times their file."""
    write, config, each, more, bits, held = ACT_ORDER[case]
    folder = make_int4(tmp_path, write, config, each, **more)
    in_runs = plan_model(folder / "int4", device="cpu", max_context=64).workload
    scatter(folder, ALL_LINEARS, bits)
    scattered = plan_model(folder / "int4", device="cpu", max_context=64).workload

    assert {scattered.format_of(shard) for shard in scattered.linears} == {"fp16", held}
    assert scattered.linears == in_runs.linears
    orders = 2 * (3 * 128 + 256)  # of qkv, o, gate_up and down
    assert scattered.resident_bytes == in_runs.resident_bytes + 4 * orders
    assert torch.equal(logits(folder / "int4", "fp32"), logits(folder / "plain", "fp32"))
    packed = logits(folder / "int4", kv_dtype="fp32")
    assert nmse(packed, hf_logits(folder / "plain", TOKENS)) < 3e-3
    cut = logits(folder / "int4", device="emulated", policy=Policy.parse(CUT), kv_dtype="fp32")
    assert nmse(cut, packed) <= 1e-4


def test_act_order_is_taken_back_where_weights_are_packed_anew(tmp_path):
    write, config, each, more, bits, _ = ACT_ORDER["4 bits"]
    folder = make_int4(tmp_path, write, config, each, **more)
    scatter(folder, ALL_LINEARS, bits)
    policy = Policy.parse("version: 1\nrules:\n  - {match: layers.*.down, dtype: q8}\n")

    expected = logits(folder / "plain", "q8", kv_dtype="fp32")

    assert nmse(logits(folder / "int4", "q8", kv_dtype="fp32"), expected) <= 1e-4
    assert nmse(logits(folder / "int4", policy=policy, kv_dtype="fp32"), expected) < 3e-3


def test_groups_that_act_order_scattered_apart_are_float32_and_said_so(models, tmp_path):
    """gate and up multiply the same rows, which have one order."""
    shutil.copytree(models("gptq v2"), tmp_path, dirs_exist_ok=True)
    scatter(tmp_path, [UP])

    with pytest.warns(UserWarning, match="1 quantised linears .*up_proj.* float32, exactly but large.*act-order"):
        values = logits(tmp_path / "int4", kv_dtype="fp32")

    assert torch.equal(logits(tmp_path / "int4", "fp32"), logits(tmp_path / "plain", "fp32"))
    assert nmse(values, hf_logits(tmp_path / "plain", TOKENS)) < 3e-3


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
    "dynamic": (gptq_config(128, dynamic={"x": 7}), "dynamic is .*, expected an object of objects"),
    "dynamic bits": (gptq_config(128, dynamic={"-:a": {}, "+:x": {"bits": 3}}), "bits is 3, not run; read is 4 or 8"),
    "dynamic sym": (gptq_config(128, dynamic={"x": {"sym": True}}), "dynamic: x: sym is True, not run; read is false"),
    "dynamic without end": (
        gptq_config(128, dynamic={str(size): {"group_size": size} for size in range(1, 99)}),
        "98 ways to quantise', expected at most 64",
    ),
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
