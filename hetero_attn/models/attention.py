"""Grouped-query attention with rotary positions: qkv, attention over the cache, o."""

from hetero_attn.lanes.lanes import Activation, Lanes
from hetero_attn.models.block import (
    NORMED,
    SHARED,
    Block,
    BlockWeights,
    Norm,
    add_output,
    norm_vectors,
    normed_linear,
    projected_buffer,
)
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.attend import AttentionBuffers, AttentionParameters, attend, store
from hetero_attn.ops.run import KvView, Run
from hetero_attn.spec.blocks import BufferSet, KvState, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part


class Attention(Block):
    """residual += o(attention(qkv(norm(residual)))), or the post norm of that."""

    kind = "attention"
    small_calls = 2  # norm; rotation with the append to the cache
    stored = "qkv"

    def __init__(self, config: ModelConfig, layer: int, formats: WeightFormats) -> None:
        self.layer = layer
        self.state = self.cache = KvState(
            config.num_kv_heads, config.num_heads, config.head_dim, config.sliding_window[layer]
        )
        self.rope = config.rope_of(layer)
        self._config, self._eps, self._scale = config, config.rms_norm_eps, config.attention_scale
        self._normed = SHARED if config.parallel else NORMED
        self.qkv, self.o = _linears(config, layer, formats)
        self.linears = (self.qkv, self.o)
        vectors: dict[str, tuple[str, int]] = {}
        own_norm = norm_vectors(config, "attention_norm", layer) if config.pre_norms else ()
        self.small_calls -= not config.pre_norms
        if config.qk_norm:
            vectors |= {name: (name, config.head_dim) for name in ("q_norm", "k_norm")}
        if config.qk_norm_whole:
            vectors["q_norm_whole"] = "q_norm", config.num_heads * config.head_dim
            vectors["k_norm_whole"] = "k_norm", config.num_kv_heads * config.head_dim
            self.small_calls += 1
        if config.post_norms:
            vectors["post_norm"] = ("attention_post_norm", config.hidden_size)
            self.small_calls += 1
        self.vectors = own_norm + tuple(
            Vector(name, tensor_name(part, layer), features, config.norm_offset)
            for name, (part, features) in vectors.items()
        )
        heads_width = config.num_heads * config.head_dim
        self.buffers = (
            BufferSet(
                "wide",
                (
                    ("qkv", self.qkv.out_features),
                    ("query", heads_width),
                    ("out", heads_width),
                    ("partial", heads_width),
                ),
            ),
            BufferSet("shared" if config.parallel else "narrow", ((self._normed, config.hidden_size),)),
            BufferSet("lse", (("lse", config.num_heads), ("partial_lse", config.num_heads))),
            *((projected_buffer(self.o),) if config.post_norms else ()),
        )

    def forward(self, run: Run, weights: BlockWeights, state: KvView, work: Workspace) -> None:
        """Queue the block; each head is attended on its owner's side."""
        lanes, step = run
        qkv, o = weights.linears["qkv"], weights.linears["o"]
        heads = work.of("qkv", self.qkv.out_features)
        normed_linear(lanes, step.tier, Norm.of(self._config, weights), qkv, work, heads, self._normed)
        computed = self._norm_whole(lanes, weights, heads, qkv.device_units(step.tier))
        parameters = self._parameters(weights)
        buffers = self._buffers(work)
        attend(run, state, parameters, heads, computed, buffers)
        column = state.pool.gpu_kv_heads * parameters.queries_per_kv * parameters.head_dim
        add_output(run, o, buffers.out, column, work, weights.vector("post_norm"), self._eps)

    def _norm_whole(self, lanes: Lanes, weights: BlockWeights, heads: Activation, computed: int) -> int:
        """Norm q and k over all heads, where they all come together for it; returns the KV heads that are on the
        GPU then, of which `computed` are now."""
        q_norm, k_norm = weights.vector("q_norm_whole").main, weights.vector("k_norm_whole").main
        if q_norm is None:
            return computed
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
            cap=self._config.attention_cap,
        )


def _linears(config: ModelConfig, layer: int, formats: WeightFormats) -> tuple[LinearSpec, LinearSpec]:
    """A unit of qkv is a KV head; o follows the heads where it is cut by rows."""
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    queries_width = heads // kv_heads * head_dim

    def part(name: str, rows_per_unit: int, rows: int) -> Part:
        tensor = tensor_name(name, layer)
        return Part(tensor, rows_per_unit, rows, formats.of(tensor))

    qkv = (
        part("q", queries_width, heads * head_dim),
        part("k", head_dim, kv_heads * head_dim),
        part("v", head_dim, kv_heads * head_dim),
    )
    return (
        LinearSpec(
            f"layers.{layer}.qkv",
            "qkv",
            layer,
            config.hidden_size,
            qkv,
            config.qkv_bias,
            block="attention",
            per_kv_head=True,
        ),
        LinearSpec(
            f"layers.{layer}.o",
            "o",
            layer,
            heads * head_dim,
            (part("o", BLOCK_FEATURES, config.hidden_size),),
            config.o_bias,
            block="attention",
            row_choice=queries_width,
        ),
    )
