"""What the tensors of a model are called in a checkpoint, and which it must have."""

from hetero_attn.spec.config import ModelConfig

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


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model must have, name -> shape; weights are [out_features, in_features]. No head when tied."""
    vocab_shape = (config.vocab_size, config.hidden_size)
    expected = {tensor_name("embed"): vocab_shape, tensor_name("final_norm"): (config.hidden_size,)}
    if not config.tie_word_embeddings:
        expected[tensor_name("head")] = vocab_shape
    for layer in range(config.num_layers):
        expected |= _layer_tensors(config, layer)
    return expected


def _layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "q": (q_width, hidden, config.qkv_bias),
        "k": (kv_width, hidden, config.qkv_bias),
        "v": (kv_width, hidden, config.qkv_bias),
        "o": (hidden, q_width, config.o_bias),
        "gate": (intermediate, hidden, config.mlp_bias),
        "up": (intermediate, hidden, config.mlp_bias),
        "down": (hidden, intermediate, config.mlp_bias),
    }
    tensors: dict[str, tuple[int, ...]] = {}
    for part, (out_features, in_features, has_bias) in linears.items():
        tensors[tensor_name(part, layer)] = (out_features, in_features)
        if has_bias:
            tensors[tensor_name(part, layer, "bias")] = (out_features,)
    tensors |= {tensor_name(part, layer): (hidden,) for part in ("attention_norm", "mlp_norm")}
    if config.qk_norm:
        tensors |= {tensor_name(part, layer): (config.head_dim,) for part in ("q_norm", "k_norm")}
    return tensors
