"""What a family declares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hetero_attn.spec.families.windows import Windows, no_windows
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.limits import MAX_HEADS
from hetero_attn.spec.rope_config import RopeConfig, read_rope
from hetero_attn.spec.tensor_names import TensorNames

KV_HEADS = ".attention.head_count_kv"  # of GGUF files, one number or one of each layer


def same_kv_heads(fields: Any, num_heads: int) -> int:
    """KV heads of a GGUF file whose layers have all as many."""
    return fields.integer(KV_HEADS, MAX_HEADS, num_heads)


def nothing_more(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """No term beside those of Llama."""
    return {}


@dataclass(frozen=True, slots=True)
class GgufTerms:
    """What GGUF files of a family have beside those of Llama.

    architecture: their name of it. keys: metadata of further terms, which `terms` reads: (fields, the fields of
    ModelConfig so far) -> more of those. needs_keys: whether no file can do without them. is_turned: whether the rows
    of q and k lie as pairs that are turned together. eps_key: of the eps of norms. parts, fused: of parts of a layer
    that they call otherwise than others do, or that hold several; grouped: that hold several whose rows come in turn;
    as in TensorNames. has_tiled_values: whether value heads come in the order of `checkpoints.gguf.value_heads`.
    kv_heads: (fields, query heads) -> KV heads of the layers that `ModelConfig.num_kv_heads` is about.
    may_share_values: whether layers without a v of their own take it from the projection of k. may_be_dense: whether an
    architecture whose keys count experts has models without any.
    """

    architecture: str
    keys: tuple[str, ...] = ()
    terms: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = nothing_more
    is_turned: bool = False
    eps_key: str = ".attention.layer_norm_rms_epsilon"
    parts: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    grouped: tuple[tuple[str, tuple[str, ...]], ...] = ()
    has_tiled_values: bool = False
    needs_keys: bool = True
    kv_heads: Callable[[Any, int], int] = same_kv_heads
    may_share_values: bool = False
    may_be_dense: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between the families. Every default is that of transformers for a key that config.json lacks.

    qkv_bias, o_bias, mlp_bias: whether the linears have one, or the key that decides. eps_key: of the eps of norms.
    windows: the sliding window of each layer. rope: (fields, head_dim, max_position_embeddings) -> the rotary embedding
    of layers that see everything.
    terms: (fields, the fields of ModelConfig so far) -> those that Llama leaves at their defaults, and better ones.
    wrapper: model_type and architecture of a model of text and images whose text model is of this family.
    tensor_names: what its files call the tensors. gguf: what GGUF files of it say; None where there are none.
    """

    architecture: str
    defaults: Mapping[str, Any]
    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: bool = False
    act_key: str = "hidden_act"
    eps_key: str = "rms_norm_eps"
    windows: Windows = no_windows
    rope: Callable[[JsonFields, int, int], RopeConfig] = read_rope
    terms: Callable[[JsonFields, Mapping[str, Any]], dict[str, Any]] = nothing_more
    wrapper: tuple[str, str] | None = None
    tensor_names: TensorNames = TensorNames()
    gguf: GgufTerms | None = None
