"""`quantize` of mixtures of experts: files that read back as the same model, on every lane, and what a text does."""

import pytest
import torch

from hetero_attn import LLM
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.tools.quantize.table import kept_table
from hetero_attn.tools.quantize.write import quantize
from tests.support.models.moe import make_moe, moe_gguf
from tests.support.models.runtime import nmse
from tests.support.models.toy import save_tokenizer

TOKENS = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(2)).tolist()
WIDTHS = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}


def logits(path, device="cpu", **options):
    with LLM(path, device=device, max_context=64, progress=False, num_threads=2, **options) as llm:
        return llm.logits(TOKENS)


def checkpoint(path, family, layers=2):
    widths = {"intermediate_size": 96}
    if family.startswith("qwen"):
        widths["moe_intermediate_size"] = 64
    if family == "qwen2_moe":
        widths["shared_expert_intermediate_size"] = 96
    return make_moe(path, family, layers=layers, **WIDTHS, **widths)


@pytest.mark.parametrize("family", ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"))
def test_safetensors_become_a_file_of_their_architecture(tmp_path, family):
    """Refused before. Experts of a layer are one tensor each for gate, up and down, and have one type."""
    path = checkpoint(tmp_path / "model", family)
    made = quantize(path, tmp_path / "model.gguf", "q8", threads=2)

    assert nmse(logits(made.path, dtype="fp32"), logits(path, dtype="fp32")) < 1e-2
    with GgufCheckpoint.open(made.path) as source:
        names = set(source._theirs)
        assert {f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")} <= names
        assert source._theirs["blk.1.ffn_gate_inp.weight"].type.name == "F32"


def test_experts_that_files_made_here_cannot_say_are_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModelError, match="GptOssForCausalLM are not made from safetensors"):
        quantize(make_moe(tmp_path / "model", "gpt_oss", layers=1), tmp_path / "model.gguf", "q8", threads=2)


def test_a_gguf_source_keeps_its_codes_and_every_lane_gives_the_same_bits(tmp_path):
    file, _ = moe_gguf(tmp_path, "qwen3_moe", "Q5_1")
    made = quantize(file, tmp_path / "again.gguf", bits=6.5, threads=2)
    with GgufCheckpoint.open(file) as before, GgufCheckpoint.open(made.path) as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)
    found = []
    for units in (0, 7):
        (tmp_path / "policy.yaml").write_text(
            "gpu_memory: 1GiB\nrules:\n"
            f"  - {{match: 'layers.*.experts', gpu: {units} units, cpu: {12 - units} units}}\n"
            "  - {match: '*', gpu: 1.0}\n"
        )
        found.append(logits(made.path, "emulated", policy=tmp_path / "policy.yaml"))
    assert torch.equal(*found)


@pytest.mark.matrix
def test_on_a_text_experts_are_measured_together_and_rounded_each_for_its_own_tokens(tmp_path):
    """Nearer to the model than rounding to the nearest, in the very types that the text chose."""
    path = checkpoint(tmp_path / "model", "qwen2_moe", layers=1)
    save_tokenizer(path)
    text = " ".join(f"{chr(97 + index % 26)}{index * 7 % 31} words" for index in range(60))
    calibrated = quantize(path, tmp_path / "text.gguf", bits=5.0, text=text, threads=2)

    kinds = {calibrated.types[f"model.layers.0.mlp.experts.{index}.gate_proj.weight"] for index in range(10)}
    assert len(kinds) == 1 and calibrated.bits <= 5.0
    assert any(line.strip().startswith("gate_proj") for line in kept_table(calibrated.path))
    assert nmse(logits(calibrated.path, dtype="fp32"), logits(path, dtype="fp32")) < 0.1
