"""What an MLP declares: gate and up side by side, an activation, down; or up alone, activated itself, and down."""

from cpu_kernels.formats import GROUP_INPUTS, format_of
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.blocks import BufferSet, Declaration, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.norms import (
    NORMED,
    SHARED,
    norm_vectors,
    projected_buffer,
    reordered_buffers,
    scalar_vectors,
)
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part

# The activations of `ModelConfig.hidden_act` -> the operation that applies one to gate and multiplies by up, or that
# applies it to up where there is no gate.
GATED_OPS = {"silu": "silu_mul", "gelu_tanh": "gelu_mul"}
UNGATED_OPS = {"gelu_tanh": "gelu"}


def activation_op(config: ModelConfig) -> str:
    """The operation of a model's MLP."""
    known = GATED_OPS if config.gated else UNGATED_OPS
    if config.hidden_act not in known:
        raise UnsupportedModelError(
            f"{config.architecture}: an MLP without a gate whose activation is {config.hidden_act} is not computed, "
            f"only {', '.join(UNGATED_OPS)}"
        )
    return known[config.hidden_act]


class MlpDeclaration(Declaration):
    """The MLP of a layer. In a parallel layer it sees the rows that its attention has normalised."""

    kind = "mlp"
    reorders = True
    small_calls = 2  # norm, activation

    def __init__(self, config: ModelConfig, layer: int, formats: WeightFormats) -> None:
        self.layer = layer
        self._config, self._eps, self._activate = config, config.rms_norm_eps, activation_op(config)
        self._columns = 2 if config.gated else 1  # of the first linear, for one that down multiplies
        self.first, self.down = _linears(config, layer, formats)
        self.linears = (self.first, self.down)
        has_norm = config.pre_norms and not config.parallel
        self.vectors = norm_vectors(config, "mlp_norm", layer) if has_norm else ()
        if config.post_norms:
            name = tensor_name("mlp_post_norm", layer)
            self.vectors += (Vector("post_norm", name, config.hidden_size, config.norm_offset),)
        self.vectors += scalar_vectors(config, layer)
        self.small_calls += has_norm + config.post_norms - 1 + config.layer_scalars
        self.small_calls += sum(each.is_reordered for each in self.linears)
        normed = ("shared", SHARED) if config.parallel else ("narrow", NORMED)
        self.buffers = (
            BufferSet("wide", (("gate_up", self.first.out_features),)),
            BufferSet(normed[0], ((normed[1], config.hidden_size),)),
            # The normed rows are dead once the first linear has multiplied them.
            BufferSet("narrow", (("activated", self.first.out_features // self._columns),)),
            *((projected_buffer(self.down),) if config.post_norms else ()),
            *reordered_buffers(self.linears),
        )


def _linears(config: ModelConfig, layer: int, formats: WeightFormats) -> tuple[LinearSpec, LinearSpec]:
    """A unit of gate_up is a block of gate rows and the up rows beside them; of up a block of its rows."""

    def part(name: str, rows: int) -> Part:
        tensor = tensor_name(name, layer)
        return Part(tensor, BLOCK_FEATURES, rows, formats.of(tensor), formats.is_reordered(tensor))

    kind, names = ("gate_up", ("gate", "up")) if config.gated else ("up", ("up",))
    parts = tuple(part(name, config.intermediate_size) for name in names)
    down = part("down", config.hidden_size)
    return (
        LinearSpec(f"layers.{layer}.{kind}", kind, layer, config.hidden_size, parts, config.mlp_bias, block="mlp"),
        LinearSpec(
            f"layers.{layer}.down",
            "down",
            layer,
            config.intermediate_size,
            (down,),
            config.mlp_bias,
            block="mlp",
            row_choice=max(GROUP_INPUTS, format_of(down.format).group_inputs),
        ),
    )
