"""Toy checkpoints of the families with experts, their routers drawn so that scores spread, and what transformers says.

A fresh router is zeros or nearly so: every score would tie, and a forgotten softmax, sum or factor would not show.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.models.toy import hf_logits, hf_model, random_model, save_tokenizer

FAMILIES = ("glm4_moe", "gpt_oss", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
SIZES = {
    "glm4_moe": {
        "intermediate_size": 112,
        "moe_intermediate_size": 40,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.75,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "head_dim": 24,
    },
    "minimax_m2": {
        "intermediate_size": 48,
        "num_local_experts": 9,
        "num_experts_per_tok": 3,
        "head_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gpt_oss": {
        "intermediate_size": 80,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 24,
        "sliding_window": 9,
        "swiglu_limit": 0.9,
    },
    "mixtral": {"intermediate_size": 80, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {"intermediate_size": 56, "num_experts": 9, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "qwen2_moe": {
        "intermediate_size": 112,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96,
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "intermediate_size": 112,
        "moe_intermediate_size": 40,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "head_dim": 24,
    },
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 20,
    "head_dim": 24,
}
SIZES |= {
    "qwen3_5_text": DELTA | {"intermediate_size": 112},
    "qwen3_5_moe_text": DELTA
    | {
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
        "num_experts": 10,
        "num_experts_per_tok": 3,
    },
}
SIZES["gemma4_text"] = {
    "intermediate_size": 112,
    "enable_moe_block": True,
    "moe_intermediate_size": 40,
    "num_experts": 10,
    "top_k_experts": 3,
    "head_dim": 24,
    "global_head_dim": 40,
    "num_global_key_value_heads": 3,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 9,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 2.0,
}
SIZES["qwen3_next"] = SIZES["qwen3_5_moe_text"] | {"intermediate_size": 112, "attention_bias": True}
LEAST_GAP = 1e-5  # between the k-th score and the next one, of the toy prompts


def make_moe(path: Path, family: str, *, layers: int = 3, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint of random weights with 3 layers, as transformers writes it: per-expert tensors, but of gpt-oss."""
    from transformers import AutoConfig

    values = {
        "vocab_size": 307,
        "hidden_size": 72,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "experts_implementation": "eager",
    }
    config = AutoConfig.for_model(family, **(values | SIZES[family] | changes))
    model = random_model(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 3:
                parameter.copy_(noise * parameter.shape[1 if family == "gpt_oss" else 2] ** -0.5)
            elif name.endswith((".gate.weight", "shared_expert_gate.weight")):
                parameter.copy_(0.25 * noise)
            elif name.endswith("router.proj.weight"):  # its input is divided by the root of its width
                parameter.copy_(3.0 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("layer_scalar"):
                buffer.copy_(0.6 + torch.rand(buffer.shape, generator=generator))
    model.save_pretrained(path)
    save_tokenizer(path)
    return Path(path)


def routed(rows: int, experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(sources, starts) as `route` writes them, of experts drawn at random."""
    ids = torch.rand(rows, experts, generator=torch.Generator().manual_seed(seed)).topk(top_k, -1).indices.flatten()
    starts = torch.zeros(experts + 1, dtype=torch.int32)
    starts[1:] = (ids[:, None] == torch.arange(experts)).sum(0).cumsum(0)
    return (torch.sort(ids, stable=True).indices // top_k).int(), starts


def moe_logits(path: Path, token_ids: list[int]) -> torch.Tensor:
    """Logits of transformers in float32, experts one by one: [len(token_ids), vocab]."""
    hf_model(path).set_experts_implementation("eager")
    return hf_logits(path, token_ids)


def fused(source: Path, path: Path) -> Path:
    """The same checkpoint with all experts of a layer in one tensor each for gate and up, and for down."""
    path.mkdir(parents=True, exist_ok=True)
    tensors, found, experts = load_file(source / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".mlp.experts.")
        if not rest:
            found[name] = tensor
            continue
        index, part, _ = rest.split(".")
        experts.setdefault(layer, {})[int(index), part] = tensor
    for layer, parts in experts.items():
        ids = sorted({index for index, _ in parts})
        both = [torch.cat([parts[index, "gate_proj"], parts[index, "up_proj"]]) for index in ids]
        found[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        found[f"{layer}.mlp.experts.down_proj"] = torch.stack([parts[index, "down_proj"] for index in ids])
    save_file(found, path / "model.safetensors")
    for file in source.glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of gpt-oss with each expert's own ones, whose outputs are rows, in the place of all experts'."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, fused = name.partition(".mlp.experts.")
        if not fused:
            found[name] = tensor
            continue
        kind, parts = ("bias" if fused.endswith("_bias") else "weight"), ("down_proj",)
        parts = ("gate_proj", "up_proj") if fused.startswith("gate_up") else parts
        for index, values in enumerate(tensor):
            for first, part in enumerate(parts):
                rows = values[..., first :: len(parts)].movedim(-1, 0)
                found[f"{layer}.mlp.experts.{index}.{part}.{kind}"] = rows.contiguous()
    return found


def together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `apart` has cut, as the files of gpt-oss have it."""
    found, experts = {}, {}
    for name, tensor in tensors.items():
        layer, _, own = name.partition(".mlp.experts.")
        if not own:
            found[name] = tensor
            continue
        index, part, kind = own.split(".")
        experts.setdefault((layer, kind), {}).setdefault(int(index), {})[part] = tensor.movedim(0, -1)
    for (layer, kind), each in experts.items():
        end = "_bias" if kind == "bias" else ""
        rows = [each[index] for index in sorted(each)]
        both = [torch.stack([one["gate_proj"], one["up_proj"]], -1).flatten(-2) for one in rows]
        found[f"{layer}.mlp.experts.gate_up_proj{end}"] = torch.stack(both)
        found[f"{layer}.mlp.experts.down_proj{end}"] = torch.stack([one["down_proj"] for one in rows])
    return found


GGUF_KEYS = {
    "glm4_moe": (
        "glm4moe",
        {
            "expert_feed_forward_length": 64,
            "expert_shared_count": 2,
            "expert_gating_func": 2,
            "expert_weights_scale": 1.75,
            "expert_weights_norm": True,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "leading_dense_block_count": 1,
            "nextn_predict_layers": 1,
            "rope.dimension_count": 16,
        },
    ),
    "minimax_m2": (
        "minimax-m2",
        {"expert_feed_forward_length": 64, "expert_gating_func": 2, "rope.dimension_count": 16},
    ),
    "gpt_oss": ("gpt-oss", {"expert_feed_forward_length": 64, "attention.sliding_window": 9}),
    "mixtral": ("llama", {}),
    "olmoe": ("olmoe", {}),
    "qwen2_moe": ("qwen2moe", {"expert_feed_forward_length": 64, "expert_shared_feed_forward_length": 96}),
    "qwen3_moe": ("qwen3moe", {"expert_feed_forward_length": 64}),
}


def moe_gguf(folder: Path, family: str, kind: str = "Q8_0", **changes: Any) -> tuple[Path, Path]:
    """(GGUF file with its matrices in a type, directory of the same values in float32). changes: of the config."""
    import gguf

    from hetero_attn.spec.config import ModelConfig
    from tests.support.models.gguf_models import add_metadata, coded, permuted

    widths = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
    sizes = {key: value for key, value in widths.items() if key in SIZES[family]} or {"intermediate_size": 64}
    shape = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-6}
    sizes |= {"swiglu_limit": 7.0} if family == "gpt_oss" else {}  # which no key of the file says
    sizes |= {"intermediate_size": 128} if family == "glm4_moe" else {}
    plain = make_moe(folder / "plain", family, layers=2, **shape | sizes | changes)
    config, tensors = ModelConfig.from_dir(plain), load_file(plain / "model.safetensors")
    tensors = apart(tensors) if family == "gpt_oss" else tensors
    architecture, keys = GGUF_KEYS[family]
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    described = {
        "hidden": 128,
        "layers": 2 + keys.get("nextn_predict_layers", 0),
        "intermediate": config.intermediate_size,
        "num_heads": 4,
        "num_kv_heads": config.num_kv_heads,
    }
    add_metadata(writer, family, described | {"head_dim": 32})
    writer.add_layer_norm_rms_eps(1e-6)
    counts = {"expert_count": config.experts.experts, "expert_used_count": config.experts.per_row}
    for key, value in (counts | keys).items():
        add = {float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope.theta)
    if config.rope.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
    stacked: dict[str, dict[int, torch.Tensor]] = {}
    for seed, (name, values) in enumerate(sorted(tensors.items())):
        target, expert = gguf_name(name, family)
        if expert is not None and values.dim() == 1:
            stacked.setdefault(target, {})[expert] = values
            continue
        if values.dim() == 1 or "gate_inp" in target:
            writer.add_tensor(target, values.squeeze(0).numpy())
            continue
        turned = architecture == "llama" and ("attn_q" in target or "attn_k" in target)
        data, exact = coded(permuted(values, 32) if turned else values, kind, seed)
        tensors[name] = exact.view(-1, 16, 2, 128).transpose(1, 2).reshape(values.shape) if turned else exact
        if expert is not None:
            stacked.setdefault(target, {})[expert] = torch.from_numpy(data)
            continue
        writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for target, experts in stacked.items():
        rows = torch.stack([experts[index] for index in sorted(experts)]).numpy()
        writer.add_tensor(target, rows, raw_dtype=gguf.GGMLQuantizationType["F32" if ".bias" in target else kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = together(tensors) if family == "gpt_oss" else tensors
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.gguf", plain


def gguf_name(name: str, family: str) -> tuple[str, int | None]:
    """(name in a GGUF file, which expert of the tensor it is) of a tensor of transformers."""
    parts = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    if ".experts." in name:
        _, _, expert, part, kind = rest.split(".")
        return f"blk.{layer}.ffn_{parts[part]}_exps.{kind}", int(expert)
    if rest == "self_attn.sinks":
        return f"blk.{layer}.attn_sinks.weight", None
    if rest.endswith("e_score_correction_bias"):
        return f"blk.{layer}.exp_probs_b.bias", None
    words = {
        "block_sparse_moe.gate": "ffn_gate_inp",
        "mlp.gate": "ffn_gate_inp",
        "mlp.router": "ffn_gate_inp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        **{
            f"mlp.shared_expert{s}.{each}_proj": f"ffn_{each}_shexp"
            for each in ("gate", "up", "down")
            for s in ("", "s")
        },
        **{f"mlp.{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")},
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm" if family in ("glm4_moe", "gpt_oss") else "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{each}_proj": f"attn_{each}" for each in "qkv"},
        **{f"self_attn.{each}_norm": f"attn_{each}_norm" for each in "qk"},
    }
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = (rest if name.startswith("model.layers.") else name).rpartition(".")
    return (f"{top[stem]}.{kind}" if stem in top else f"blk.{layer}.{words[stem]}.{kind}"), None
