"""What the parts of a model are called: by us, and in the files of the families that call them otherwise."""

from dataclasses import dataclass, replace

LAYER_PREFIX = "model.layers."
CORRECTION = "e_score_correction_bias"  # the last word of the name of what scores of experts are corrected by

# Our word for each part of the model -> where the Llama, Mistral and Qwen families keep it, or a name that only we use.
_TOP_PARTS = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "fusion": "fc",
    "fusion_norm": "input_norm",
}
_LAYER_PARTS = {
    "attention_norm": "input_layernorm",
    "hidden_norm": "hidden_norm",
    "attention": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "q_gate": "self_attn.q_gate_proj",
    "attention_post_norm": "self_attn.post_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "mlp_post_norm": "mlp.post_norm",
    "shared_post_norm": "mlp.shared_post_norm",
    "experts_norm": "mlp.experts_norm",
    "experts_post_norm": "mlp.experts_post_norm",
    "router": "mlp.gate",
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_factor": "mlp.shared_expert_gate",
    "delta": "linear_attn",
    "delta_q": "linear_attn.q_proj",
    "delta_k": "linear_attn.k_proj",
    "delta_v": "linear_attn.v_proj",
    "delta_z": "linear_attn.z_proj",
    "delta_b": "linear_attn.b_proj",
    "delta_a": "linear_attn.a_proj",
    "delta_conv": "linear_attn.conv1d",
    "delta_norm": "linear_attn.norm",
    "delta_out": "linear_attn.out_proj",
}
_EXPERT_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def tensor_name(part: str, layer: int | None = None, kind: str = "weight") -> str:
    """Our name of one part of the model, that of Llama's checkpoints where those have it.

    Args:
        part: embed, final_norm, head, and of a head that drafts fusion, fusion_norm (layer None), or, in a layer:
            attention_norm, hidden_norm, q, k, v, q_norm, k_norm, o, attention_post_norm, mlp_norm, gate, up, down,
            mlp_post_norm, shared_post_norm, experts_norm, experts_post_norm, router, shared_gate, shared_up,
            shared_down, shared_factor, attention, q_gate, delta, delta_q, delta_k, delta_v, delta_z, delta_b, delta_a,
            delta_conv, delta_norm, delta_out.
        layer: layer index. kind: the name's last word: "weight", "bias", of attention "sinks", of delta "A_log" and
            "dt_bias", of a router "scale" and "per_expert_scale".
    """
    if layer is None:
        return f"{_TOP_PARTS[part]}.{kind}"
    return f"{LAYER_PREFIX}{layer}.{_LAYER_PARTS[part]}.{kind}"


def layer_scalar(layer: int) -> str:
    """Name of the number by which what leaves a layer is multiplied."""
    return f"{LAYER_PREFIX}{layer}.layer_scalar"


def expert_tensor(layer: int, expert: int, part: str) -> str:
    """Name of the weight of one routed expert's part: gate, up or down."""
    return f"{LAYER_PREFIX}{layer}.mlp.experts.{expert}.{_EXPERT_PARTS[part]}.weight"


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How the files of a family call the tensors where they do not call them as we do.

    layer_parts: pairs of their name of a part of a layer and our word for it. prefixes: what stands in the place of
    "model." in files that hold other models too. fused: pairs of their name of a part and our words of those that it
    holds, one below the other. is_turned: whether the rows of q and k lie as pairs that are turned together.
    grouped: the same of parts whose rows come in turn, `ModelConfig.rows_in_turn` of each.
    has_turned_experts: whether tensors of all experts have their inputs as rows, and gate and up in turn as columns.
    """

    layer_parts: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    is_turned: bool = False
    has_turned_experts: bool = False
    grouped: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def with_parts(self, *layer_parts: tuple[str, str]) -> "TensorNames":
        """These names and more parts of a layer."""
        return replace(self, layer_parts=(*self.layer_parts, *layer_parts))

    def ours(self, name: str) -> str:
        """Our name of a tensor of theirs; a tensor that none of these rules is about keeps its name."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                name = "model." + name.removeprefix(prefix)
        layer, part, kind = split_name(name)
        word = dict(self.layer_parts).get(part)
        return name if word is None else tensor_name(word, layer, kind)


def split_name(name: str) -> tuple[int, str, str]:
    """Layer, part and kind of a layer's tensor: of model.layers.3.mlp.up_proj.weight 3, mlp.up_proj and weight.

    (0, "", "") of any other name.
    """
    layer, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
    part, _, kind = rest.rpartition(".")
    return (int(layer), part, kind) if name.startswith(LAYER_PREFIX) and layer.isdecimal() else (0, "", "")


AS_OURS = TensorNames()
