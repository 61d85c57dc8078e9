"""The gated MLP: gate and up side by side, an activation, down."""

import torch

from cpu_kernels.formats import GROUP_INPUTS, format_of
from hetero_attn.devices.protocols import Ops
from hetero_attn.models.block import Block, BlockWeights, Run, StateView, add_output, normed_linear, projected_buffer
from hetero_attn.models.workspace import Workspace
from hetero_attn.spec.blocks import BufferSet, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part

# The activations of `ModelConfig.hidden_act` -> the operation that applies one to gate and multiplies by up.
GATED_OPS = {"silu": "silu_mul", "gelu_tanh": "gelu_mul"}


class GatedMlp(Block):
    """residual += down(activation(gate) * up) with gate, up = gate_up(norm(residual)), or the post norm of that."""

    kind = "mlp"
    small_calls = 2  # norm, activation

    def __init__(self, config: ModelConfig, layer: int, formats: WeightFormats) -> None:
        self.layer = layer
        self._eps, self._activate = config.rms_norm_eps, GATED_OPS[config.hidden_act]
        self.gate_up, self.down = _linears(config, layer, formats)
        self.linears = (self.gate_up, self.down)
        parts = {"norm": "mlp_norm"} if config.pre_norms else {}
        parts |= {"post_norm": "mlp_post_norm"} if config.post_norms else {}
        self.vectors = tuple(
            Vector(name, tensor_name(part, layer), config.hidden_size, config.norm_offset)
            for name, part in parts.items()
        )
        self.small_calls += len(parts) - 1
        self.buffers = (
            BufferSet("wide", (("gate_up", self.gate_up.out_features),)),
            BufferSet("narrow", (("normed", config.hidden_size),)),
            # The normed rows are dead once gate_up has multiplied them.
            BufferSet("narrow", (("activated", self.gate_up.out_features // 2),)),
            *((projected_buffer(self.down),) if config.post_norms else ()),
        )

    def forward(self, run: Run, weights: BlockWeights, state: StateView, work: Workspace) -> None:
        """Queue the block; each lane activates the columns that it computed."""
        lanes, tier = run.lanes, run.step.tier
        gate_up, down = weights.linears["gate_up"], weights.linears["down"]
        both = work.of("gate_up", self.gate_up.out_features)
        activated = work.of("activated", self.gate_up.out_features // 2)
        normed_linear(lanes, tier, weights.vector("norm"), self._eps, gate_up, work, both)
        column = gate_up.device_features(tier)
        if gate_up.has_host_features(tier):
            lanes.on_host(lambda: self._gated(lanes.host_ops, both.host[:, column:], activated.host[:, column // 2 :]))
        width, inputs = self.down.in_features, None
        if column:
            ops, on_device = lanes.device.ops, (both.device[:, :column], activated.device[:, : column // 2])
            if down.multiplies_at_once(tier, column // 2):
                inputs = ops.rounded_gated(*on_device, self._activate, down.spec.format)
            else:
                self._gated(ops, *on_device)
        x, computed = activated.columns(0, width), min(column // 2, width)
        add_output(run, down, x, computed, work, weights.vector("post_norm"), self._eps, inputs)

    def _gated(self, ops: Ops, both: torch.Tensor, out: torch.Tensor) -> None:
        getattr(ops, self._activate)(both, out)


def _linears(config: ModelConfig, layer: int, formats: WeightFormats) -> tuple[LinearSpec, LinearSpec]:
    """A unit of gate_up is a block of gate rows and the up rows beside them."""

    def part(name: str, rows: int) -> Part:
        tensor = tensor_name(name, layer)
        return Part(tensor, BLOCK_FEATURES, rows, formats.of(tensor))

    gate_up = tuple(part(name, config.intermediate_size) for name in ("gate", "up"))
    down = part("down", config.hidden_size)
    return (
        LinearSpec(
            f"layers.{layer}.gate_up", "gate_up", layer, config.hidden_size, gate_up, config.mlp_bias, block="mlp"
        ),
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
