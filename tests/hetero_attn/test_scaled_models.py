"""FP8, int8, MXFP4, NVFP4 and NF4 models: the values of the file and nothing else, on every lane, or a refusal."""

import shutil
from functools import partial

import pytest
import torch

from cpu_kernels.formats import format_of
from hetero_attn import Policy
from hetero_attn.checkpoints.sources import open_source, read_config
from hetero_attn.errors import CheckpointError, HeteroError, UnsupportedModelError
from hetero_attn.models.decoder import decoder
from hetero_attn.planning.settle import plan_model
from tests.support.cpu_oracles import kernels
from tests.support.int4_models import edit_config, edit_tensors
from tests.support.runtime import model_logits, nmse
from tests.support.scaled_models import (
    compressed_config,
    fp8_blocks,
    fp8_channel,
    fp8_tensor,
    int8_channel,
    int8_packed,
    make_scaled,
    mxfp4,
    nf4,
    nvfp4,
)
from tests.support.toy import hf_logits

TOKENS = torch.randint(260, (24,), generator=torch.Generator().manual_seed(5)).tolist()
logits = partial(model_logits, tokens=TOKENS)
CUT = "version: 1\nrules:\n  - {match: layers.*, gpu: 0.5, stream: 0.25, cpu: 0.25}\n"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
W8A8 = compressed_config("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel")
# mixed kinds in one layer: what compressed-tensors calls mixed-precision, with its groups of 8 and of 4 bits
MIXED = compressed_config("mixed-precision", num_bits=8, type="float", symmetric=True, strategy="channel")
MIXED["config_groups"]["group_1"] = {
    "targets": ["re:.*down_proj"],
    "weights": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32},
}
MIXED["config_groups"]["group_2"] = {
    "targets": ["re:.*up_proj"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
}

# writers by linear, config, further arguments, the formats that the linears are held in
CASES = {
    "fp8 blocks": ({"": fp8_blocks(128, 128)}, BLOCKS, {}, {"fp8"}),
    "fp8 partial blocks": (
        {"": fp8_blocks(128, 128, torch.bfloat16)},
        BLOCKS,
        {"hidden": 192, "num_heads": 6, "num_kv_heads": 2, "intermediate": 320},
        {"fp8"},
    ),
    "fp8 powers of two": (
        {"": fp8_blocks(64, 256, torch.float8_e8m0fnu)},
        BLOCKS | {"weight_block_size": [64, 256], "scale_fmt": "ue8m0"},
        {},
        {"fp8"},
    ),
    "fp8 narrow blocks": (
        {"": fp8_blocks(32, 32)},
        BLOCKS | {"weight_block_size": [32, 32]},
        {},
        {"fp32"},
    ),
    "fp8 tensor": ({"": fp8_tensor}, {"quant_method": "modelopt", "quant_algo": "FP8"}, {}, {"fp8"}),
    "fbgemm": ({"": fp8_channel}, {"quant_method": "fbgemm_fp8"}, {}, {"fp8"}),
    "w8a8": ({"": int8_channel}, W8A8, {}, {"int8"}),
    "int8 packed": (
        {"": int8_packed(128)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=True, strategy="group", group_size=128),
        {},
        {"int8"},
    ),
    "int8 packed in narrow groups": (
        {"": int8_packed(32)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=True, strategy="group", group_size=32),
        {},
        {"uint8_g32"},
    ),
    "int8 packed in narrow groups, float32 scales": (
        {"": int8_packed(32, scales=torch.float32)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=True, strategy="group", group_size=32),
        {},
        {"fp32"},
    ),
    "int8 packed with zero points": (
        {"": int8_packed(64, symmetric=False)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="group", group_size=64),
        {},
        {"uint8_g64"},
    ),
    "int8 packed with zero points of wide groups": (
        {"": int8_packed(256, symmetric=False)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="group", group_size=256),
        {"hidden": 256, "num_heads": 8, "num_kv_heads": 2, "intermediate": 512},
        {"uint8_g128"},
    ),
    "int8 packed with zero points and float32 scales": (
        {"": int8_packed(64, symmetric=False, scales=torch.float32)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="group", group_size=64),
        {},
        {"fp32"},
    ),
    "mxfp4": (
        {"": mxfp4},
        compressed_config("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        {},
        {"mxfp4"},
    ),
    "nvfp4": (
        {"": nvfp4(model_opt=False)},
        compressed_config("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        {},
        {"nvfp4"},
    ),
    "modelopt nvfp4": ({"": nvfp4(model_opt=True)}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}, {"nvfp4"}),
    "nf4": ({"": nf4(nested=False)}, BNB, {}, {"nf4"}),
    "nf4 nested": ({"": nf4(nested=True), "k": None}, BNB, {}, {"nf4", "bf16"}),
    "mixed": (
        {"": fp8_channel, "down": mxfp4, "up": int8_packed(128), "v": None, "o": int8_channel},
        MIXED,
        {},
        {"fp8", "bf16", "mxfp4", "int8"},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with `scaled` and `plain` by case, made when first asked for."""
    made = {}

    def make(case):
        if case not in made:
            writers, config, shape, _ = CASES[case]
            made[case] = make_scaled(tmp_path_factory.mktemp("model"), writers, config, **shape)
        return made[case]

    return make


@pytest.mark.filterwarnings("ignore:.*held as float32")
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_file_to_the_bit(models, case):
    """Held in float32 the model and a checkpoint of its dequantised values are one and the same."""
    folder = models(case)

    assert torch.equal(logits(folder / "scaled", "fp32"), logits(folder / "plain", "fp32"))


@pytest.mark.filterwarnings("ignore:.*held as float32")
@pytest.mark.parametrize("case", CASES)
def test_linears_are_held_in_the_forms_of_their_file(models, case):
    workload = plan_model(models(case) / "scaled", device="cpu", max_context=64).workload
    mixes = {workload.format_of(shard) for shard in workload.linears if shard.kind != "head"}

    assert {part.partition("*")[0] for mix in mixes for part in mix.split("+")} == CASES[case][3]


@pytest.mark.parametrize(
    "case", ["fp8 blocks", "w8a8", "int8 packed with zero points", "mxfp4", "nvfp4", "nf4", "mixed"]
)
def test_lanes_agree_and_differ_from_the_file_by_the_rounding_of_activations_alone(models, case):
    folder = models(case)
    expected = logits(folder / "scaled", kv_dtype="fp32")

    assert nmse(expected, hf_logits(folder / "plain", TOKENS)) < 3e-3
    cut = logits(folder / "scaled", device="emulated", policy=Policy.parse(CUT), kv_dtype="fp32")
    assert nmse(cut, expected) <= 1e-4


@pytest.mark.parametrize(
    ("name", "file_bits"), [("nvfp4", 4.5), ("mxfp4", 4.25), ("nf4", 4.5), ("fp8", 8), ("int8", 8)]
)
def test_a_packed_weight_is_little_larger_than_the_files(name, file_bits):
    """NVFP4 was held with a float32 scale for every 16 inputs, 6 bits a weight."""
    assert format_of(name).bits_per_weight() <= 1.032 * file_bits


def test_fp8_is_packed_as_q8_where_that_is_asked_for(models):
    folder = models("fp8 blocks")

    assert 0 < nmse(logits(folder / "scaled", "q8"), logits(folder / "scaled")) < 1e-2


def test_q8_of_fp8_blocks_is_off_by_less_than_five_in_a_hundred_thousand():
    """Of normal weights as FP8 files have them; the files' own rounding is off by 7 in ten thousand."""
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    scale = values.abs().amax() / 448
    values = (values / scale).to(torch.float8_e4m3fn).float() * scale
    weight, found = torch.empty(4, format_of("q8").block_bytes(512), dtype=torch.uint8), torch.empty(64, 512)

    kernels().pack(values, "q8", weight)
    kernels().unpack_rows(weight, "q8", torch.arange(64), found)

    assert nmse(found, values) < 5e-5


def test_what_no_format_holds_is_said(models):
    with pytest.warns(UserWarning, match="14 quantised linears .* held as float32, .*scales of 32 inputs"):
        logits(models("fp8 narrow blocks") / "scaled")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8", "auto"])
def test_rows_of_an_embedding_may_end_within_a_group_of_codes(tmp_path, dtype):
    """192 inputs in groups of 128."""
    shape = {"hidden": 192, "num_heads": 6, "num_kv_heads": 2, "layers": 1}
    folder = make_scaled(tmp_path, {"": int8_channel}, W8A8, **shape)
    name, values = "model.embed_tokens.weight", {}

    def quantise(tensors):
        parts, values[name] = int8_channel(*tensors.pop(name).shape, torch.Generator().manual_seed(1))
        tensors |= {f"model.embed_tokens.{part}": item for part, item in parts.items()}

    edit_tensors(folder / "scaled", quantise)
    edit_tensors(folder / "plain", lambda tensors: tensors.update(values))

    assert nmse(logits(folder / "scaled", dtype), logits(folder / "plain", "fp32")) < (
        1e-10 if dtype == "fp32" else 3e-2
    )


def test_oddities_met_on_opening_are_said_of_quantised_models_too(models):
    with open_source(models("w8a8") / "scaled") as source:
        source.warnings.append("something odd")

        assert source.check(decoder(read_config(source.path))) == ["something odd"]


UP = "model.layers.0.mlp.up_proj."


def without(part):
    return lambda tensors: tensors.pop(UP + part)


def replaced(part, make):
    def change(tensors):
        tensors[UP + part] = make(tensors[UP + part])

    return change


def first_of(value, dtype=None):
    def change(found):
        found = found.clone()
        (found if dtype is None else found.view(dtype)).view(-1)[0] = value
        return found

    return change


def added(name, values):
    return lambda tensors: tensors.__setitem__(name, values)


BAD = {
    "fp8 without scales": ("fp8 blocks", without("weight_scale_inv"), CheckpointError, "up_proj has no weight_scale"),
    "scales without fp8": (
        "fp8 blocks",
        replaced("weight", torch.Tensor.bfloat16),
        CheckpointError,
        "up_proj.weight_scale_inv is a scale without quantised weights",
    ),
    "fp8 NaN": ("fp8 blocks", replaced("weight", first_of(127, torch.uint8)), CheckpointError, "weight holds NaN"),
    "fp8 infinite scale": (
        "fp8 blocks",
        replaced("weight_scale_inv", first_of(torch.inf)),
        CheckpointError,
        "weight_scale_inv holds a scale that is not finite",
    ),
    "fp8 other blocks": (
        "fp8 blocks",
        replaced("weight_scale_inv", lambda found: found.repeat(1, 3)),
        CheckpointError,
        r"weight_scale_inv has shape \[2, 3\], expected scales of a weight of \[256, 128\] in blocks of 128x128",
    ),
    "fp8 integer scale": (
        "fp8 blocks",
        replaced("weight_scale_inv", torch.Tensor.int),
        CheckpointError,
        "weight_scale_inv is I32, expected F32 or",
    ),
    "fp8 exponent of NaN": (
        "fp8 powers of two",
        replaced("weight_scale_inv", first_of(255, torch.uint8)),
        CheckpointError,
        "weight_scale_inv is NaN",
    ),
    "int8 zeros of another shape": (
        "int8 packed with zero points",
        replaced("weight_zero_point", lambda found: found[1:]),
        CheckpointError,
        "weight_zero_point has shape",
    ),
    "int8 shape lies": (
        "int8 packed",
        replaced("weight_shape", lambda found: found + 4),
        CheckpointError,
        "weight_shape says",
    ),
    "ignored and packed": (
        "w8a8",
        None,
        CheckpointError,
        "up_proj is quantised, but config.json says that it is not",
    ),
    "mxfp4 NaN": ("mxfp4", replaced("weight_scale", first_of(255)), CheckpointError, "not finite"),
    "mxfp4 without scales": ("mxfp4", without("weight_scale"), CheckpointError, "up_proj has no weight_scale"),
    "mxfp4 fewer scales": (
        "mxfp4",
        replaced("weight_scale", lambda found: found[:, 1:]),
        CheckpointError,
        r"weight_scale has shape \[256, 3\], expected \[256, 4\]",
    ),
    "nvfp4 without its factor": (
        "nvfp4",
        without("weight_global_scale"),
        CheckpointError,
        "up_proj has no weight_global_scale",
    ),
    "nvfp4 divides by zero": (
        "nvfp4",
        replaced("weight_global_scale", torch.zeros_like),
        CheckpointError,
        "weight_global_scale is 0",
    ),
    "nvfp4 divides by less": (
        "nvfp4",
        replaced("weight_global_scale", torch.neg),
        CheckpointError,
        "weight_global_scale is -.*a positive number to divide by",
    ),
    "nvfp4 negative": (
        "nvfp4",
        replaced("weight_scale", first_of(200, torch.uint8)),
        CheckpointError,
        "weight_scale is below 0",
    ),
    "modelopt negative": (
        "modelopt nvfp4",
        replaced("weight_scale_2", torch.neg),
        CheckpointError,
        "weight_scale_2 is -.*a positive number of the size",
    ),
    "nvfp4 NaN": (
        "nvfp4",
        replaced("weight_scale", first_of(127, torch.uint8)),
        CheckpointError,
        "weight_scale holds a scale that is not finite",
    ),
    "nvfp4 float codes": (
        "nvfp4",
        replaced("weight_packed", torch.Tensor.float),
        CheckpointError,
        "weight_packed is F32",
    ),
    "nf4 without its state": (
        "nf4",
        without("weight.quant_state.bitsandbytes__nf4"),
        CheckpointError,
        "has no weight.quant_state",
    ),
    "nf4 state that is none": (
        "nf4",
        replaced("weight.quant_state.bitsandbytes__nf4", first_of(91)),
        CheckpointError,
        "no JSON object",
    ),
    "nf4 another table": (
        "nf4",
        replaced("weight.quant_map", first_of(0.5)),
        UnsupportedModelError,
        "another table than NF4",
    ),
    "nf4 infinite": ("nf4", replaced("weight.absmax", first_of(torch.inf)), CheckpointError, "absmax holds a scale"),
    "nf4 half nested": (
        "nf4 nested",
        without("weight.nested_quant_map"),
        CheckpointError,
        "nested_absmax is there alone",
    ),
    "nf4 fewer codes": (
        "nf4",
        replaced("weight", lambda found: found[1:]),
        CheckpointError,
        "weight has shape",
    ),
    "order of inputs": (
        "int8 packed",
        added(UP + "weight_g_idx", torch.arange(128).flip(0).int() // 128),
        UnsupportedModelError,
        "up_proj.weight_g_idx belongs to a quantised linear and is not read",
    ),
    "factors on inputs": (
        "modelopt nvfp4",
        added(UP + "pre_quant_scale", torch.full((128,), 0.5)),
        UnsupportedModelError,
        "up_proj.pre_quant_scale belongs to a quantised linear and is not read",
    ),
    "both forms": ("mxfp4", added(UP + "weight", torch.zeros(256, 128)), CheckpointError, "both quantised and plain"),
}


@pytest.mark.filterwarnings("ignore:.*held as float32")
@pytest.mark.parametrize("name", BAD)
def test_files_that_contradict_themselves_are_refused_by_name(models, tmp_path, name):
    case, change, kind, message = BAD[name]
    path = shutil.copytree(models(case) / "scaled", tmp_path / "scaled")
    if change is None:
        edit_config(path, quantization_config=CASES[case][1] | {"ignore": [UP.removesuffix(".")]})
    else:
        edit_tensors(path, change)

    with pytest.raises(kind, match=message):
        logits(path)


CONFIGS = {
    "algorithm": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ', not run; read is"),
    "kind of 4 bits": (BNB | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4', not run; read is nf4"),
    "bits of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_4bit is False"),
    "blocks": (BLOCKS | {"weight_block_size": [128, "a"]}, "weight_block_size is .*two numbers"),
    "bits": (
        compressed_config("pack-quantized", num_bits=3, type="int", strategy="channel"),
        "num_bits is 3, not run; read is 4 or 8",
    ),
    "strategy": (
        compressed_config("int-quantized", num_bits=8, type="int", strategy="token"),
        "strategy is 'token', not run",
    ),
    "type": (compressed_config("int-quantized", num_bits=8, type="complex", strategy="channel"), "type is 'complex'"),
    "ignore": (W8A8 | {"ignore": [7]}, "ignore is .*a list of names"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_says_and_is_not_read_is_refused_with_what_is(models, tmp_path, name):
    config, message = CONFIGS[name]
    path = shutil.copytree(models("w8a8") / "scaled", tmp_path / "scaled")
    edit_config(path, quantization_config=config)

    with pytest.raises(HeteroError, match=message):
        plan_model(path, device="cpu", max_context=64)
