"""What a mixture of experts in the place of a layer's MLP declares: a router, the experts, a shared one."""

from hetero_attn.spec.blocks import BufferSet, Declaration, Matrix, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.mlp import activation_op
from hetero_attn.spec.decoder.norms import norm_vectors
from hetero_attn.spec.experts import experts_spec
from hetero_attn.spec.experts_config import ExpertsConfig
from hetero_attn.spec.tensor_names import CORRECTION, tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part
from placement.plan.workload import round_up


class ExpertsDeclaration(Declaration):
    """The experts of a layer."""

    kind = "experts"

    def __init__(self, config: ModelConfig, experts: ExpertsConfig, layer: int, formats: WeightFormats) -> None:
        self.layer, self._config = layer, experts
        self._model, self._hidden = config, config.hidden_size
        self._activate = activation_op(config)
        self.experts = experts_spec(experts, config.hidden_size, layer, formats.of, self._activate)
        self.shared: tuple[LinearSpec, ...] = ()
        if experts.has_shared:
            self.shared = _shared_linears(config, experts, layer, formats)
        self.linears = (self.experts, *self.shared)
        self.vectors = norm_vectors(config, "mlp_norm", layer) + _router_vectors(experts, layer)
        self.matrices = (_router(config, experts, layer),)
        # norm, route, activation, sum; of a shared one its activation, its factor; of biases one a product
        self.small_calls = 4 + experts.has_shared + experts.is_gated + 2 * experts.has_bias
        self._gate_up, self._down = self.experts.first
        per_row, padded = experts.per_row, round_up(config.hidden_size, BLOCK_FEATURES)
        self.buffers = (
            BufferSet("narrow", (("normed", config.hidden_size),)),
            BufferSet(
                "routes", (("routes", self.experts.routes_size(1, experts.experts)), ("expert_weights", per_row + 1))
            ),
            BufferSet(
                "wide",
                (
                    ("expert_gate_up", per_row * self._gate_up.out_features),
                    ("expert_activated", per_row * self._gate_up.out_features // 2),
                    ("expert_parts", per_row * padded),
                    ("expert_near", per_row * padded),
                    *_shared_buffers(self.shared),
                ),
            ),
        )


def _router(config: ModelConfig, experts: ExpertsConfig, layer: int) -> Matrix:
    tensors: tuple[tuple[str, int], ...] = ((tensor_name("router", layer), experts.experts),)
    if experts.is_gated:
        tensors = (*tensors, (tensor_name("shared_factor", layer), 1))
    rows = sum(count for _, count in tensors)
    return Matrix("router", tensors, config.hidden_size, round_up(rows, BLOCK_FEATURES))


def _router_vectors(experts: ExpertsConfig, layer: int) -> tuple[Vector, ...]:
    """What the scores of a layer's experts are corrected by."""
    kinds = (("router_bias", "bias", experts.has_bias), ("correction", CORRECTION, experts.is_corrected))
    return tuple(
        Vector(name, tensor_name("router", layer, kind), experts.experts) for name, kind, is_there in kinds if is_there
    )


def _shared_linears(
    config: ModelConfig, experts: ExpertsConfig, layer: int, formats: WeightFormats
) -> tuple[LinearSpec, LinearSpec]:
    def part(name: str, rows: int) -> Part:
        tensor = tensor_name(name, layer)
        return Part(tensor, BLOCK_FEATURES, rows, formats.of(tensor))

    def spec(kind: str, inputs: int, *parts: Part) -> LinearSpec:
        return LinearSpec(f"layers.{layer}.{kind}", kind, layer, inputs, parts, False, block="shared")

    width, prefix = experts.shared_width, "" if experts.beside_mlp else "shared_"
    return (
        spec("shared_gate_up", config.hidden_size, part(f"{prefix}gate", width), part(f"{prefix}up", width)),
        spec("shared_down", width, part(f"{prefix}down", config.hidden_size)),
    )


def _shared_buffers(shared: tuple[LinearSpec, ...]) -> tuple[tuple[str, int], ...]:
    if not shared:
        return ()
    return (("shared_gate_up", shared[0].out_features), ("shared_activated", shared[0].out_features // 2))
