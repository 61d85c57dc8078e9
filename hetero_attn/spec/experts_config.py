"""The mixture of experts of a model, out of the keys of its config: a function for each family that has one.

A family with experts of another kind (biases, groups, other scores) has none, and its models are refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.json_fields import REQUIRED, JsonFields, show
from hetero_attn.spec.limits import MAX_CONTEXT

MAX_EXPERTS = 1 << 12
MAX_WIDTH = 1 << 20
GLM_EPS = 1e-20  # beside the sum of weights, which may be all but zero
# What GGUF files call their gating functions.
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3
GATINGS = {
    SOFTMAX: "the softmax of all scores",
    SIGMOID: "the sigmoid of each score",
    SOFTMAX_OF_CHOSEN: "the softmax of the chosen scores",
}


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The experts that take the place of some layers' MLP.

    experts: how many a layer has; per_row: how many compute a row; width: neurons of one. normalised: whether the
    weights of a row's experts are divided by their sum. shared_width: neurons of an expert that computes every row, 0
    without one. layers: which layers have experts. shared_factor: whether what the shared expert gives is multiplied by
    the sigmoid of a product with the row. sigmoid, groups, kept_groups, eps, scale: as in `Scoring`; is_corrected:
    whether scores are corrected for the choice. has_bias: whether router and experts have biases. clamp: (alpha, limit)
    of `clamped_silu_mul`, the activation of the experts where it is not the MLP's. beside_mlp: whether the shared
    expert is the layer's MLP, with norms of its own, and the router sees the residual under one without a weight.
    """

    experts: int
    per_row: int
    width: int
    normalised: bool
    shared_width: int
    layers: tuple[bool, ...]
    shared_factor: bool = True
    sigmoid: bool = False
    is_corrected: bool = False
    groups: int = 1
    kept_groups: int = 1
    eps: float = 0.0
    scale: float = 1.0
    has_bias: bool = False
    clamp: tuple[float, float] | None = None
    beside_mlp: bool = False

    @property
    def has_shared(self) -> bool:
        """Whether there is a shared expert."""
        return self.shared_width > 0

    @property
    def is_gated(self) -> bool:
        """Whether there is a shared expert with a factor."""
        return self.has_shared and self.shared_factor


def mixtral_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in every layer, as wide as the config's MLP; weights always normalised, none shared."""
    return ExpertsConfig(
        **_counts(fields, "num_local_experts", 8, 2),
        width=fields.integer("intermediate_size", MAX_WIDTH, 14336),
        normalised=True,
        shared_width=0,
        layers=(True,) * num_layers,
    )


def olmoe_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in every layer, as wide as the config's MLP; none shared."""
    if fields.get("clip_qkv") is not None:
        raise UnsupportedModelError(f"{fields.path}: clip_qkv is {show(fields.get('clip_qkv'))}, which is not computed")
    return ExpertsConfig(
        **_counts(fields, "num_experts", 64, 8),
        width=fields.integer("intermediate_size", MAX_WIDTH, 2048),
        normalised=fields.boolean("norm_topk_prob"),
        shared_width=0,
        layers=(True,) * num_layers,
    )


def qwen2_moe_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in some layers and a shared one beside them."""
    if not fields.boolean("qkv_bias", True):
        raise UnsupportedModelError(f"{fields.path}: qkv_bias is false, and this architecture runs with biases only")
    return ExpertsConfig(
        **_counts(fields, "num_experts", 60, 4),
        width=fields.integer("moe_intermediate_size", MAX_WIDTH, 1408),
        normalised=fields.boolean("norm_topk_prob"),
        shared_width=fields.integer("shared_expert_intermediate_size", MAX_WIDTH, 5632),
        layers=_sparse_layers(fields, num_layers),
    )


def qwen3_moe_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in some layers. Hub configs say num_experts, those that transformers 5 writes num_local_experts."""
    key = "num_experts" if fields.get("num_experts") is not None else "num_local_experts"
    return ExpertsConfig(
        **_counts(fields, key, 128, 8),
        width=fields.integer("moe_intermediate_size", MAX_WIDTH, 768),
        normalised=fields.boolean("norm_topk_prob"),
        shared_width=0,
        layers=_sparse_layers(fields, num_layers),
    )


