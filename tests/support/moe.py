"""Toy checkpoints of the families with experts, their routers drawn so that scores spread, and what transformers says.

A fresh router is zeros or nearly so: every score would tie, and a forgotten softmax, sum or factor would not show.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.toy import hf_model, random_model, save_tokenizer

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
SIZES = {
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
LEAST_GAP = 1e-5  # between the k-th score and the next one, of the toy prompts


def make_moe(path: Path, family: str, *, layers: int = 3, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint of random weights with 3 layers, as transformers writes it: per-expert tensors."""
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
                parameter.copy_(noise * parameter.shape[2] ** -0.5)
            elif name.endswith((".gate.weight", "shared_expert_gate.weight")):
                parameter.copy_(0.25 * noise)
    model.save_pretrained(path)
    save_tokenizer(path)
    return Path(path)


def moe_logits(path: Path, token_ids: list[int]) -> torch.Tensor:
    """Logits of transformers in float32, experts one by one: [len(token_ids), vocab]."""
    model = hf_model(path)
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()


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
