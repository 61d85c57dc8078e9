"""Plans of mixtures of experts: bytes and rows that a pass is expected to read, from a config alone."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hetero_attn import plan_model
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from hetero_attn.spec.config import ModelConfig
from placement import Policy
from placement.cost.terms import cpu_linear_s_per_unit
from placement.explain.explain import budget_curve, explain
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import rounded_input_bytes
from placement.plan.shards import LinearShard
from tests.support.models.published_configs import GPT_OSS_120B, QWEN3_30B, QWEN3_NEXT_80B

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
}


GLM_45_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 1.0,
    "vocab_size": 151552,
}
MINIMAX_M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "rotary_dim": 64,
    "vocab_size": 200064,
}


QWEN_36_35B = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 2048,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": 512,
        "vocab_size": 248320,
    },
    "vision_config": {"depth": 27},
}


@pytest.fixture
def config_of(tmp_path):
    def write(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


def large_machine():
    """A catalogue machine with enough DRAM for any of the models."""
    return replace(HardwareProfile.named("rtx4090-ddr5"), dram_bytes=1e12)


def experts_of(plan):
    return [shard for shard in plan.workload.linears if shard.picks]


def in_gpu_memory(placement):
    """Experts of a layer that have a place there, for good or in a slot."""
    return placement.gpu_units + placement.expert_slots


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (QWEN3_30B, 30.5e9),
        (MIXTRAL_8X7B, 46.7e9),
        (GPT_OSS_120B, 116.8e9),
        (GLM_45_AIR, 106.8e9),
        (MINIMAX_M2, 228.7e9),
        (QWEN_36_35B, 34.7e9),
        (QWEN3_NEXT_80B, 79.7e9),
    ],
    ids=["qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-120b", "glm-4.5-air", "minimax-m2", "qwen3.6-35b", "qwen3-next-80b"],
)
def test_bytes_are_those_of_the_model(config_of, config, parameters):
    """A q8 weight takes 8.5 bits; embedding (bf16) and router (float32) are counted elsewhere."""
    plan = plan_model(config_of(config), device="cpu", dtype="q8", hardware=large_machine())
    text = config.get("text_config", config)
    vocabulary = text["vocab_size"] * text["hidden_size"]

    assert plan.workload.weight_bytes == pytest.approx((parameters - vocabulary) * 8.5 / 8, rel=0.01)


def test_a_token_reads_its_experts_only(config_of):
    """Active bytes of Qwen3-30B-A3B: 3.3 billion weights with the embedding, 3.0 without."""
    plan = plan_model(config_of(QWEN3_30B), device="cpu", dtype="q8", hardware="rtx4090-ddr5")
    active = sum(shard.touched(1) * shard.total_bytes for shard in plan.workload.linears)
    decode, ceiling = plan.predicted.decode, HardwareProfile.named("rtx4090-ddr5").dram_bytes_per_s / active

    assert active == pytest.approx(3.04e9 * 8.5 / 8, rel=0.02)
    assert 0.3 * ceiling < decode.tokens_per_s < ceiling


@pytest.mark.parametrize(
    ("experts", "picks", "rows"), [(128, 8, 1), (128, 8, 4), (128, 8, 64), (8, 2, 3), (60, 4, 512)]
)
def test_distinct_experts_are_those_that_are_counted(experts, picks, rows):
    shard = LinearShard("layers.0.experts", "experts", 0, experts, 100, 1, 1, 100, picks=picks)
    generator, draws = torch.Generator().manual_seed(1), 200
    scores = torch.rand(draws, rows, experts, generator=generator)
    chosen = scores.topk(picks, -1).indices.flatten(1)
    counted = sum(len(set(each.tolist())) for each in chosen) / draws

    assert shard.touched(rows) * experts == pytest.approx(counted, rel=0.03)
    assert shard.rows_of_one(rows) * counted == pytest.approx(rows * picks, rel=0.03)


def test_an_expert_costs_what_a_linear_of_its_rows_does():
    """512 rows over 128 experts, 8 each: every expert is a linear of 32 rows."""
    hardware = HardwareProfile.named("rtx4090-ddr5")
    experts = LinearShard("layers.0.experts", "experts", 0, 128, 1 << 20, 16, 2048, 1 << 22, picks=8)
    dense = LinearShard("layers.0.up", "up", 0, 128, 1 << 20, 16, 2048, 1 << 22)

    assert cpu_linear_s_per_unit(experts, 512, "q4", hardware) == pytest.approx(
        cpu_linear_s_per_unit(dense, 32, "q4", hardware), rel=1e-6
    )
    assert cpu_linear_s_per_unit(experts, 1, "q4", hardware) == pytest.approx(
        cpu_linear_s_per_unit(dense, 1, "q4", hardware) / 16, rel=1e-6
    )


def test_the_table_says_what_a_row_chooses_and_what_a_chunk_reads(config_of):
    plan = plan_model(config_of(MIXTRAL_8X7B), device="cpu", dtype="q4", hardware="rtx4090-ddr5", max_context=512)

    assert "layers.0-31.experts" in plan.table(100)
    assert "experts: a row is computed by 2 of 8 in each of 32 layers, 94.50 MiB each" in plan.table(200)


@pytest.mark.parametrize(("device", "budget"), [("cuda", "1536MiB"), ("emulated", "1GiB")])
def test_a_gpu_takes_whole_experts(config_of, device, budget):
    """As many as its memory holds, behind all of attention, and no byte more than the budget."""
    plan = plan_model(
        config_of(QWEN3_30B | {"num_hidden_layers": 4}), device=device, dtype="q4", gpu_memory=budget,
        hardware="rtx4090-ddr5", max_context=512,
    )  # fmt: skip
    placed = {placement.name: placement for placement in plan.linears}

    assert 0 < sum(in_gpu_memory(placed[shard.name]) for shard in experts_of(plan)) < 4 * 128
    assert placed["layers.0.qkv"].gpu_units == placed["layers.0.qkv"].units
    assert plan.memory.gpu_bytes <= plan.gpu_memory_bytes


def test_what_a_kernel_rounds_of_experts_counts(config_of):
    """A row's eight experts give it more numbers to round than its own are."""
    plan = plan_model(config_of(QWEN3_30B), device="cpu", dtype="q4", hardware="rtx4090-ddr5")

    assert rounded_input_bytes(plan.workload) >= plan.workload.activation_rows * 8 * 768 * 2


