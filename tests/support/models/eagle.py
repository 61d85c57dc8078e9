"""EAGLE-3 heads of random weights under the names of published ones, and what such a head computes, slowly.

The forward is written from the published architecture (SafeAILab's EAGLE-3, arXiv 2503.01840, and the switches that
later checkpoints have): one row at a time in plain torch, float32, nothing of the runtime in it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WRAPPED = "Eagle3Speculator"


def make_head(
    path: Path,
    *,
    target_hidden: int = 72,
    hidden: int = 72,
    intermediate: int = 96,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 40,
    vocab: int = 307,
    draft_vocab: int = 211,
    max_position_embeddings: int = 512,
    architecture: str = "LlamaForCausalLMEagle3",
    owns_embedding: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **more: Any,
) -> Path:
    """Write a head. more: keys of the config beside the sizes, such as norm_before_fc, or eagle_config."""
    path.mkdir()
    layer = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": 1,
        "vocab_size": vocab,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }
    own = {"architectures": [architecture], "draft_vocab_size": draft_vocab, "target_hidden_size": target_hidden} | more
    is_wrapped = architecture == WRAPPED
    config = own | ({"transformer_layer_config": layer, "model_type": "speculators"} if is_wrapped else layer)
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (1.5 / columns**0.5)

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(size, generator=generator)

    taps, prefix = _taps(config), "layers.0." if is_wrapped else "midlayer."
    tensors = {
        "fc.weight": weight(hidden, taps * target_hidden),
        f"{prefix}input_layernorm.weight": norm(hidden),
        f"{prefix}hidden_norm.weight": norm(hidden),
        f"{prefix}self_attn.q_proj.weight": weight(num_heads * head_dim, 2 * hidden),
        f"{prefix}self_attn.k_proj.weight": weight(num_kv_heads * head_dim, 2 * hidden),
        f"{prefix}self_attn.v_proj.weight": weight(num_kv_heads * head_dim, 2 * hidden),
        f"{prefix}self_attn.o_proj.weight": weight(hidden, num_heads * head_dim),
        f"{prefix}post_attention_layernorm.weight": norm(hidden),
        f"{prefix}mlp.gate_proj.weight": weight(intermediate, hidden),
        f"{prefix}mlp.up_proj.weight": weight(intermediate, hidden),
        f"{prefix}mlp.down_proj.weight": weight(hidden, intermediate),
        "norm.weight": norm(hidden),
        "lm_head.weight": weight(draft_vocab, hidden),
    }
    if owns_embedding:
        tensors["embed_tokens.weight"] = weight(vocab, hidden)
    if _switch(config, "norm_before_fc"):
        tensors["input_norm.weight"] = norm(taps * target_hidden)
    if _switch(config, "fc_norm"):
        tensors |= {f"fc_norm.{place}.weight": norm(target_hidden) for place in range(taps)}
    chosen = torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values
    tables = {"d2t": chosen - torch.arange(draft_vocab), "t2d": torch.zeros(vocab, dtype=torch.bool)}
    tables["t2d"][chosen] = True
    tensors = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(tensors | (tables if draft_vocab < vocab else {}), path / "model.safetensors")
    return path


@dataclass
class SlowHead:
    """The forward of a head, row by row. embedding: of the large model, for a head without one of its own."""

    path: Path
    embedding: torch.Tensor | None = None
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = json.loads((self.path / "config.json").read_text())
        self.switches, self.config = config, config | config.get("transformer_layer_config", {})
        tensors = load_file(self.path / "model.safetensors")
        self.offsets = tensors.pop("d2t", None)
        tensors.pop("t2d", None)
        self.tensors = {
            name.replace("midlayer.", "").replace("layers.0.", ""): t.float() for name, t in tensors.items()
        }
        self.taps = _taps(config)

    def fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """g of one token: hidden_states float32 [taps * target_hidden]."""
        if _switch(self.switches, "norm_before_fc"):
            hidden_states = self._norm(hidden_states, "input_norm")
        if _switch(self.switches, "fc_norm"):
            parts = hidden_states.chunk(self.taps)
            hidden_states = torch.cat([self._norm(part, f"fc_norm.{place}") for place, part in enumerate(parts)])
        return self.tensors["fc.weight"] @ hidden_states

    def row(self, g: torch.Tensor, token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a row; returns its logits over the head's own vocabulary, and what it hands on."""
        embedding = self.tensors.get("embed_tokens.weight", self.embedding)
        embedded, normed = self._norm(embedding[token_id].float(), "input_layernorm"), self._norm(g, "hidden_norm")
        residual = normed if _switch(self.switches, "norm_before_residual") else g
        hidden = residual + self._attention(torch.cat([embedded, normed]))
        x = self._norm(hidden, "post_attention_layernorm")
        gate, up = self.tensors["mlp.gate_proj.weight"] @ x, self.tensors["mlp.up_proj.weight"] @ x
        hidden = hidden + self.tensors["mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        normed = self._norm(hidden, "norm")
        handed_on = normed if _switch(self.switches, "norm_output") else hidden
        return self.tensors["lm_head.weight"] @ normed, handed_on

    def token_id(self, logits: torch.Tensor) -> int:
        """The large model's id of the likeliest token."""
        place = int(logits.argmax())
        return place if self.offsets is None else place + int(self.offsets[place])

    def chain(self, text: list[int], hidden_states: torch.Tensor, count: int) -> tuple[list[int], list[torch.Tensor]]:
        """Greedy tokens behind a text, and the logits that they have; hidden_states: [len(text) - 1, taps * hidden]."""
        for place, token_id in enumerate(text[1:]):
            logits, hidden = self.row(self.fused(hidden_states[place]), token_id)
        drafted, seen = [self.token_id(logits)], [logits]
        while len(drafted) < count:
            logits, hidden = self.row(hidden, drafted[-1])
            drafted.append(self.token_id(logits))
            seen.append(logits)
        return drafted, seen

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, width = (
            self.config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        position = len(self.keys)
        q, k, v = (
            (self.tensors[f"self_attn.{name}_proj.weight"] @ x).view(count, width)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        self.keys.append(self._turned(k, position))
        self.values.append(v)
        q, keys, values = self._turned(q, position), torch.stack(self.keys, 1), torch.stack(self.values, 1)
        out = []
        for head in range(heads):
            own = head // (heads // kv_heads)
            scores = keys[own] @ q[head] * width**-0.5
            out.append(scores.softmax(0) @ values[own])
        return self.tensors["self_attn.o_proj.weight"] @ torch.cat(out)

    def _turned(self, x: torch.Tensor, position: int) -> torch.Tensor:
        half = x.shape[1] // 2
        angles = position * self.config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angles.cos().float(), angles.sin().float()
        first, second = x[:, :half], x[:, half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean() + self.config["rms_norm_eps"]) * self.tensors[f"{name}.weight"]


def _switch(config: dict[str, Any], name: str) -> bool:
    return bool(config.get(name, config.get("eagle_config", {}).get(name, False)))


def _taps(config: dict[str, Any]) -> int:
    key = "eagle_aux_hidden_state_layer_ids"
    return len(config.get(key) or config.get("eagle_config", {}).get(key) or (0, 0, 0))
