"""What a model is made of: the one door through which Hugging Face config names enter.

`ModelConfig.from_dir` reads `config.json` and `generation_config.json` directly, without transformers: nothing a model
directory contains is ever executed (`auto_map` is ignored), and a plan can be made in milliseconds. Behind this door
there are only our own field names; every default is the one transformers applies to that family when a key is absent.

A value that no real model has (100 000 layers, a head count that does not divide, an unknown rope type) is refused
here, before any weight is read or any memory is sized by it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_attn.errors import ConfigError, UnsupportedModelError
from hetero_attn.spec.delta_config import DeltaConfig
from hetero_attn.spec.draft_heads.eagle_config import EagleConfig
from hetero_attn.spec.experts_config import ExpertsConfig
from hetero_attn.spec.families.table import family_of, text_model
from hetero_attn.spec.json_fields import JsonFields, read_json, show
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
from hetero_attn.spec.tensor_names import AS_OURS, TensorNames

READ_METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "bitsandbytes", "mxfp4")
# Names of activations in config files -> ours.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder, in our words.

    Attributes:
        architecture: Hugging Face class name, for display only; behaviour is in the other fields.
        sliding_window: per layer, how many newest tokens a token sees (itself included); 0 sees all. Key j is
            visible to query i iff j <= i and (window == 0 or j > i - window).
        qkv_bias, o_bias, mlp_bias: whether those linears carry a bias.
        qk_norm: whether q and k heads are RMS-normalised (over head_dim) before rotation.
        hidden_act: of the MLP, "silu" or "gelu_tanh".
        rope: of all layers, or of those that attend to everything; layer_ropes: of each layer, empty where all have
            the one.
        norm_offset: added to every norm's weight. post_norms: whether what attention and MLP give is normalised before
            it is added to the residual stream.
        query_scale: factor on q @ k before the softmax; None is head_dim ** -0.5.
        pre_norms: whether attention and MLP see the residual stream normalised.
        embedding_scale: factor on the rows of the token embedding. logit_scale: factor on the logits.
        experts: of a mixture of experts, None for a dense model.
        qk_norm_whole: whether q, and k, is normalised over all its heads together, beside which qk_norm is false.
        layer_norm: whether norms are layer norms, which take the mean out first; norm_bias: whether they add a bias.
            rms_norm_eps is the eps of either kind.
        parallel: whether attention and MLP see the same normalised residual stream, under the norm of attention.
        attention_cap, logit_cap: soft caps c of the scores of attention and of the logits, x becomes c * tanh(x / c);
            0 for none.
        has_sinks: whether every head has one more score in the denominator of its softmax.
        delta: of gated DeltaNet in the place of some layers' attention, None for a model without.
        gated_attention: whether what a head attends to is multiplied by the sigmoid of a projection.
        spare_layers: how many layers files may have behind the model's, which it does not use.
        full_attention: KV heads and head_dim of the layers without a window, None where they are as in the others.
        value_norm: whether v heads are RMS-normalised too, without a weight.
        shared_projection: whether layers without a window make v, before its norm, by the projection of k.
        layer_scalars: whether what leaves a layer is multiplied by a number of its own.
        eagle: of a head that drafts for a larger model, None for a model.
        gated: whether the MLP has a gate beside what it activates; else it activates that itself.
        dtype: dtype named by the config ("fp32", "bf16", "fp16"), None when it names none; the headers of the weight
            files are the truth.
        bos_token_id, pad_token_id: None when the model has none. eos_token_ids: any of them ends a sequence.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hidden_act: str
    sliding_window: tuple[int, ...]
    rope: RopeConfig
    dtype: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    layer_ropes: tuple[RopeConfig, ...] = ()
    norm_offset: float = 0.0
    post_norms: bool = False
    query_scale: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    pre_norms: bool = True
    experts: ExpertsConfig | None = None
    qk_norm_whole: bool = False
    layer_norm: bool = False
    norm_bias: bool = False
    parallel: bool = False
    gated: bool = True
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    has_sinks: bool = False
    spare_layers: int = 0
    delta: DeltaConfig | None = None
    gated_attention: bool = False
    eagle: EagleConfig | None = None
    full_attention: tuple[int, int] | None = None
    value_norm: bool = False
    shared_projection: bool = False
    layer_scalars: bool = False

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def attention_scale(self) -> float:
        """Factor on q @ k before the softmax."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def rows_of(self, part: str) -> int:
        """Output features of a part of a layer: q, k, v, gate, up, or one of gated DeltaNet."""
        if self.delta is not None and part.startswith("delta_"):
            return self.delta.key_heads * self.delta.rows_per_key_head(part)
        heads = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}.get(part)
        return self.intermediate_size if heads is None else heads * self.head_dim

    def rows_in_turn(self, part: str) -> int:
        """Rows of a part that lie together where its rows and those of other parts come in turn."""
        return self.head_dim if self.delta is None or part in ("q", "q_gate") else self.delta.rows_per_key_head(part)

    def heads_of(self, layer: int) -> tuple[int, int]:
        """KV heads of a layer's attention, and their head_dim."""
        if self.full_attention is None or self.sliding_window[layer]:
            return self.num_kv_heads, self.head_dim
        return self.full_attention

    @property
    def head_shapes(self) -> tuple[tuple[int, int], ...]:
        """Every different (query heads of a KV head, head_dim) of the layers."""
        kinds = dict.fromkeys(self.heads_of(layer) for layer in range(self.num_layers))
        return tuple((self.num_heads // kv_heads, head_dim) for kv_heads, head_dim in kinds)

    def rope_of(self, layer: int) -> RopeConfig:
        """The rotary embedding of a layer."""
        return self.layer_ropes[layer] if self.layer_ropes else self.rope

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read and validate the config of the model directory `path`.

        Args:
            path: local directory with `config.json` and, optionally, `generation_config.json`.

        Raises:
            ConfigError: a file is missing, too large, not JSON, or holds a missing, mistyped or impossible value.
            UnsupportedModelError: the model is well formed but of a kind hetero_attn does not run.
        """
        path = Path(path)
        fields = JsonFields(path / "config.json", read_json(path / "config.json"))
        generation = {}
        if (path / "generation_config.json").exists():
            generation = read_json(path / "generation_config.json")
        return _parse(fields, JsonFields(path / "generation_config.json", generation))


def _parse(fields: JsonFields, generation: JsonFields) -> ModelConfig:
    fields = text_model(fields)
    family = family_of(fields)
    fields = JsonFields(fields.path, fields.values, family.defaults)
    _check_supported(fields)
    num_layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    vocab_size = fields.integer("vocab_size", MAX_VOCAB)
    max_position_embeddings = fields.integer("max_position_embeddings", MAX_CONTEXT)
    bos = _token_ids("bos_token_id", fields, generation, vocab_size)
    pad = _token_ids("pad_token_id", fields, generation, vocab_size)
    sizes = _sizes(fields)
    found: dict[str, Any] = {
        "architecture": family.architecture,
        **sizes,
        "num_layers": num_layers,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": fields.number(family.eps_key, 0.0, 1.0, 1e-6),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings"),
        "qkv_bias": _switch(fields, family.qkv_bias),
        "o_bias": _switch(fields, family.o_bias),
        "mlp_bias": _switch(fields, family.mlp_bias),
        "qk_norm": family.qk_norm,
        "hidden_act": _activation(fields, family.act_key),
        "sliding_window": family.windows(fields, num_layers),
        "rope": family.rope(fields, sizes["head_dim"], max_position_embeddings),
        "dtype": _dtype(fields),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": _token_ids("eos_token_id", fields, generation, vocab_size),
        "pad_token_id": pad[0] if pad else None,
    }
    return ModelConfig(**found | family.terms(fields, found))


def _switch(fields: JsonFields, value: bool | str) -> bool:
    """What a family says of a bias: whether it has one, or which key decides."""
    return fields.boolean(value) if isinstance(value, str) else value


def _check_supported(fields: JsonFields) -> None:
    for key in ("quantization_config", "compression_config"):
        if (found := fields.get(key)) is not None:
            if key == "quantization_config" and isinstance(found, dict) and found.get("quant_method") in READ_METHODS:
                continue  # checkpoints.quantised reads the rest of it
            method = found.get("quant_method", "unnamed") if isinstance(found, dict) else found
            raise UnsupportedModelError(
                f"{fields.path}: {key}: the weights are quantised by {show(method)}, which is not read; take them "
                f"unquantised, as GGUF, or quantised by {', '.join(READ_METHODS)}"
            )


def _activation(fields: JsonFields, key: str) -> str:
    name = fields.get(key, "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{fields.path}: {key} is {show(name)}, which is not computed. Known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _sizes(fields: JsonFields) -> dict[str, int]:
    """The widths, with the divisions checked that would else show up as shape errors deep in a kernel."""
    hidden_size = fields.integer("hidden_size", MAX_HIDDEN)
    num_heads = fields.integer("num_attention_heads", MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", MAX_HEADS, num_heads)
    head_dim = fields.integer("head_dim", MAX_HEAD_DIM, None, low=2)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(
                f"{fields.path}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads} and "
                "there is no head_dim; add head_dim or correct the sizes"
            )
        head_dim = hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{fields.path}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}; "
            "every KV head must serve the same number of query heads"
        )
    return {
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size", MAX_INTERMEDIATE),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }


def _dtype(fields: JsonFields) -> str | None:
    name = fields.get("dtype") or fields.get("torch_dtype")
    if name is None or name == "auto":
        return None
    short = _DTYPES.get(str(name).removeprefix("torch."))
    return short or fields.fail("dtype", name, f"one of {', '.join(_DTYPES)}")


def _token_ids(key: str, fields: JsonFields, generation: JsonFields, vocab_size: int) -> tuple[int, ...]:
    """Ids under `key`; the generation config outranks the model config, and negative means none (old Llama files).

    Padding, one of several end tokens, or a family's default, beyond the vocabulary can never come up, so it is left
    out.
    """
    source = generation if generation.get(key) is not None else fields
    found = source.get(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token_id in ids:
        is_said = key in source.values and key != "pad_token_id"
        beyond = is_said and isinstance(token_id, int) and token_id >= vocab_size
        beyond = beyond and not any(isinstance(other, int) and 0 <= other < vocab_size for other in ids)
        if not isinstance(token_id, int) or isinstance(token_id, bool) or beyond:
            source.fail(key, found, f"token ids below vocab_size {vocab_size}")
    return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)


def tensor_names(path: Path) -> TensorNames:
    """What the files of a model directory call their tensors; ours where the directory has no config of a family."""
    if not (path / "config.json").exists():
        return AS_OURS
    fields = text_model(JsonFields(path / "config.json", read_json(path / "config.json")))
    return family_of(fields).tensor_names
