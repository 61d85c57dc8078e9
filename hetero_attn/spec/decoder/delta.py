"""What gated DeltaNet declares in the place of a layer's attention: its projections, its gates, and its state."""

from hetero_attn.spec.blocks import BufferSet, Declaration, FixedState, Matrix, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.norms import NORMED, norm_vectors
from hetero_attn.spec.delta_config import DeltaConfig
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part
from placement.plan.workload import round_up

GATES = "delta_gates"  # the buffer of what strengths and decays are made of


class DeltaDeclaration(Declaration):
    """The gated DeltaNet of a layer.

    A unit of its first linear is a key head: [query | key | its values | their gates]. The state holds the matrices of
    all value heads, then the last inputs of the convolution.
    """

    kind = "delta"
    small_calls = 3  # norm, gates, delta_step

    def __init__(self, config: ModelConfig, delta: DeltaConfig, layer: int, formats: WeightFormats) -> None:
        self.layer, self._config, self._delta = layer, config, delta
        self.matrix_size = delta.value_heads * delta.key_dim * delta.value_dim
        self.first, self.out = _linears(config, delta, layer, formats)
        gate_rows = round_up(2 * delta.value_heads, BLOCK_FEATURES)
        size = self.matrix_size + (delta.kernel - 1) * delta.conv_width
        self.state = FixedState((size,), self.first.out_features + gate_rows)
        self.linears = (self.first, self.out)
        self.vectors = (
            *norm_vectors(config, "attention_norm", layer),
            Vector("rates", tensor_name("delta", layer, "A_log"), delta.value_heads, is_log_rate=not delta.has_rates),
            Vector("dt_bias", tensor_name("delta", layer, "dt_bias"), delta.value_heads),
            Vector("out_norm", tensor_name("delta_norm", layer), delta.value_dim),
        )
        gates = tuple((tensor_name(part, layer), delta.value_heads) for part in ("delta_b", "delta_a"))
        kernel = ((tensor_name("delta_conv", layer), delta.conv_width),)
        self.matrices = (
            Matrix("gates", gates, config.hidden_size, gate_rows),
            Matrix("conv", kernel, delta.kernel, delta.conv_width),
        )
        between = (("delta_in", self.first.out_features), ("delta_out", delta.value_width), (GATES, gate_rows))
        self.buffers = (BufferSet("narrow", ((NORMED, config.hidden_size),)), BufferSet("wide", between))


def _linears(
    config: ModelConfig, delta: DeltaConfig, layer: int, formats: WeightFormats
) -> tuple[LinearSpec, LinearSpec]:
    def part(name: str, rows_per_unit: int, rows: int) -> Part:
        tensor = tensor_name(name, layer)
        return Part(tensor, rows_per_unit, rows, formats.of(tensor))

    def spec(kind: str, inputs: int, *parts: Part) -> LinearSpec:
        return LinearSpec(f"layers.{layer}.{kind}", kind, layer, inputs, parts, False, block="delta")

    widths = (delta.key_width, delta.key_width, delta.value_width, delta.value_width)
    names = ("delta_q", "delta_k", "delta_v", "delta_z")
    parts = (part(name, delta.rows_per_key_head(name), width) for name, width in zip(names, widths, strict=True))
    last = part("delta_out", BLOCK_FEATURES, config.hidden_size)
    return spec("delta_in", config.hidden_size, *parts), spec("delta_out", delta.value_width, last)
