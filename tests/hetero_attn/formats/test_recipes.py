"""Recipes of formats: which weight gets which, the same answer on every lane, and what a finer head is worth."""

from functools import partial

import pytest
import torch

from hetero_attn import Policy
from hetero_attn.errors import ArgumentError
from hetero_attn.models.decoder import decoder
from hetero_attn.planning.settle import plan_model
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.recipes import formats_of
from hetero_attn.spec.tensor_names import tensor_name
from tests.support.models.gguf_models import make_gguf
from tests.support.models.moe import make_moe
from tests.support.models.runtime import model_logits, nmse
from tests.support.models.toy import make_checkpoint

TOKENS = tuple(torch.randint(260, (40,), generator=torch.Generator().manual_seed(3)).tolist())
logits = partial(model_logits, tokens=TOKENS)
SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "hidden": 128, "intermediate": 192, "layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Toy checkpoints: with a tied head and with one of its own."""
    folder = tmp_path_factory.mktemp("recipes")
    return {tied: make_checkpoint(folder / str(tied), tied=tied, **SHAPE) for tied in (True, False)}


def formats(path, dtype):
    return {shard.name: shard.weight_format for shard in plan_model(path, dtype=dtype, device="cpu").workload.linears}


def test_q4_holds_a_tied_head_and_its_embedding_once_in_q8(models):
    plan = plan_model(models[True], dtype="q4", device="cpu")

    assert formats(models[True], "q4").pop("head") == "q8" and plan.workload.embed_bytes == 0
    assert {name: found for name, found in formats(models[True], "q4").items() if found != "q4"} == {"head": "q8"}
    assert plan.workload.weight_dtype == "q4"


def test_q4_of_a_head_of_its_own_is_q4_throughout(models):
    chosen = formats_of("q4", ModelConfig.from_dir(models[False]))

    assert set(formats(models[False], "q4").values()) == {"q4"}
    assert (chosen.embed, chosen.label) == ("bf16", "q4")


def test_the_finer_table_takes_fewer_bytes_than_two(models):
    """On the CPU a q4 head beside a bf16 embedding takes 20.5 bits a weight, one q8 table 8.5."""
    coarse = plan_model(models[True], Policy.parse("rules:\n  - {match: head, dtype: q4}"), dtype="q4", device="cpu")
    fine = plan_model(models[True], dtype="q4", device="cpu")
    total = [plan.workload.weight_bytes + plan.workload.embed_bytes for plan in (fine, coarse)]

    assert total[0] < total[1]


def test_q4_m_keeps_down_of_experts_finer(tmp_path):
    """Of routed and of shared ones; the answer is the same on every lane, and nearer to the truth than q4's."""
    path = make_moe(tmp_path, "qwen2_moe", layers=2)
    config = ModelConfig.from_dir(path)
    experts, shared = decoder(config, formats_of("q4_m", config)).layers[1][1].linears[0::2]

    assert [linear.format for linear in experts.first] == ["q4", "q8"] and shared.format == "q8"
    ours, coarse, exact, lanes = (
        logits(path, dtype, device)
        for dtype, device in (("q4_m", "cpu"), ("q4", "cpu"), ("fp32", "cpu"), ("q4_m", "emulated"))
    )
    assert nmse(ours, exact) < 0.8 * nmse(coarse, exact)
    assert nmse(lanes, ours) < 1e-3


def test_q4_m_keeps_values_down_and_head_finer(models):
    for tied, path in models.items():
        config, chosen = ModelConfig.from_dir(path), formats_of("q4_m", ModelConfig.from_dir(path))
        by_part = {part: chosen.of(tensor_name(part, 1)) for part in ("q", "k", "v", "o", "gate", "up", "down")}

        assert {part for part, found in by_part.items() if found == "q8"} == {"v", "down"}
        assert chosen.of(tensor_name("embed" if tied else "head")) == "q8" and chosen.label == "q4_m"
        assert config.tie_word_embeddings == tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["q4", "q4_m"])
def test_placement_does_not_change_the_answer_of_a_recipe(models, dtype, tied):
    """On the emulated GPU the embedding is packed apart from the head, from the same numbers."""
    split = logits(models[tied], dtype, "emulated", gpu_memory="2MiB")

    assert nmse(split, logits(models[tied], dtype)) < 1e-3


def test_finer_recipes_are_nearer_to_the_weights(models):
    exact = logits(models[True], "fp32")
    coarse = Policy.parse("rules:\n  - {match: head, dtype: q4}")
    errors = [nmse(logits(models[True], "q4", policy=coarse), exact)]
    errors += [nmse(logits(models[True], dtype), exact) for dtype in ("q4", "q4_m", "q8")]

    assert errors == sorted(errors, reverse=True)


def test_an_embedding_of_other_codes_is_packed_anew(tmp_path):
    """A GGUF file whose embedding is Q6_K: on the CPU the head's blocks are read, on three lanes its own."""
    gguf_file, plain = make_gguf(tmp_path, {"token_embd": "Q6_K"}, "Q6_K", tied=True)

    assert torch.equal(logits(gguf_file, "q4"), logits(plain, "q4"))
    split = logits(gguf_file, "q4", "emulated", gpu_memory="8MiB")
    assert nmse(split, logits(plain, "q4")) < 1e-3


def test_a_recipe_that_does_not_exist_is_named_with_those_there_are(models):
    with pytest.raises(ArgumentError, match="'q4_k_m'; it must be one of .* q4, q4_m"):
        plan_model(models[True], dtype="q4_k_m", device="cpu")
