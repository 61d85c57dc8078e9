"""Grouped-query attention with rotary positions: qkv, attention over the cache, o."""

from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.block import Block, BlockWeights, Norm, add_output, normed_linear
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.attend import AttentionBuffers, AttentionParameters, attend, store
from hetero_attn.ops.linear import SplitInput
from hetero_attn.ops.run import KvView, Run
from hetero_attn.spec.decoder.attention import AttentionDeclaration


class Attention(AttentionDeclaration, Block):
    """residual += o(attention(qkv(norm(residual)))), or the post norm of that."""

    def forward(self, run: Run, weights: BlockWeights, state: KvView, work: Workspace) -> None:
        """Queue the block; each head is attended on its owner's side."""
        lanes, step = run
        qkv, o = weights.linears["qkv"], weights.linears["o"]
        heads = work.of("qkv", self.qkv.out_features)
        self.multiply(lanes, step.tier, weights, work, heads)
        computed = self._norm_whole(lanes, weights, heads, qkv.device_units(step.tier))
        parameters = self._parameters(weights)
        buffers = self._buffers(work)
        attend(run, state, parameters, heads, computed, buffers)
        column = state.pool.gpu_kv_heads * parameters.queries_per_kv * parameters.head_dim
        add_output(run, o, SplitInput(buffers.out, column), work, weights.vector("post_norm"), self._eps)

    def multiply(self, lanes: Lanes, tier: int, weights: BlockWeights, work: Workspace, out: Activation) -> None:
        """Norm the residual and multiply it by qkv into `out`."""
        normed_linear(lanes, tier, Norm.of(self._config, weights), weights.linears["qkv"], work, out, self._normed)

    def _norm_whole(self, lanes: Lanes, weights: BlockWeights, heads: Activation, computed: int) -> int:
        """Norm q and k over all heads, where they all come together for it; returns the KV heads that are on the
        GPU then, of which `computed` are now."""
        if "q_norm_whole" not in weights.vectors:
            return computed
        q_norm, k_norm = weights.vector("q_norm_whole").main, weights.vector("k_norm_whole").main
        kv_heads, unit = self.cache.kv_heads, self.qkv.unit_features
        lanes.pull(heads, computed * unit, kv_heads * unit)
        lanes.main_ops.norm_heads(heads.main.unflatten(1, (kv_heads, unit)), q_norm, k_norm, self._eps)
        return kv_heads

    def store(self, run: Run, weights: BlockWeights, state: KvView, work: Workspace) -> None:
        """Rotate and store what the qkv buffer holds, as if the block had computed it."""
        qkv, query = work.of("qkv", self.qkv.out_features), work.of("query", self.o.in_features)
        store(run, state, self._parameters(weights), qkv, query)

    def _buffers(self, work: Workspace) -> AttentionBuffers:
        width, heads = self.o.in_features, self.cache.heads
        rows = (work.of(name, width) for name in ("query", "out", "partial"))
        return AttentionBuffers(*rows, *(work.of(name, heads) for name in ("lse", "partial_lse")))

    def _parameters(self, weights: BlockWeights) -> AttentionParameters:
        if "attention" not in weights.made:
            weights.made["attention"] = self._make_parameters(weights)
        return weights.made["attention"]

    def _make_parameters(self, weights: BlockWeights) -> AttentionParameters:
        cos, sin = weights.rope or (Activation(None, None),) * 2
        return AttentionParameters(
            num_heads=self.cache.heads,
            num_kv_heads=self.cache.kv_heads,
            head_dim=self.cache.head_dim,
            window=self.cache.window,
            scale=self._scale,
            norm_eps=self._eps,
            cos=cos,
            sin=sin,
            q_norm=weights.vector("q_norm"),
            k_norm=weights.vector("k_norm"),
            v_norm=weights.vector("v_norm"),
            cap=self._config.attention_cap,
            sinks=weights.vector("sinks"),
            is_gated=self._config.gated_attention,
        )
