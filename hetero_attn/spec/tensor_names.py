"""What the parts of a model are called in a checkpoint."""

LAYER_PREFIX = "model.layers."

# Our word for each part of the model -> where the Llama, Mistral and Qwen families keep it.
_TOP_PARTS = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_LAYER_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def tensor_name(part: str, layer: int | None = None, kind: str = "weight") -> str:
    """Name in the checkpoint of one part of the model.

    Args:
        part: embed, final_norm, head (layer None), or, in a layer: attention_norm, q, k, v, q_norm, k_norm, o,
            mlp_norm, gate, up, down.
        layer: layer index. kind: "weight" or "bias".
    """
    if layer is None:
        return f"{_TOP_PARTS[part]}.{kind}"
    return f"{LAYER_PREFIX}{layer}.{_LAYER_PARTS[part]}.{kind}"
