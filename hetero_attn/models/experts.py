"""The mixture of experts in the place of a layer's MLP: a router, the experts that it chooses for a row, a shared one.

    scores = softmax(router normed), w = the scores of the k highest, over their sum where the model says so; of other
             models' scores see `Scoring`
    residual += sigmoid(factor . normed) * shared(normed)                                      where there is one
    residual += sum over the chosen, ascending id, of w_e * down_e(silu(gate_e normed) * (up_e normed))

Routing is computed once, in float32, where the residual stream lives; see `ops.experts` for the lanes of the experts.
"""

from cpu_kernels.contract import Routes, Scoring
from hetero_attn.lanes.activation import Activation
from hetero_attn.models.block import Block, BlockWeights, Norm, StateView, normalize
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.experts import (
    ExpertBuffers,
    add_experts,
    compute_experts,
    copied_experts,
    routes_in,
)
from hetero_attn.ops.linear import LinearWeights, SplitInput, linear, linear_add
from hetero_attn.ops.run import Run
from hetero_attn.spec.decoder.experts import ExpertsDeclaration


class Experts(ExpertsDeclaration, Block):
    """A layer's experts; see the module's text."""

    def forward(self, run: Run, weights: BlockWeights, state: StateView, work: Workspace) -> None:
        """Queue the block; the CPU's experts run beside the GPU's and beside the shared one."""
        lanes, tier, experts = run.lanes, run.step.tier, weights.linears["experts"]
        buffers = self._buffers(work, run.step.rows, copied_experts(experts, tier).count)
        on_host = any(linear.has_host_features(tier) for linear in (experts, *self._shared_of(weights)[:1]))
        normalize(lanes, Norm.of(self._model, weights), work.residual, buffers.x, on_host)
        self._route(run, weights, buffers, buffers.x)
        compute_experts(lanes, experts, tier, buffers)
        given = lanes.given
        if self.shared:
            self._add_shared(run, weights, buffers, work, buffers.x, work.residual)
        add_experts(lanes, experts, tier, buffers, given, work.residual)

    def _buffers(self, work: Workspace, rows: int, copied: int) -> ExpertBuffers:
        per_row, features = self._config.per_row, self._gate_up.out_features

        def by_place(name: str, width: int) -> Activation:
            return work.flat(name, rows * per_row, width)

        return ExpertBuffers(
            x=work.of("normed", self._hidden),
            routes=work.flat("routes", 1, self.experts.routes_size(rows, copied)),
            weights=work.of("expert_weights", per_row + 1),
            gate_up=by_place("expert_gate_up", features),
            activated=by_place("expert_activated", features // 2),
            parts=by_place("expert_parts", self._down.out_features),
            near=by_place("expert_near", self._down.out_features),
        )

    def _route(self, run: Run, weights: BlockWeights, buffers: ExpertBuffers, x: Activation) -> Routes:
        lanes, tier, experts, config = run.lanes, run.step.tier, weights.linears["experts"], self._config
        copied = copied_experts(experts, tier)
        routes = routes_in(buffers.routes.main, buffers.weights.main, self.experts, copied.table)
        scoring = Scoring(
            gated=config.is_gated,
            normalised=config.normalised,
            sigmoid=config.sigmoid,
            bias=weights.vector("router_bias").main,
            correction=weights.vector("correction").main,
            groups=config.groups,
            kept_groups=config.kept_groups,
            eps=config.eps,
            scale=config.scale,
        )
        lanes.main_ops.route(x.main, weights.vector("router").main, scoring, routes)
        if experts.expert_slots is not None:
            experts.expert_slots.note(lanes, routes.ids)
        if copied.streamed:
            experts.streamed_experts.note(lanes, routes.starts)
        return routes

    def _shared_of(self, weights: BlockWeights) -> tuple[LinearWeights, ...]:
        return tuple(weights.linears[linear.kind] for linear in self.shared)

    def _add_shared(
        self,
        run: Run,
        weights: BlockWeights,
        buffers: ExpertBuffers,
        work: Workspace,
        x: Activation,
        out: Activation,
        add: bool = True,
    ) -> None:
        """The shared expert of x as an MLP whose activated rows are scaled: down(f a) = f down(a). add: False writes
        what it gives into `out`."""
        lanes, tier = run.lanes, run.step.tier
        gate_up, down = self._shared_of(weights)
        both = work.of("shared_gate_up", gate_up.spec.out_features)
        activated = work.of("shared_activated", gate_up.spec.out_features // 2)
        per_row, column, on_host = self._config.per_row, gate_up.device_features(tier), gate_up.has_host_features(tier)
        if on_host and self._config.is_gated:
            lanes.push(buffers.weights, per_row, per_row + 1)
        linear(lanes, gate_up, tier, x, both)

        def activate(side: str, columns: slice) -> None:
            ops = lanes.host_ops if side == "host" else lanes.device.ops
            rows = getattr(activated, side)[:, columns.start // 2 : columns.stop // 2]
            getattr(ops, self._activate)(getattr(both, side)[:, columns], rows)
            if self._config.is_gated:
                ops.scale_rows(getattr(buffers.weights, side)[:, per_row:], rows)

        if on_host:
            lanes.on_host(lambda: activate("host", slice(column, gate_up.spec.out_features)))
        if column:
            activate("device", slice(0, column))
        inputs = down.spec.in_features
        split = SplitInput(activated.columns(0, inputs), min(column // 2, inputs))
        linear_add(lanes, down, tier, split, out, work.scratch, add)
