"""Every family by the model_type of its config.json, and which of them a config is of."""

from hetero_attn.errors import ConfigError, UnsupportedModelError, nearest
from hetero_attn.spec.draft_heads.eagle3 import EAGLE3
from hetero_attn.spec.draft_heads.eagle_config import check_known_head, is_head, layer_fields
from hetero_attn.spec.families.cohere import COHERE2
from hetero_attn.spec.families.experts import EXPERT_COUNT, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.gemma import GEMMA2, GEMMA3
from hetero_attn.spec.families.glm import GLM4
from hetero_attn.spec.families.granite import GRANITE
from hetero_attn.spec.families.mixtures.gemma4 import GEMMA4
from hetero_attn.spec.families.mixtures.glm4_moe import GLM4_MOE
from hetero_attn.spec.families.mixtures.gpt_oss import GPT_OSS
from hetero_attn.spec.families.mixtures.minimax_m2 import MINIMAX_M2
from hetero_attn.spec.families.mixtures.qwen_delta import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from hetero_attn.spec.families.olmo import OLMO2, OLMO3
from hetero_attn.spec.families.phi import PHI3
from hetero_attn.spec.families.seed_oss import SEED_OSS
from hetero_attn.spec.families.smollm3 import SMOLLM3
from hetero_attn.spec.families.starcoder import STARCODER2
from hetero_attn.spec.families.windows import one_window, windows_from
from hetero_attn.spec.json_fields import JsonFields, show

# GGUF files of Mistral have the architecture llama, those of OLMo 3 olmo2.
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048},
        mlp_bias="mlp_bias",
        gguf=GgufTerms("llama", is_turned=True),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        qkv_bias=False,
        o_bias=False,
        windows=one_window,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
        qkv_bias=True,
        o_bias=False,
        windows=windows_from("max_window_layers"),
        gguf=GgufTerms("qwen2"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
        qk_norm=True,
        windows=windows_from("max_window_layers"),
        gguf=GgufTerms("qwen3"),
    ),
    "cohere2": COHERE2,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "glm4": GLM4,
    "granite": GRANITE,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "phi3": PHI3,
    "seed_oss": SEED_OSS,
    "smollm3": SMOLLM3,
    "starcoder2": STARCODER2,
    "glm4_moe": GLM4_MOE,
    "gpt_oss": GPT_OSS,
    "minimax_m2": MINIMAX_M2,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5_MOE,
}

_IN_GGUF = [(family.gguf.architecture, family) for family in FAMILIES.values() if family.gguf is not None]
# By the architecture that their GGUF files name, which a dense family and one with experts may share.
GGUF_EXPERT_FAMILIES = {name: family for name, family in _IN_GGUF if EXPERT_COUNT in family.gguf.keys}
GGUF_FAMILIES = {
    name: family for name, family in _IN_GGUF if family.gguf.may_be_dense or EXPERT_COUNT not in family.gguf.keys
}

LATENT_SIZE = "kv_lora_rank"  # of DeepSeek, Kimi and GLM-4.7-Flash
SHARED_END = "ForCausalLM"


def text_model(fields: JsonFields) -> JsonFields:
    """The part of a config of text and images that describes its text model, what is said of both beside it; of a head
    that drafts what it says of its layer beside the rest."""
    if is_head(fields):
        return layer_fields(fields)
    name = fields.get("model_type")
    text = fields.get("text_config")
    family = next((family for family in FAMILIES.values() if family.wrapper and family.wrapper[0] == name), None)
    if family is None or not isinstance(text, dict):
        return fields
    around = {key: value for key, value in fields.values.items() if not key.endswith("_config") or "quant" in key}
    inner = {key: value for key, value in text.items() if key != "architectures"}
    model_type = next(key for key, value in FAMILIES.items() if value is family)
    return JsonFields(fields.path, around | inner | {"model_type": model_type})


def family_of(fields: JsonFields) -> Family:
    """The family of a config as `text_model` gives it; heads that draft are one that is none of FAMILIES."""
    if is_head(fields):
        return EAGLE3
    check_known_head(fields)
    return FAMILIES[family_name(fields)]


def family_name(fields: JsonFields) -> str:
    """The family key; `model_type` decides, as in transformers, and `architectures` must not contradict it."""
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    known = f"Known architectures: {', '.join(by_architecture)}"
    listed = fields.get("architectures") or []
    architecture = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
    model_type = fields.get("model_type") or by_architecture.get(architecture)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (architecture is not None and architecture not in _architectures(family)):
        found = architecture or model_type
        if found is None:
            raise ConfigError(f"{fields.path}: neither model_type nor architectures is given. {known}")
        raise UnsupportedModelError(
            f"{fields.path}: architecture {show(found)} (model_type {show(model_type)}) is not supported"
            f"{_why_not(fields, str(found), by_architecture)}.\n{known}"
        )
    return model_type


def _why_not(fields: JsonFields, found: str, known: dict[str, str]) -> str:
    """What is missing for a family where its config tells, else a known name that is near, whatever end it shares with
    others, by which DeepSeek would be like Phi."""
    if fields.get(LATENT_SIZE) is not None:
        return f": its attention has a latent ({LATENT_SIZE}), which is not here yet"
    return nearest(found, known, SHARED_END)


def _architectures(family: Family) -> tuple[str, ...]:
    return (family.architecture, *(family.wrapper or ())[1:])
