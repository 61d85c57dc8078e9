"""FP8, int8, MXFP4, NVFP4 and NF4 files that contradict themselves or say what is not read: refused by name."""

import shutil

import pytest
import torch

from hetero_attn.errors import CheckpointError, HeteroError, UnsupportedModelError
from hetero_attn.planning.settle import plan_model
from tests.support.quantised.int4_models import edit_config, edit_tensors
from tests.support.quantised.quantised_models import UP, added, first_of, logits, replaced, without
from tests.support.quantised.scaled_cases import BLOCKS, BNB, SCALED_CASES, W8A8
from tests.support.quantised.scaled_models import (
    compressed_config,
)

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
def test_files_that_contradict_themselves_are_refused_by_name(scaled_models, tmp_path, name):
    case, change, kind, message = BAD[name]
    path = shutil.copytree(scaled_models(case) / "scaled", tmp_path / "scaled")
    if change is None:
        edit_config(path, quantization_config=SCALED_CASES[case][1] | {"ignore": [UP.removesuffix(".")]})
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
def test_what_a_config_says_and_is_not_read_is_refused_with_what_is(scaled_models, tmp_path, name):
    config, message = CONFIGS[name]
    path = shutil.copytree(scaled_models("w8a8") / "scaled", tmp_path / "scaled")
    edit_config(path, quantization_config=config)

    with pytest.raises(HeteroError, match=message):
        plan_model(path, device="cpu", max_context=64)