def gpt_oss_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in every layer with biases, whose activation is clamped; weights by the softmax of the chosen ones."""
    return ExpertsConfig(
        **_counts(fields, "num_local_experts", 128, 4),
        width=fields.integer("intermediate_size", MAX_WIDTH, 2880),
        normalised=True,  # which makes the softmax over all that over the chosen
        shared_width=0,
        layers=(True,) * num_layers,
        has_bias=True,
        clamp=(fields.number("swiglu_alpha", 0.0, 1e6, 1.702), fields.number("swiglu_limit", 0.0, 1e6, 7.0)),
    )


def glm4_moe_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts behind the first layers, chosen by corrected sigmoids, of the best groups; shared ones as one MLP."""
    width = fields.integer("moe_intermediate_size", MAX_WIDTH, 1408)
    dense = fields.integer("first_k_dense_replace", MAX_CONTEXT, 1, low=0)
    groups, kept = fields.integer("n_group", MAX_EXPERTS, 1), fields.integer("topk_group", MAX_EXPERTS, 1)
    counts = _counts(fields, "n_routed_experts", 128, 8)
    if groups > 1 and (counts["experts"] % groups or counts["experts"] < 2 * groups):
        fields.fail("n_group", groups, f"a divisor of the {counts['experts']} experts that leaves two in a group")
    if kept > groups or kept * (counts["experts"] // groups) < counts["per_row"]:
        fields.fail("topk_group", kept, f"groups of {groups} that hold at least {counts['per_row']} experts")
    return ExpertsConfig(
        **counts,
        width=width,
        normalised=fields.boolean("norm_topk_prob", True),
        shared_width=width * fields.integer("n_shared_experts", MAX_EXPERTS, 1),
        layers=tuple(layer >= dense for layer in range(num_layers)),
        shared_factor=False,
        sigmoid=True,
        is_corrected=True,
        groups=groups,
        kept_groups=kept,
        eps=GLM_EPS,
        scale=fields.number("routed_scaling_factor", 0.0, 1e6, 1.0),
    )


def minimax_m2_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in every layer, as wide as the config's MLP, chosen by corrected sigmoids; none shared."""
    return ExpertsConfig(
        **_counts(fields, "num_local_experts", 256, 8),
        width=fields.integer("intermediate_size", MAX_WIDTH, 1536),
        normalised=True,
        shared_width=0,
        layers=(True,) * num_layers,
        sigmoid=True,
        is_corrected=True,
    )


def qwen3_next_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in some layers and a shared one beside them."""
    return ExpertsConfig(
        **_counts(fields, "num_experts", 512, 10),
        width=fields.integer("moe_intermediate_size", MAX_WIDTH, 512),
        normalised=fields.boolean("norm_topk_prob", True),
        shared_width=fields.integer("shared_expert_intermediate_size", MAX_WIDTH, 512),
        layers=_sparse_layers(fields, num_layers),
    )


def qwen3_5_moe_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in every layer and a shared one beside them; weights always normalised."""
    return ExpertsConfig(
        **_counts(fields, "num_experts", 256, 8),
        width=fields.integer("moe_intermediate_size", MAX_WIDTH, 512),
        normalised=True,
        shared_width=fields.integer("shared_expert_intermediate_size", MAX_WIDTH, 512),
        layers=(True,) * num_layers,
    )


def gemma4_experts(fields: JsonFields, num_layers: int) -> ExpertsConfig:
    """Experts in every layer beside its MLP; weights normalised, then multiplied by a number of each expert."""
    return ExpertsConfig(
        **_counts(fields, "num_experts", REQUIRED, REQUIRED, per_row_key="top_k_experts"),
        width=fields.integer("moe_intermediate_size", MAX_WIDTH),
        normalised=True,
        shared_width=fields.integer("intermediate_size", MAX_WIDTH),
        layers=(True,) * num_layers,
        shared_factor=False,
        beside_mlp=True,
    )


def gguf_experts(fields: Any, found: Mapping[str, Any], normalised: bool, gating: int = SOFTMAX) -> ExpertsConfig:
    """Experts in every layer of a GGUF file, by its metadata; found: the fields of ModelConfig so far. normalised: what
    the architecture does where the file does not say. gating: its gating function."""
    experts = fields.integer(".expert_count", MAX_EXPERTS)
    per_row = fields.integer(".expert_used_count", MAX_EXPERTS)
    if per_row > experts:
        fields.fail(".expert_used_count", per_row, f"at most the {experts} experts")
    is_sigmoid = gating == SIGMOID
    if (scale := fields.number(".expert_weights_scale", 0.0, 1e6, 1.0)) != 1.0 and not is_sigmoid:
        raise UnsupportedModelError(f"{fields.path}: expert_weights_scale is {scale:g}, which is not computed")
    said = fields.integer(".expert_gating_func", 255, gating, low=0)
    if said not in (0, gating):  # 0 is said by files whose architecture decides
        raise UnsupportedModelError(
            f"{fields.path}: {fields.key('.expert_gating_func')} is {said}; only {gating}, {GATINGS[gating]}"
        )
    return ExpertsConfig(
        experts=experts,
        per_row=per_row,
        width=fields.integer(".expert_feed_forward_length", MAX_WIDTH, found["intermediate_size"]),
        normalised=fields.boolean(".expert_weights_norm", normalised),
        shared_width=fields.integer(".expert_shared_feed_forward_length", MAX_WIDTH, 0),
        layers=(True,) * found["num_layers"],
        sigmoid=is_sigmoid,
        is_corrected=is_sigmoid,
        scale=scale,
    )


def _counts(
    fields: JsonFields, key: str, experts: Any, per_row: Any, per_row_key: str = "num_experts_per_tok"
) -> dict[str, Any]:
    experts = fields.integer(key, MAX_EXPERTS, experts)
    found = fields.integer(per_row_key, MAX_EXPERTS, per_row)
    if found > experts:
        fields.fail(per_row_key, found, f"at most the {experts} of {key}")
    return {"experts": experts, "per_row": found}


def _sparse_layers(fields: JsonFields, num_layers: int) -> tuple[bool, ...]:
    """Every decoder_sparse_step-th layer has experts, but for those of mlp_only_layers."""
    step = fields.integer("decoder_sparse_step", num_layers, 1)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        fields.fail("mlp_only_layers", show(dense), "a list of layers")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))
