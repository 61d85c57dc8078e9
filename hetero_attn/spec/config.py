"""What a model is made of: the one door through which Hugging Face config names enter.

`ModelConfig.from_dir` reads `config.json` and `generation_config.json` directly, without transformers: nothing a model
directory contains is ever executed (`auto_map` is ignored), and a plan can be made in milliseconds. Behind this door
there are only our own field names; every default is the one transformers applies to that family when a key is absent.

A value that no real model has (100 000 layers, a head count that does not divide, an unknown rope type) is refused
here, before any weight is read or any memory is sized by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_attn.errors import ConfigError, UnsupportedModelError, nearest
from hetero_attn.spec.json_fields import JsonFields, read_json, show

MAX_LAYERS = 1024
MAX_VOCAB = 1 << 22
MAX_HIDDEN = 1 << 18
MAX_INTERMEDIATE = 1 << 20
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 10
MAX_CONTEXT = 1 << 25
READ_METHODS = ("gptq", "awq", "compressed-tensors")
MIN_BETA = 1e-6  # turns of yarn's slowest dimension: the logarithm of nearly nothing is no dimension

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, and how they stretch beyond the trained context.

    `rotary_dim` counts the leading dimensions of a head that are rotated; the rest pass through. Fields that a
    `rope_type` does not use keep their defaults. `original_max_position_embeddings` counts tokens;
    `attention_factor` None means "derive it from `factor`, `mscale` and `mscale_all_dim`" (yarn only). `divisors`, one
    for each pair, are the whole scaling of rope type "divisors", which only GGUF files have.
    """

    rotary_dim: int
    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder, in our words.

    Attributes:
        architecture: Hugging Face class name, for display only; behaviour is in the other fields.
        sliding_window: per layer, how many newest tokens a token sees (itself included); 0 sees all. Key j is
            visible to query i iff j <= i and (window == 0 or j > i - window).
        qkv_bias, o_bias, mlp_bias: whether those linears carry a bias.
        qk_norm: whether q and k heads are RMS-normalised (over head_dim) before rotation.
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

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def attention_scale(self) -> float:
        """Factor on q @ k before the softmax."""
        return self.head_dim**-0.5

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


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between the families; `defaults` are those of transformers for keys absent from the JSON."""

    architecture: str
    defaults: Mapping[str, Any]
    qkv_bias: bool | None = None  # None: the key attention_bias decides, for qkv and o alike
    mlp_bias: bool | None = False  # None: the key mlp_bias decides
    qk_norm: bool = False


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", {"max_position_embeddings": 2048}, mlp_bias=None),
    "mistral": _Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        qkv_bias=False,
    ),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
        qkv_bias=True,
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
        qk_norm=True,
    ),
}


def _parse(fields: JsonFields, generation: JsonFields) -> ModelConfig:
    name = _family_name(fields)
    family = _FAMILIES[name]
    fields = JsonFields(fields.path, fields.values, family.defaults)
    _check_supported(fields)
    num_layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    vocab_size = fields.integer("vocab_size", MAX_VOCAB)
    max_position_embeddings = fields.integer("max_position_embeddings", MAX_CONTEXT)
    attention_bias = fields.boolean("attention_bias") if family.qkv_bias is None else False
    bos = _token_ids("bos_token_id", fields, generation, vocab_size)
    pad = _token_ids("pad_token_id", fields, generation, vocab_size)
    sizes = _sizes(fields)
    return ModelConfig(
        architecture=family.architecture,
        **sizes,
        num_layers=num_layers,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias") if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        hidden_act="silu",
        sliding_window=_windows(fields, name, num_layers),
        rope=_rope(fields, sizes["head_dim"], max_position_embeddings),
        dtype=_dtype(fields),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_token_ids("eos_token_id", fields, generation, vocab_size),
        pad_token_id=pad[0] if pad else None,
    )


def _family_name(fields: JsonFields) -> str:
    """The family key; `model_type` decides, as in transformers, and `architectures` must not contradict it."""
    by_architecture = {family.architecture: name for name, family in _FAMILIES.items()}
    known = f"Known architectures: {', '.join(by_architecture)}"
    listed = fields.get("architectures") or []
    architecture = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
    model_type = fields.get("model_type") or by_architecture.get(architecture)
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (architecture is not None and architecture != family.architecture):
        found = architecture or model_type
        if found is None:
            raise ConfigError(f"{fields.path}: neither model_type nor architectures is given. {known}")
        raise UnsupportedModelError(
            f"{fields.path}: architecture {show(found)} (model_type {show(model_type)}) is not supported"
            f"{nearest(str(found), by_architecture)}. {known}"
        )
    return model_type


def _check_supported(fields: JsonFields) -> None:
    for key in ("quantization_config", "compression_config"):
        if (found := fields.get(key)) is not None:
            if key == "quantization_config" and isinstance(found, dict) and found.get("quant_method") in READ_METHODS:
                continue  # checkpoints.int4 reads the rest of it
            method = found.get("quant_method", "unnamed") if isinstance(found, dict) else found
            raise UnsupportedModelError(
                f"{fields.path}: {key}: the weights are quantised by {show(method)}, which is not read; take them "
                f"unquantised, as GGUF, or int4 of {', '.join(READ_METHODS)}"
            )
    if (act := fields.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModelError(f"{fields.path}: hidden_act is {show(act)}, only silu is supported")


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


def _windows(fields: JsonFields, family: str, num_layers: int) -> tuple[int, ...]:
    """Sliding window of each layer, 0 for none: uniform in Mistral, from layer types in Qwen, never in Llama."""
    if family == "llama":
        return (0,) * num_layers
    window = fields.integer("sliding_window", MAX_CONTEXT, 0)
    if family == "mistral":
        return (window,) * num_layers
    if not fields.boolean("use_sliding_window"):
        window = 0
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers", MAX_CONTEXT, 28, low=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    return _windows_from_types(fields, layer_types, window, num_layers)


def _windows_from_types(fields: JsonFields, layer_types: Any, window: int, num_layers: int) -> tuple[int, ...]:
    known = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        fields.fail("layer_types", layer_types, f"a list of num_hidden_layers = {num_layers} names")
    for name in layer_types:
        if name not in known:
            raise UnsupportedModelError(
                f"{fields.path}: layer type {show(name)} is not supported. Known layer types: {', '.join(known)}"
            )
    if "sliding_attention" in layer_types and not window:
        raise ConfigError(
            f"{fields.path}: layer_types has sliding_attention, but sliding_window is null or use_sliding_window "
            "false; set both or use full_attention"
        )
    return tuple(window if name == "sliding_attention" else 0 for name in layer_types)


def _rope(fields: JsonFields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """Rope parameters from the new form (`rope_parameters`) or the old (`rope_theta` beside `rope_scaling`)."""
    found = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(found, dict):
        fields.fail("rope_scaling", found, "an object")
    inherited = {key: fields.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = JsonFields(fields.path, found, inherited)
    rope_type = found.get("rope_type", found.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{fields.path}: rope type {show(rope_type)} is not supported{nearest(str(rope_type), ROPE_TYPES)}. "
            f"Known rope types: {', '.join(ROPE_TYPES)}"
        )
    if nested := [key for key, value in found.items() if isinstance(value, dict)]:
        raise UnsupportedModelError(
            f"{fields.path}: rope parameters per layer type ({', '.join(nested)}) are not supported, one set for all is"
        )
    _check_whole_rotation(rope)
    return RopeConfig(
        rotary_dim=_rotary_dim(fields, head_dim),
        rope_type=rope_type,
        theta=rope.number("rope_theta", 1.0, 1e15, 10000.0),
        **_rope_scaling(fields, rope, rope_type, max_position_embeddings),
    )


def _check_whole_rotation(rope: JsonFields) -> None:
    """Heads are rotated whole in these families. A factor below 1 beside them means nothing that all agree on:
    transformers ignores it for the default rope type and fails in the first layer for the others, vLLM applies it."""
    if (factor := rope.number("partial_rotary_factor", 0.0, 1.0, 1.0)) != 1.0:
        raise UnsupportedModelError(
            f"{rope.path}: partial_rotary_factor is {factor:g}, and this architecture rotates whole heads; "
            "transformers ignores it here and others do not, so take it out of the config if the model was trained "
            "without it"
        )


def _rotary_dim(fields: JsonFields, head_dim: int) -> int:
    if head_dim % 2 or head_dim < 4:
        raise ConfigError(
            f"{fields.path}: head_dim {head_dim} would be rotated whole, expected an even number of at least 4, as "
            "rotation works on pairs"
        )
    return head_dim


def _rope_scaling(fields: JsonFields, rope: JsonFields, rope_type: str, max_position_embeddings: int) -> dict[str, Any]:
    """The fields that only scaled rope types have."""
    if rope_type == "default":
        return {}
    if rope_type in ("linear", "dynamic"):
        return {"factor": rope.number("factor", 0.0, 1e6)}
    # A value beside the rope parameters outranks the one inside them, as in transformers.
    original = fields.integer("original_max_position_embeddings", MAX_CONTEXT, 0) or rope.integer(
        "original_max_position_embeddings", MAX_CONTEXT, max_position_embeddings
    )
    scaling = {"original_max_position_embeddings": original}
    if rope_type == "llama3":
        low = rope.number("low_freq_factor", 0.0, 1e6)
        high = rope.number("high_freq_factor", low, 1e6)
        return scaling | {"factor": rope.number("factor", 0.0, 1e6), "low_freq_factor": low, "high_freq_factor": high}
    # transformers takes 0 as "not given" for every number of yarn that may be left out.
    yarn = JsonFields(rope.path, {key: value or None for key, value in rope.values.items() if key != "truncate"})
    return scaling | {
        "factor": yarn.number("factor", 0.0, 1e6, max_position_embeddings / original),
        "attention_factor": yarn.number("attention_factor", 0.0, 1e6, None),
        "beta_fast": yarn.number("beta_fast", MIN_BETA, 1e6, 32.0),
        "beta_slow": yarn.number("beta_slow", MIN_BETA, 1e6, 1.0),
        "mscale": yarn.number("mscale", 0.0, 1e6, 0.0),
        "mscale_all_dim": yarn.number("mscale_all_dim", 0.0, 1e6, 0.0),
        "truncate": rope.boolean("truncate", True),
    }


def _dtype(fields: JsonFields) -> str | None:
    name = fields.get("dtype") or fields.get("torch_dtype")
    if name is None or name == "auto":
        return None
    short = _DTYPES.get(str(name).removeprefix("torch."))
    return short or fields.fail("dtype", name, f"one of {', '.join(_DTYPES)}")


def _token_ids(key: str, fields: JsonFields, generation: JsonFields, vocab_size: int) -> tuple[int, ...]:
    """Ids under `key`; the generation config outranks the model config, and negative means none (old Llama files).

    Padding, or one of several end tokens, beyond the vocabulary can never come up, so it is left out.
    """
    source = generation if generation.get(key) is not None else fields
    found = source.get(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token_id in ids:
        beyond = key != "pad_token_id" and isinstance(token_id, int) and token_id >= vocab_size
        beyond = beyond and not any(isinstance(other, int) and 0 <= other < vocab_size for other in ids)
        if not isinstance(token_id, int) or isinstance(token_id, bool) or beyond:
            source.fail(key, found, f"token ids below vocab_size {vocab_size}")
    return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
