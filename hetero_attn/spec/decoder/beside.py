"""What experts beside a layer's MLP declare: both see the residual under norms of their own, and add under others."""

from hetero_attn.spec.blocks import BufferSet, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.experts import ExpertsDeclaration
from hetero_attn.spec.decoder.norms import projected_buffer, scalar_vectors
from hetero_attn.spec.experts_config import ExpertsConfig
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats

FOR_MLP, FOR_ROUTER, SUM, EXPERT_SUM, FACTORS = (
    "normed_for_mlp",
    "normed_for_router",
    "normed_sum",
    "expert_sum",
    "expert_factors",
)  # buffers


class BesideDeclaration(ExpertsDeclaration):
    """The MLP of a layer and the experts beside it; the shared expert of `ExpertsDeclaration` is that MLP."""

    def __init__(self, config: ModelConfig, experts: ExpertsConfig, layer: int, formats: WeightFormats) -> None:
        super().__init__(config, experts, layer, formats)
        self.vectors += _norms(config, experts, layer) + scalar_vectors(config, layer)
        # norms for router and experts, the factors of picks, zeros, three norms behind
        self.small_calls += 10 + config.layer_scalars
        hidden = config.hidden_size
        self.buffers += (
            BufferSet("beside", ((FOR_MLP, hidden), (EXPERT_SUM, hidden), (FACTORS, 2 * experts.per_row))),
            BufferSet("aside", ((FOR_ROUTER, hidden),)),
            BufferSet("aside", ((SUM, hidden),)),  # the router has seen its rows by then
            projected_buffer(self.shared[1]),
        )


def _norms(config: ModelConfig, experts: ExpertsConfig, layer: int) -> tuple[Vector, ...]:
    """zeros: what sums begin with; expert_scale: a number of each expert."""
    hidden = config.hidden_size
    parts = {
        "experts_norm": "experts_norm",
        "shared_post_norm": "shared_post_norm",
        "experts_post_norm": "experts_post_norm",
        "post_norm": "mlp_post_norm",
    }
    return (
        *(Vector(name, tensor_name(part, layer), hidden, config.norm_offset) for name, part in parts.items()),
        Vector("router_norm", tensor_name("router", layer, "scale"), hidden, scale=hidden**-0.5),
        Vector("expert_scale", tensor_name("router", layer, "per_expert_scale"), experts.experts),
        Vector("zeros", None, hidden),
        Vector("one", None, 1, offset=1.0),
    )
