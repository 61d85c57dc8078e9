"""The metadata of a new GGUF file: that of a GGUF source as it is, else made of the model's configuration."""

from collections.abc import Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.config import gguf_config, gguf_terms
from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.checkpoints.gguf.file import GgufTensor
from hetero_attn.checkpoints.gguf.names import ROPE_DIVISORS
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.models.rope import rope_tables
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.experts_config import ExpertsConfig
from hetero_attn.spec.families.experts import EXPERT_COUNT
from hetero_attn.spec.families.family import GgufTerms
from hetero_attn.spec.families.table import FAMILIES
from hetero_attn.spec.families.windows import WINDOW_KEYS

QUANTIZATION_VERSION = 2  # of ggml's block layouts
_NOT_COPIED = ("split.", "general.alignment", "general.file_type", "general.quantization_version", "hetero_attn.")
# What a file need not say as the source does: names, and ids that tokenizers have.
_MAY_DIFFER = ("architecture", "dtype", "rope", "bos_token_id", "eos_token_ids", "pad_token_id")
_COMPARED_POSITIONS = 512
_SAME_LAYERS = {"MistralForCausalLM": "llama"}  # a family whose files say another's name


def copied_metadata(source: GgufCheckpoint) -> dict[str, Any]:
    """What a GGUF source says of its model and tokenizer.

    Raises UnsupportedModelError for a family whose tensors lie otherwise than they are written here.
    """
    terms = gguf_terms(source.fields)
    if _lies_otherwise(terms):
        raise UnsupportedModelError(
            f"{source.path}: files of the architecture {terms.architecture} keep tensors of other names, or several in "
            "one, which are not written; llama.cpp's llama-quantize does"
        )
    kept = {key: value for key, value in source.fields.values.items() if not key.startswith(_NOT_COPIED)}
    return kept | {"general.quantization_version": QUANTIZATION_VERSION}


def _lies_otherwise(terms: GgufTerms) -> bool:
    return bool(terms.fused or terms.parts)


def made_terms(config: ModelConfig, path: Path) -> GgufTerms:
    """What the file that is made of a model in safetensors has beside the terms of Llama.

    Raises UnsupportedModelError for a family of which no file can be made from safetensors.
    """
    known = {family.architecture: family.gguf for family in FAMILIES.values() if family.gguf is not None}
    name = _SAME_LAYERS.get(config.architecture)
    terms = next((found for found in known.values() if found.architecture == name), None)
    terms = terms or known.get(config.architecture)
    if terms is None or not _is_made(terms):
        makes = [name for name, found in known.items() if _is_made(found)]
        raise UnsupportedModelError(
            f"{path}: GGUF files of {config.architecture} are not made from safetensors, only of "
            f"{', '.join((*makes, *_SAME_LAYERS))}; take a GGUF file of the model as the source"
        )
    return terms


def _is_made(terms: GgufTerms) -> bool:
    return (terms.keys in ((), (EXPERT_COUNT,)) or not terms.needs_keys) and not _lies_otherwise(terms)


def made_metadata(config: ModelConfig, terms: GgufTerms, name: str) -> tuple[dict[str, Any], torch.Tensor | None]:
    """(what a file says of a model, the divisors of its rotary frequencies where it needs that tensor)."""
    keys: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        terms.eps_key.removeprefix("."): float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.rope.rotary_dim,
        "rope.freq_base": float(config.rope.theta),
    }
    windows = set(config.sliding_window)
    if WINDOW_KEYS[0] in terms.keys and len(windows) == 1 and windows != {0}:
        keys[WINDOW_KEYS[0].removeprefix(".")] = windows.pop()
    if config.experts is not None:
        keys |= _experts(config.experts)
    scaling, divisors = _scaling(config)
    found: dict[str, Any] = {"general.architecture": terms.architecture, "general.name": name}
    found["general.quantization_version"] = QUANTIZATION_VERSION
    return found | {f"{terms.architecture}.{key}": value for key, value in (keys | scaling).items()}, divisors


def _experts(experts: ExpertsConfig) -> dict[str, int]:
    keys = {
        "expert_count": experts.experts,
        "expert_used_count": experts.per_row,
        "expert_feed_forward_length": experts.width,
    }
    return keys | ({"expert_shared_feed_forward_length": experts.shared_width} if experts.is_gated else {})


def _scaling(config: ModelConfig) -> tuple[dict[str, Any], torch.Tensor | None]:
    rope = config.rope
    if rope.rope_type == "llama3":
        plain = 1.0 / rope.theta ** (
            torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32, device="cpu") / rope.rotary_dim
        )
        cos, sin = rope_tables(config, 2)
        return {}, plain / torch.atan2(sin[1], cos[1])  # angles of position 1 are the frequencies
    if rope.rope_type == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}, None
    if rope.rope_type == "yarn":
        keys = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope.factor),
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        return keys, None
    return {}, None


def check_same_model(
    config: ModelConfig, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], divisors: Any, path: Path
) -> None:
    """Read the metadata as the new file's reader will; UnsupportedModelError where it would be another model."""
    numbers = {} if divisors is None else {ROPE_DIVISORS: tuple(divisors.tolist())}
    theirs = {name: tensor for name, tensor in tensors.items() if name != ROPE_DIVISORS}
    found = gguf_config(GgufFields(path, metadata), theirs, numbers)
    wrong = [
        item.name
        for item in fields_of(config)
        if item.name not in _MAY_DIFFER and not _same(getattr(config, item.name), getattr(found, item.name))
    ]
    angles = zip(rope_tables(config, _COMPARED_POSITIONS), rope_tables(found, _COMPARED_POSITIONS), strict=True)
    if not all(ours.shape == theirs_.shape and torch.allclose(ours, theirs_, atol=1e-3) for ours, theirs_ in angles):
        wrong.append("rope")
    if wrong:
        raise UnsupportedModelError(
            f"{path}: a GGUF file cannot say this model's {', '.join(wrong)} as it is read here; take a GGUF file of "
            "the model as the source"
        )


def _same(ours: Any, theirs: Any) -> bool:
    return bool(np.isclose(ours, theirs, rtol=1e-6)) if isinstance(ours, float) else ours == theirs
