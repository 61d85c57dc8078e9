"""A GGUF file's metadata as a `ModelConfig`: the second door through which other people's names enter."""

import math
from collections.abc import Mapping
from typing import Any

from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.checkpoints.gguf.file import GgufTensor
from hetero_attn.checkpoints.gguf.names import LONG_DIVISORS, ROPE_DIVISORS, SHORT_DIVISORS, split_block
from hetero_attn.errors import ConfigError, UnsupportedModelError, nearest
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.table import GGUF_EXPERT_FAMILIES, GGUF_FAMILIES
from hetero_attn.spec.limits import (
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_INTERMEDIATE,
    MAX_LAYERS,
    MAX_VOCAB,
)
from hetero_attn.spec.rope_config import RopeConfig

# Tokens that end a turn of a dialogue, which files often name by no key of its own.
_END_KEYS = ("eos", "eot", "eom")
CONTROL = 3  # type of tokens that text never makes
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>")
STANDS_STILL = 1e30  # divisors of pairs that turn too little to be seen
_SMALL = " (small models of Gemma 3n and 4, E2B and E4B, have it; 26B-A4B and 31B do not)"
# Keys that change what a layer computes, in ways that only some families have, and what is to be said of them.
_UNKNOWN_TERMS = {
    ".expert_count": "",
    ".logit_scale": "",
    ".residual_scale": "",
    ".embedding_scale": "",
    ".attention.scale": "",
    ".attention.clamp_kqv": "",
    ".attn_logit_softcapping": "",
    ".final_logit_softcapping": "",
    ".nextn_predict_layers": "",
    ".attention.sliding_window": "",
    ".embedding_length_per_layer_input": _SMALL,
    ".attention.shared_kv_layers": _SMALL,
}


def gguf_config(
    fields: GgufFields, tensors: Mapping[str, GgufTensor], rope_divisors: Mapping[str, tuple[float, ...]]
) -> ModelConfig:
    """The configuration of a model; rope_divisors: what the tensors of rotary embedding hold, one number a pair.

    Raises:
        ConfigError: a value that is missing, mistyped or impossible.
        UnsupportedModelError: an architecture or a term of it that is not run.
    """
    family, terms = _family(fields)
    found: dict[str, Any] = {"architecture": family.architecture, "hidden_act": "silu", "dtype": None}
    found |= _sizes(fields, tensors, terms) | _terms_by_tensors(tensors, terms)
    found |= {
        "rms_norm_eps": fields.number(terms.eps_key, 0.0, 1.0),
        "sliding_window": (0,) * found["num_layers"],
        "rope": _rope(fields, found["head_dim"], found["max_position_embeddings"], rope_divisors),
        "bos_token_id": _token(fields, "bos", found["vocab_size"]),
        "eos_token_ids": _ends(fields, found["vocab_size"]),
        "pad_token_id": _token(fields, "padding", found["vocab_size"]),
    }
    return ModelConfig(**found | terms.terms(fields, found))


def _sizes(fields: GgufFields, tensors: Mapping[str, GgufTensor], terms: GgufTerms) -> dict[str, int]:
    """How many layers, heads and tokens, and how wide."""
    hidden_size, num_heads = (
        fields.integer(".embedding_length", MAX_HIDDEN),
        fields.integer(".attention.head_count", MAX_HEADS),
    )
    num_kv_heads = terms.kv_heads(fields, num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"{fields.path}: {num_heads} heads are no multiple of {num_kv_heads} KV heads")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": _intermediate_size(fields),
        "num_layers": fields.integer(".block_count", MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": _head_dim(fields, hidden_size, num_heads),
        "vocab_size": _vocab_size(fields, tensors),
        "max_position_embeddings": fields.integer(".context_length", MAX_CONTEXT),
    }


def _intermediate_size(fields: GgufFields) -> int:
    """Neurons of the MLP; of a model whose layers all have experts perhaps no number of its own."""
    experts = fields.integer(".expert_feed_forward_length", MAX_INTERMEDIATE, None)
    if experts is None:
        return fields.integer(".feed_forward_length", MAX_INTERMEDIATE)
    return fields.integer(".feed_forward_length", MAX_INTERMEDIATE, experts)


def _terms_by_tensors(tensors: Mapping[str, GgufTensor], terms: GgufTerms) -> dict[str, bool]:
    """Terms that a model has where the file holds their weights in any layer, or in any layer does not."""
    names = [split_block(name) for name in tensors]
    parts = {f"{part}.{kind}" for _, part, kind in names}
    keys, values = ({layer for layer, part, _ in names if part == wanted} for wanted in ("attn_k", "attn_v"))
    return {
        "tie_word_embeddings": "output.weight" not in tensors,
        "qkv_bias": not parts.isdisjoint({"attn_q.bias", "attn_qkv.bias"}),
        "o_bias": "attn_output.bias" in parts,
        "mlp_bias": not parts.isdisjoint({"ffn_gate.bias", "ffn_up.bias"}),
        "qk_norm": "attn_q_norm.weight" in parts,
        "shared_projection": terms.may_share_values and not keys <= values,
    }


def _token(fields: GgufFields, name: str, vocab_size: int) -> int | None:
    """The id of a token that a key names, None where there is no such key."""
    return fields.integer(f"tokenizer.ggml.{name}_token_id", vocab_size - 1, None, low=0)