def test_gpt_oss_of_120b_beside_a_card_of_12_gb(config_of):
    """From the config alone: dense parts and some experts on the card, 64 GB for the others, windows on every second
    layer."""
    plan = plan_model(
        config_of(GPT_OSS_120B), device="cuda", dtype="q4", gpu_memory="11GiB", hardware="rtx4070-ddr5",
        max_context=8192,
    )  # fmt: skip
    placed = {placement.name: placement for placement in plan.linears}

    assert sum(shard.total_bytes for shard in experts_of(plan)) == pytest.approx(64.5e9, rel=0.01)
    assert 100 < sum(in_gpu_memory(placed[shard.name]) for shard in experts_of(plan)) < 36 * 128 // 4
    assert placed["layers.35.qkv"].gpu_units == placed["layers.35.qkv"].units
    assert [shard.window for shard in plan.workload.kv[:3]] == [128, 0, 128]
    assert plan.memory.gpu_bytes <= plan.gpu_memory_bytes


def test_gpt_oss_of_120b_as_it_is_published_on_a_card_of_12_gb_with_64_gb(config_of):
    """Without --dtype: the config says that experts are MXFP4, all else is bf16."""
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    plan = plan_model(config_of(GPT_OSS_120B | {"quantization_config": said}), hardware="rtx4070-ddr5")
    memory, formats = plan.memory, {plan.workload.format_of(shard) for shard in experts_of(plan)}

    assert formats == {"mxfp4"}
    assert plan.workload.format_of(plan.workload.linears[0]) == "bf16"
    assert memory.gpu_bytes <= 12 << 30
    assert memory.host_bytes + memory.pinned_bytes <= 64 << 30


def test_states_of_fixed_size_are_counted(config_of):
    """Of 30 layers of Qwen3.6, 32 matrices of 128 x 128 and three inputs of 8192 features, float32: 63 MB a sequence."""
    plan = plan_model(config_of(QWEN_36_35B), device="cpu", dtype="q4", hardware="rtx4090-ddr5", max_context=4096)
    shards = plan.workload.states

    assert len(shards) == 30 and len(plan.workload.kv) == 10
    assert sum(4 * math.prod(shard.shape) for shard in shards) == 30 * 4 * (32 * 128 * 128 + 3 * 8192)


def test_families_that_are_not_there_are_refused_by_name(config_of):
    for name in ("kimi_linear", "deepseek_v3", "qwen4_exp"):
        with pytest.raises(Exception, match=name):
            ModelConfig.from_dir(config_of({"model_type": name}))


@pytest.fixture
def planned_for_cuda(config_of):
    path = config_of(QWEN3_30B | {"num_hidden_layers": 2})
    machine = HardwareProfile.named("rtx4090-ddr5")
    return settle(LoadOptions(model=path, device="cuda", dtype="q4", max_context=512, hardware=machine))


def test_all_of_it_in_gpu_memory_is_among_the_alternatives(planned_for_cuda):
    found = explain(planned_for_cuda.workload, planned_for_cuda.hardware, Policy.named("auto"), device="cuda")
    speeds = {other.label: other.decode_tokens_per_s for other in found.alternatives}

    assert speeds["policy gpu_only"] is not None


def test_the_largest_budget_that_is_drawn_holds_all_experts(planned_for_cuda):
    plans = budget_curve(planned_for_cuda.workload, planned_for_cuda.hardware, Policy(), device="cuda", steps=1)

    assert [plan.linear("layers.0.experts").gpu_units for plan in plans] == [0, 128]
