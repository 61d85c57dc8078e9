"""The MLP: gate and up side by side, an activation, down; or up alone, activated itself, and down."""

import torch

from cpu_kernels.contract import Ops
from hetero_attn.lanes.activation import Activation, behind
from hetero_attn.models.block import (
    Block,
    BlockWeights,
    Norm,
    StateView,
    add_output,
    normed_linear,
    room_to_reorder,
    scale_residual,
)
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.linear import LinearWeights, SplitInput, linear
from hetero_attn.ops.run import Run
from hetero_attn.spec.decoder.mlp import MlpDeclaration
from hetero_attn.spec.decoder.norms import SHARED


class Mlp(MlpDeclaration, Block):
    """residual += down(activation(gate) * up) with gate, up = gate_up(norm(residual)), or the post norm of that.

    Without a gate down(activation(up)). In a parallel layer the rows are those that its attention has normalised.
    """

    def forward(self, run: Run, weights: BlockWeights, state: StateView, work: Workspace) -> None:
        """Queue the block; each lane activates the columns that it computed."""
        lanes, tier = run.lanes, run.step.tier
        first, down = weights.linears[self.first.kind], weights.linears["down"]
        wide = work.of("gate_up", self.first.out_features)
        activated = work.of("activated", self.first.out_features // self._columns)
        self._multiply(run, weights, first, work, wide)
        column = first.device_features(tier)
        computed = column // self._columns
        if first.has_host_features(tier):
            lanes.on_host(
                lambda: self._apply(lanes.host_ops, behind(wide.host, column), behind(activated.host, computed))
            )
        width, inputs = self.down.in_features, None
        if column:
            ops, on_device = lanes.device.ops, (wide.device[:, :column], activated.device[:, :computed])
            if self._config.gated and down.multiplies_at_once(tier, computed):
                inputs = ops.rounded_gated(*on_device, self._activate, down.spec.format)
            else:
                self._apply(ops, *on_device)
        split = SplitInput(activated.columns(0, width), min(computed, width), inputs)
        add_output(run, down, split, work, weights.vector("post_norm"), self._eps)
        scale_residual(lanes, weights, work, self.first.in_features)

    def _multiply(
        self, run: Run, weights: BlockWeights, first: LinearWeights, work: Workspace, out: Activation
    ) -> None:
        """The first linear, of the rows that it sees."""
        lanes, tier = run.lanes, run.step.tier
        if not self._config.parallel:
            normed_linear(lanes, tier, Norm.of(self._config, weights), first, work, out)
            return
        shared = work.of(SHARED, self.first.in_features)
        if first.has_host_features(tier):
            lanes.push(shared, 0, self.first.in_features)
        linear(lanes, first, tier, shared, out, reordered=room_to_reorder(first, work))

    def _apply(self, ops: Ops, x: torch.Tensor, out: torch.Tensor) -> None:
        getattr(ops, self._activate)(x, out)