def _ends(fields: GgufFields, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer: those of the keys, and what dialogues end their turns with."""
    found = {_token(fields, name, vocab_size) for name in _END_KEYS}
    tokens = fields.texts("tokenizer.ggml.tokens")
    types = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    if types is not None:
        control = {tokens[index]: int(index) for index in (types == CONTROL).nonzero()[0]}
        found |= {control[token] for token in TURN_ENDS if token in control}
    return tuple(sorted(found - {None}))


def _family(fields: GgufFields) -> tuple[Family, GgufTerms]:
    family = _family_or_none(fields)
    known = dict.fromkeys((*GGUF_FAMILIES, *GGUF_EXPERT_FAMILIES))
    if family is None or family.gguf is None:
        raise UnsupportedModelError(
            f"{fields.path}: architecture {fields.architecture[:80]!r} is not supported"
            f"{nearest(fields.architecture, known)}. Known in GGUF files: {', '.join(known)}"
        )
    for name, why in _UNKNOWN_TERMS.items():
        if name not in family.gguf.keys and fields.is_set(name):
            raise UnsupportedModelError(
                f"{fields.path}: {fields.key(name)} is {fields.values[fields.key(name)]!r}: this term of the "
                f"architecture is not computed, and leaving it out would change every answer{why}"
            )
    return family, family.gguf


def _head_dim(fields: GgufFields, hidden_size: int, num_heads: int) -> int:
    head_dim = fields.integer(".attention.key_length", MAX_HEAD_DIM, None, low=2)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(
                f"{fields.path}: width {hidden_size} is no multiple of {num_heads} heads and there is no "
                f"{fields.key('.attention.key_length')}"
            )
        head_dim = hidden_size // num_heads
    if (values := fields.integer(".attention.value_length", MAX_HEAD_DIM, head_dim)) != head_dim:
        raise UnsupportedModelError(
            f"{fields.path}: keys of {head_dim} and values of {values} numbers a head; only equal"
        )
    return head_dim


def _vocab_size(fields: GgufFields, tensors: Mapping[str, GgufTensor]) -> int:
    if "token_embd.weight" not in tensors:
        raise ConfigError(f"{fields.path}: tensor token_embd.weight is missing; this file holds no whole model")
    rows = tensors["token_embd.weight"].shape[0]
    tokens = len(fields.texts("tokenizer.ggml.tokens"))
    if not max(tokens, 1) <= rows <= MAX_VOCAB:
        raise ConfigError(f"{fields.path}: {tokens} tokens, but token_embd.weight has {rows} rows")
    return rows


def _rope(fields: GgufFields, head_dim: int, context: int, found: Mapping[str, tuple[float, ...]]) -> RopeConfig:
    rotary_dim = fields.integer(".rope.dimension_count", MAX_HEAD_DIM, head_dim, low=4)
    if rotary_dim % 2 or rotary_dim > head_dim:
        fields.fail(".rope.dimension_count", rotary_dim, f"an even number up to {head_dim}")
    base = {"rotary_dim": rotary_dim, "theta": fields.number(".rope.freq_base", 1.0, 1e15, 10000.0)}
    found = {name: tuple(math.inf if value >= STANDS_STILL else value for value in found[name]) for name in found}
    for name, divisors in found.items():
        if len(divisors) != rotary_dim // 2 or not all(0 < value < 1e9 or value == math.inf for value in divisors):
            raise ConfigError(f"{fields.path}: {name} must hold {rotary_dim // 2} positive numbers")
    if LONG_DIVISORS in found:
        return RopeConfig(
            **base,
            rope_type="longrope",
            divisors=found.get(SHORT_DIVISORS, (1.0,) * (rotary_dim // 2)),
            long_divisors=found[LONG_DIVISORS],
            original_max_position_embeddings=fields.integer(
                ".rope.scaling.original_context_length", MAX_CONTEXT, context
            ),
            attention_factor=fields.number(".rope.scaling.attn_factor", 0.0, 1e6, 1.0),
        )
    if ROPE_DIVISORS in found:
        return RopeConfig(**base, rope_type="divisors", divisors=found[ROPE_DIVISORS])
    kind = fields.text(".rope.scaling.type", "none")
    if kind in ("none", ""):
        old = fields.number(".rope.scale_linear", 0.0, 1e6, 1.0)
        return RopeConfig(**base) if old == 1.0 else RopeConfig(**base, rope_type="linear", factor=old)
    return RopeConfig(**base, **_scaling(fields, kind, context))


def _scaling(fields: GgufFields, kind: str, context: int) -> dict[str, Any]:
    factor = fields.number(".rope.scaling.factor", 0.0, 1e6)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": fields.integer(
                ".rope.scaling.original_context_length", MAX_CONTEXT, context
            ),
            "attention_factor": fields.number(".rope.scaling.attn_factor", 0.0, 1e6, None),
            "beta_fast": fields.number(".rope.scaling.yarn_beta_fast", 0.0, 1e6, 32.0),
            "beta_slow": fields.number(".rope.scaling.yarn_beta_slow", 0.0, 1e6, 1.0),
        }
    raise UnsupportedModelError(f"{fields.path}: rope scaling {kind[:40]!r} is not supported; known: linear, yarn")


def gguf_terms(fields: GgufFields) -> GgufTerms:
    """What a file's family declares; nothing special of one that is not known."""
    family = _family_or_none(fields)
    return GgufTerms(fields.architecture) if family is None or family.gguf is None else family.gguf


def _family_or_none(fields: GgufFields) -> Family | None:
    """The family of an architecture; Mixtral's files have that of Llama, and experts."""
    with_experts = GGUF_EXPERT_FAMILIES if fields.is_set(".expert_count") else {}
    return with_experts.get(fields.architecture) or GGUF_FAMILIES.get(fields.architecture)
