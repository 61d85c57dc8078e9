"""Our names of tensors (those of the Hugging Face families) to the names in GGUF files."""

import re

from hetero_attn.spec.tensor_names import CORRECTION

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.post_norm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.post_norm": "post_ffw_norm",
    "mlp.shared_post_norm": "post_ffw_norm_1",
    "mlp.experts_norm": "pre_ffw_norm_2",
    "mlp.experts_post_norm": "post_ffw_norm_2",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_OURS_LAYER = {theirs: ours for ours, theirs in _LAYER.items()}
_OURS_TOP = {theirs: ours for ours, theirs in _TOP.items()}
# Tensors whose names here do not end in weight or bias.
_OTHERS = {
    "self_attn.sinks": "attn_sinks.weight",
    f"mlp.gate.{CORRECTION}": "exp_probs_b.bias",
    "mlp.gate.per_expert_scale": "ffn_down_exps.scale",
    "layer_scalar": "layer_output_scale.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
}
_OURS_OTHERS = {theirs: ours for ours, theirs in _OTHERS.items()}
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")

ROPE_DIVISORS = "rope_freqs.weight"
LONG_DIVISORS, SHORT_DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight"


def our_name(name: str) -> str | None:
    """The name under which a tensor of a GGUF file is known here; None for one that no model of ours has."""
    stem, _, kind = name.rpartition(".")
    if stem in _OURS_TOP:
        return f"{_OURS_TOP[stem]}.{kind}"
    layer, part, kind = split_block(name)
    if other := _OURS_OTHERS.get(f"{part}.{kind}".removesuffix(".")):
        return f"model.layers.{layer}.{other}"
    return f"model.layers.{layer}.{_OURS_LAYER[part]}.{kind}" if part in _OURS_LAYER else None


def split_block(name: str) -> tuple[int, str, str]:
    """Layer, part and kind of a layer's tensor, of blk.3.ffn_up.weight 3, ffn_up and weight, of blk.3.ssm_a 3, ssm_a
    and nothing; (0, "", "") of others."""
    stem, _, kind = name.rpartition(".")
    if name.count(".") == 2:
        stem, kind = name, ""
    match = _BLOCK.fullmatch(stem)
    return (0, "", "") if match is None else (int(match[1]), match[2], kind)


def their_name(name: str) -> str:
    """The name in GGUF files of a tensor that is known here by `name`; KeyError for one that they do not have."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    if other := _OTHERS.get(f"{part}.{kind}".removeprefix(".")):
        return f"blk.{layer}.{other}"
    return f"blk.{layer}.{_LAYER[part]}.{kind}"
