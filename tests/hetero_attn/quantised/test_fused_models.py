"""Packed weights of families whose files have several linears in one tensor, or q and k in pairs: Phi-3, GLM-4, Cohere 2."""

import shutil
from functools import partial

import pytest
import torch

from hetero_attn import Policy
from hetero_attn.checkpoints.sources import open_source
from hetero_attn.errors import CheckpointError
from tests.support.models.runtime import model_logits, nmse
from tests.support.models.toy import make_family_checkpoint
from tests.support.quantised.int4_models import awq, awq_config, edit_config, gptq, gptq_config, make_int4
from tests.support.quantised.scaled_models import fp8_blocks, fp8_channel, make_scaled

TOKENS = torch.randint(260, (24,), generator=torch.Generator().manual_seed(5)).tolist()
logits = partial(model_logits, tokens=TOKENS)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CUT = "version: 1\nrules:\n  - {match: layers.*, gpu: 0.5, stream: 0.25, cpu: 0.25}\n"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GLM4 = {
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
# family, further values of its config, what writes its linears
CASES = {
    "phi3 gptq": ("phi3", {}, (gptq, gptq_config(64), 64)),
    "phi3 awq": ("phi3", {}, (awq, awq_config(128), 128)),
    "phi3 fp8": ("phi3", {}, ({"": fp8_blocks(128, 128)}, BLOCKS)),
    "glm4 gptq": ("glm4", GLM4, (gptq, gptq_config(32), 32)),
    "glm4 fp8": ("glm4", GLM4, ({"": fp8_channel, "o": None}, {"quant_method": "fbgemm_fp8"})),
    "cohere2 gptq": ("cohere2", {"sliding_window": 9}, (gptq, gptq_config(64), 64)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(packed, plain) by case, made when first asked for."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("model")
            family, values, how = CASES[case]
            plain = make_family_checkpoint(folder / "plain", family, **SIZES | values)
            (make_int4 if callable(how[0]) else make_scaled)(folder, *how, plain=plain)
            made[case] = folder / ("int4" if callable(how[0]) else "scaled"), plain
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_file_to_the_bit(models, case):
    """Held in float32 the model and a checkpoint of its dequantised values are one and the same."""
    packed, plain = models(case)

    assert torch.equal(logits(packed, "fp32"), logits(plain, "fp32"))


@pytest.mark.parametrize("case", ["phi3 gptq", "glm4 fp8"])
def test_packed_weights_differ_by_the_rounding_of_activations_alone(models, case):
    packed, plain = models(case)
    expected = logits(packed, kv_dtype="fp32")

    assert nmse(expected, logits(plain, "fp32")) < 3e-3
    assert nmse(logits(packed, device="emulated", policy=Policy.parse(CUT), kv_dtype="fp32"), expected) <= 1e-4


def test_packed_rows_that_do_not_fit_are_named(models, tmp_path):
    packed = shutil.copytree(models("phi3 gptq")[0], tmp_path / "int4")
    edit_config(packed, num_key_value_heads=4)

    with pytest.raises(CheckpointError, match=r"qkv_proj has 256 rows, expected 384: those of q, k, v"):
        open_source(packed)
