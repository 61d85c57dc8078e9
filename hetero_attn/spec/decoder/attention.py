"""What grouped-query attention with rotary positions declares: qkv, the cache, o."""

from hetero_attn.spec.blocks import BufferSet, Declaration, KvState, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.norms import NORMED, SHARED, norm_vectors, projected_buffer, reordered_buffers
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part


class AttentionDeclaration(Declaration):
    """The attention of a layer."""

    kind = "attention"
    reorders = True
    small_calls = 1  # rotation with the append to the cache; norms and what some models have beside are added
    stored = "qkv"

    def __init__(self, config: ModelConfig, layer: int, formats: WeightFormats) -> None:
        self.layer = layer
        kv_heads, head_dim = config.heads_of(layer)
        self.state = self.cache = KvState(kv_heads, config.num_heads, head_dim, config.sliding_window[layer])
        self.rope = config.rope_of(layer)
        self._config, self._eps, self._scale = config, config.rms_norm_eps, config.attention_scale
        self._normed = SHARED if config.parallel else NORMED
        self.qkv, self.o = _linears(config, layer, formats)
        self.linears = (self.qkv, self.o)
        self.small_calls += config.pre_norms + config.qk_norm_whole + config.post_norms
        self.small_calls += config.has_sinks + config.gated_attention + config.value_norm
        self.small_calls += sum(linear.is_reordered for linear in self.linears)
        self.vectors = _vectors(config, layer)
        self.buffers = self._buffer_sets()

    def _buffer_sets(self) -> tuple[BufferSet, ...]:
        config = self._config
        heads_width = self.cache.heads * self.cache.head_dim
        wide = (
            ("qkv", self.qkv.out_features),
            ("query", heads_width),
            ("out", heads_width),
            ("partial", heads_width),
        )
        return (
            BufferSet("wide", wide),
            BufferSet("shared" if config.parallel else "narrow", ((self._normed, config.hidden_size),)),
            BufferSet("lse", (("lse", config.num_heads), ("partial_lse", config.num_heads))),
            *((projected_buffer(self.o),) if config.post_norms else ()),
            *reordered_buffers(self.linears),
        )


def _vectors(config: ModelConfig, layer: int) -> tuple[Vector, ...]:
    """Its norms, then the sinks."""
    _, head_dim = config.heads_of(layer)
    own_norm = norm_vectors(config, "attention_norm", layer) if config.pre_norms else ()
    norms: dict[str, tuple[str, int]] = {}
    if config.qk_norm:
        norms |= {name: (name, head_dim) for name in ("q_norm", "k_norm")}
    if config.qk_norm_whole:
        norms["q_norm_whole"] = "q_norm", config.num_heads * config.head_dim
        norms["k_norm_whole"] = "k_norm", config.num_kv_heads * config.head_dim
    if config.post_norms:
        norms["post_norm"] = ("attention_post_norm", config.hidden_size)
    vectors = own_norm + tuple(
        Vector(name, tensor_name(part, layer), features, config.norm_offset) for name, (part, features) in norms.items()
    )
    if config.value_norm:
        vectors += (Vector("v_norm", None, head_dim, offset=1.0),)
    if config.has_sinks:
        vectors += (Vector("sinks", tensor_name("attention", layer, "sinks"), config.num_heads),)
    return vectors


def _linears(config: ModelConfig, layer: int, formats: WeightFormats) -> tuple[LinearSpec, LinearSpec]:
    """A unit of qkv is a KV head, behind it the gates of its query heads where there are such; o follows the heads
    where it is cut by rows. Where v is what the projection of k gives, its rows are in a unit twice."""
    heads, (kv_heads, head_dim) = config.num_heads, config.heads_of(layer)
    is_shared = config.shared_projection and not config.sliding_window[layer]
    queries_width = heads // kv_heads * head_dim

    def part(name: str, rows_per_unit: int, rows: int) -> Part:
        tensor = tensor_name(name, layer)
        return Part(tensor, rows_per_unit, rows, formats.of(tensor), formats.is_reordered(tensor))

    qkv = (
        part("q", queries_width, heads * head_dim),
        part("k", head_dim, kv_heads * head_dim),
        part("k" if is_shared else "v", head_dim, kv_heads * head_dim),
        *([part("q_gate", queries_width, heads * head_dim)] if config.gated_attention else []),
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
