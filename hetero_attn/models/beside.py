"""Experts beside a layer's MLP, as Gemma 4 has them.

w = the weights of the k experts that the router chooses for norm(residual) * scale, each times a number of its expert
both = post_norm_1(mlp(norm_1(residual))) + post_norm_2(sum over the chosen of w_e * expert_e(norm_2(residual)))
residual += post_norm(both)
"""

import torch

from cpu_kernels.contract import Picks, Routes
from hetero_attn.lanes.activation import Activation
from hetero_attn.models.block import BlockWeights, Norm, StateView, normalize, scale_residual
from hetero_attn.models.experts import Experts
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.experts import (
    ExpertBuffers,
    add_experts,
    compute_experts,
    copied_experts,
)
from hetero_attn.ops.run import Run
from hetero_attn.spec.decoder.beside import EXPERT_SUM, FACTORS, FOR_MLP, FOR_ROUTER, SUM, BesideDeclaration


class Beside(BesideDeclaration, Experts):
    """A layer's MLP and its experts; see the module's text."""

    def forward(self, run: Run, weights: BlockWeights, state: StateView, work: Workspace) -> None:
        """Queue the block; the CPU's experts run beside the GPU's and beside the MLP."""
        lanes, tier, experts = run.lanes, run.step.tier, weights.linears["experts"]
        buffers = self._buffers(work, run.step.rows, copied_experts(experts, tier).count)
        for_mlp, expert_sum = work.of(FOR_MLP, self._hidden), work.of(EXPERT_SUM, self._hidden)
        self._choose(run, weights, buffers, work)
        self._normalize(run, weights, "experts_norm", work, buffers.x, experts.has_host_features(tier))
        compute_experts(lanes, experts, tier, buffers)
        given, gate_up = lanes.given, self._shared_of(weights)[0]
        on_host = gate_up.has_host_features(tier)
        normalize(lanes, Norm.of(self._model, weights), work.residual, for_mlp, on_host)
        projected = work.of("projected", self.shared[1].out_features)
        self._add_shared(run, weights, buffers, work, for_mlp, projected, add=False)
        zeros = weights.vector("zeros").main
        lanes.main_ops.copy_rows(expert_sum.main, zeros.expand(expert_sum.main.shape))
        add_experts(lanes, experts, tier, buffers, given, expert_sum)
        self._add(run, weights, work, projected)
        scale_residual(lanes, weights, work, self._hidden)

    def _choose(self, run: Run, weights: BlockWeights, buffers: ExpertBuffers, work: Workspace) -> None:
        """Route the rows as the router sees them, and multiply each pick's weight by the number of its expert."""
        lanes = run.lanes
        seen = work.of(FOR_ROUTER, self._hidden)
        self._normalize(run, weights, "router_norm", work, seen, to_host=False)
        routes = self._route(run, weights, buffers, seen)
        factors = self._factors(run, weights, routes, work)
        each = routes.weights[:, : self._config.per_row]
        by_row = each.shape[0] <= each.shape[1]  # what is fewer calls
        for factor, weight in zip(factors.unbind(0 if by_row else 1), each.unbind(0 if by_row else 1), strict=True):
            lanes.main_ops.scale_rows(factor[:, None], weight[:, None])

    def _factors(self, run: Run, weights: BlockWeights, routes: Routes, work: Workspace) -> torch.Tensor:
        """The number of the expert of every pick, [rows, per_row]: by place, as what an expert adds to its places, then
        by row, as the sum of one output each."""
        ops, copied = run.lanes.main_ops, copied_experts(weights.linears["experts"], run.step.tier)
        picks, scale = routes.ids.numel(), weights.vector("expert_scale").main[:, None]
        both = work.flat(FACTORS, 2 * picks, 1).main
        by_place, by_pick = both[:picks], both[picks:]
        ops.copy_rows(both, weights.vector("zeros").main[:1].expand(both.shape))
        if copied.held is not None:
            ops.add_expert_bias(scale, Picks(None, routes.starts, 0, copied.held), by_place)
        ops.add_expert_bias(scale, Picks(None, routes.starts, routes.starts.shape[0] - 1 - routes.experts), by_place)
        once = weights.vector("one").main.expand(picks, 1)
        ops.combine(by_place, by_place, routes.starts[:1], routes.places.view(picks, 1), once, by_pick)
        return by_pick.view(routes.ids.shape)

    def _normalize(
        self, run: Run, weights: BlockWeights, name: str, work: Workspace, out: Activation, to_host: bool
    ) -> None:
        """Normalise the residual by a vector of the block."""
        normalize(run.lanes, Norm(weights.vector(name), self._model.rms_norm_eps), work.residual, out, to_host)

    def _add(self, run: Run, weights: BlockWeights, work: Workspace, projected: Activation) -> None:
        """Add what MLP and experts give, each under its norm and both under theirs, to the residual."""
        eps, ops, hidden = self._model.rms_norm_eps, run.lanes.main_ops, self._hidden
        both, expert_sum = work.of(SUM, hidden).main, work.of(EXPERT_SUM, hidden).main
        ops.rms_norm(projected.main[:, :hidden], weights.vector("shared_post_norm").main, eps, both)
        ops.rms_norm(expert_sum, weights.vector("experts_post_norm").main, eps, both, True)
        ops.rms_norm(both, weights.vector("post_norm").main, eps, work.residual.main[:, :hidden], True)
