"""Gated DeltaNet from quantised safetensors, its linears whose rows come in turn included: the values of the codes."""

import pytest
import torch

from hetero_attn import LLM
from hetero_attn.checkpoints.sources import open_source
from hetero_attn.errors import CheckpointError
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from tests.support.models.delta_gguf import SHAPE
from tests.support.models.moe import make_moe
from tests.support.models.toy import edit_json
from tests.support.quantised.int4_models import (
    awq,
    awq_config,
    compressed,
    compressed_config,
    gptq,
    gptq_config,
    make_int4,
)
from tests.support.quantised.scaled_models import fp8_blocks, make_scaled

TOKENS = torch.randint(307, (20,), generator=torch.Generator().manual_seed(4)).tolist()
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {"awq": (awq, awq_config), "gptq": (gptq, gptq_config), "compressed": (compressed, compressed_config)}


def quantised(folder, family, kind):
    """(the quantised model, the same values in float32)."""
    plain = make_moe(folder / "plain", family, layers=4, **SHAPE | {"layer_types": None})
    if kind == "fp8":
        return make_scaled(folder, {"": fp8_blocks(128, 128)}, FP8, plain=plain) / "scaled", plain
    write, config = INT4[kind]
    return make_int4(folder, write, config(32), 32, plain=plain) / "int4", plain


@pytest.mark.table
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
@pytest.mark.parametrize("kind", [*INT4, "fp8"])
def test_logits_are_those_of_the_values(family, kind, tmp_path):
    """To the bit in float32: every row is where the model has it."""
    path, plain = quantised(tmp_path, family, kind)
    with open_source(path) as source:
        assert source.dtype("model.layers.0.linear_attn.v_proj.weight") not in ("fp32", "bf16")
        assert source.shape("model.layers.3.self_attn.q_gate_proj.weight") == (128, 128)
    logits = []
    for each in (path, plain):
        with LLM(each, device="cpu", dtype="fp32", max_context=64, progress=False) as llm:
            logits.append(llm.logits(TOKENS))

    assert torch.equal(*logits)


def test_rows_that_are_no_whole_groups_are_refused(tmp_path):
    path, _ = quantised(tmp_path, "qwen3_next", "awq")
    edit_json(path / "config.json", linear_key_head_dim=48)

    with (
        pytest.raises(CheckpointError, match="in_proj_qkvz has 384 rows, expected groups of 224"),
        open_source(path) as source,
    ):
        source.check(decoder(ModelConfig.from_dir(path)))
