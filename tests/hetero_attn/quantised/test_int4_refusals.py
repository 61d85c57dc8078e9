"""GPTQ, AWQ and compressed-tensors files that contradict themselves or say what is not read: refused by name."""

import shutil

import pytest
import torch

from hetero_attn.errors import CheckpointError, HeteroError, UnsupportedModelError
from hetero_attn.planning.settle import plan_model
from tests.support.quantised.int4_models import (
    awq_config,
    compressed_config,
    edit_config,
    edit_tensors,
    gptq_config,
)
from tests.support.quantised.quantised_models import UP, logits, one_other, replaced, without


def copy(int4_models, tmp_path, case):
    return shutil.copytree(int4_models(case) / "int4", tmp_path / "int4")


def one_more(found):
    return torch.where(found == 1, 0, found)


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


@pytest.mark.parametrize("name", BAD)
def test_files_that_contradict_themselves_are_refused_by_name(int4_models, tmp_path, name):
    case, change, kind, message = BAD[name]
    path = copy(int4_models, tmp_path, case)
    edit_tensors(path, change)

    with pytest.raises(kind, match=message):
        logits(path)


def test_biases_that_are_zero_are_no_matter(int4_models, tmp_path):
    path = copy(int4_models, tmp_path, "gptq")
    edit_tensors(path, lambda tensors: tensors.__setitem__(UP + "bias", torch.zeros(256)))

    assert torch.equal(logits(path), logits(int4_models("gptq") / "int4"))


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
def test_what_a_config_says_and_is_not_read_is_refused_with_what_is(int4_models, tmp_path, name):
    config, message = CONFIGS[name]
    path = copy(int4_models, tmp_path, "gptq")
    edit_config(path, quantization_config=config)

    with pytest.raises(HeteroError, match=message):
        plan_model(path, device="cpu", max_context=64)
