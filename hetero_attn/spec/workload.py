"""A model as the planner sees it: names, bytes and operations, read off its declaration."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from cpu_kernels.formats import BLOCK_FEATURES, format_of
from cpu_kernels.formats.pages import token_bytes
from hetero_attn.spec.blocks import FLOAT32_BYTES, FixedState, KvState, ModelSpec
from hetero_attn.spec.buffers import ActivationWidths
from hetero_attn.spec.weight_formats import WeightFormats, weight_formats
from placement.plan.shards import KvShard, LinearShard, StateShard
from placement.plan.workload import DRAFTED_ROWS, Workload, round_up

TABLE_ALIGN_BYTES = 64
LOGITS_ROWS = DRAFTED_ROWS  # computed at once, also when a prompt's every position is asked for


def natural_kv_dtype(weight_dtype: str) -> str:
    """What a cache holds unless asked otherwise: float32 beside float32 weights, else bfloat16."""
    return "fp32" if weight_dtype == "fp32" else "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much a workload is made for.

    max_context: tokens of one sequence. max_batch: sequences decoded together. kv_tokens: KV slots that all sequences
    share, None is max_context for each. page_size: tokens of a page of the cache. prefill_chunk: rows of a prompt that
    one step computes. kv_dtype: of the cache; None is that of the weights for fp32, else bf16. prefix_cache: whether
    prompts that begin alike find what earlier ones stored.
    """

    max_context: int
    max_batch: int
    page_size: int
    prefill_chunk: int
    kv_dtype: str | None = None
    kv_tokens: int | None = None
    prefix_cache: bool = True


def build_workload(
    model: ModelSpec,
    weight_dtype: str | WeightFormats,
    name: str,
    sizes: Sizes,
    embed_shares_head: bool = False,
    paired: bool = False,
) -> Workload:
    """Describe a model to the planner: names, bytes and operations, computed by the code that allocates them.

    weight_dtype: one dtype for all weights, or the format of each, as the model was declared with. name: what tables
    call the model. embed_shares_head: the token embedding is read from the head's own rows, which must then all be in
    host memory, unquantised; it takes no bytes of its own. paired: cut by rows the linears that can be.
    """
    formats = weight_formats(weight_dtype)
    kv_dtype = sizes.kv_dtype or natural_kv_dtype(formats.label)
    linears, row_cuts = _linear_shards(model, paired)
    kv, states, widths = _kv_shards(model, kv_dtype), _state_shards(model), ActivationWidths.of(model)
    return Workload(
        model=name,
        weight_dtype=formats.label,
        linears=linears,
        row_cuts=row_cuts,
        kv=kv,
        embed_bytes=0 if embed_shares_head or not model.owns_embedding else _embed_bytes(formats.embed, model),
        resident_bytes=_resident_bytes(model, sizes)
        + _tables_bytes(kv, sizes, has_states=bool(states))
        + streamed_expert_table_bytes(linears),
        activation_bytes_per_row=widths.bytes_per_row,
        host_activation_bytes_per_row=widths.host_bytes_per_row,
        max_context=sizes.max_context,
        max_batch=sizes.max_batch,
        page_size=sizes.page_size,
        num_heads=max((shard.heads for shard in kv), default=0),
        head_dim=max((shard.head_dim for shard in kv), default=0),
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        prefill_chunk=sizes.prefill_chunk,
        kv_dtype=kv_dtype,
        kv_tokens=sizes.kv_tokens,
        small_calls=sum(block.small_calls for layer in model.layers for block in layer),
        states=states,
        prefix_states=_least_prefix_states(sizes) if states and kv and sizes.prefix_cache else 0,
    )


def _linear_shards(model: ModelSpec, paired: bool) -> tuple[tuple[LinearShard, ...], tuple[LinearShard, ...]]:
    """The linears, and as they may be cut by rows instead; where they are so cut already there is no other choice."""
    by_rows = {linear.name: rows for linear in model.linears if (rows := linear.by_rows) is not None}
    if paired:
        return tuple(by_rows.get(linear.name, linear).shard for linear in model.linears), ()
    return tuple(linear.shard for linear in model.linears), tuple(linear.shard for linear in by_rows.values())


def _resident_bytes(model: ModelSpec, sizes: Sizes) -> int:
    """Bytes that are in GPU memory whatever is cut: vectors, biases, orders of inputs, rotary angles and logits."""
    biases = sum(prod(linear.bias_shape) for linear in model.linears if linear.has_bias)
    orders = sum(linear.in_features for linear in model.linears if linear.is_reordered)  # int32
    rope_features = sizes.max_context * sum(rope.rotary_dim for rope in model.ropes)
    logits = max(sizes.max_batch, LOGITS_ROWS) * model.head.linears[0].out_features
    return FLOAT32_BYTES * (model.resident_features + biases + orders + rope_features + logits)


def _tables_bytes(kv: tuple[KvShard, ...], sizes: Sizes, has_states: bool) -> int:
    """Bytes of the tables of the largest step."""
    return step_table_bytes(
        len(kv),
        max((shard.kv_heads for shard in kv), default=0),
        max(sizes.prefill_chunk, sizes.max_batch),
        sizes.max_batch,
        -(-sizes.max_context // sizes.page_size),
        has_states,
    )


def _state_shards(model: ModelSpec) -> tuple[StateShard, ...]:
    return tuple(
        StateShard(f"layers.{block.layer}.state", block.layer, block.state.shape, block.state.draft_features)
        for block in model.blocks
        if isinstance(block.state, FixedState)
    )


def _least_prefix_states(sizes: Sizes) -> int:
    """As many as two turns of a conversation have and one for another, for every sequence one more. They are found by
    pages of keys and values."""
    return sizes.max_batch + 4


def _kv_shards(model: ModelSpec, kv_dtype: str) -> tuple[KvShard, ...]:
    return tuple(
        KvShard(
            f"layers.{block.layer}.kv",
            block.layer,
            block.state.kv_heads,
            token_bytes(kv_dtype, block.state.head_dim),
            block.state.window,
            block.state.heads,
            block.state.head_dim,
        )
        for block in model.blocks
        if isinstance(block.state, KvState)
    )


def _embed_bytes(name: str, model: ModelSpec) -> int:
    """Bytes of the token embedding: plain rows, or packed blocks."""
    item = format_of(name)
    if item.is_row_major:
        return model.vocab_size * model.hidden_size * item.item_bytes
    return -(-model.vocab_size // BLOCK_FEATURES) * item.block_bytes(model.hidden_size)


def table_bytes(count: int) -> int:
    """What a step's table of `count` bytes takes in the tables' buffer: its size up to the next aligned address."""
    return round_up(count, TABLE_ALIGN_BYTES)


def streamed_expert_table_bytes(linears: Iterable[LinearShard]) -> int:
    """Bytes of the table of a pass that streams experts by their heat (`ops.streamed_experts`), of all layers that
    may: as many int32 as there are experts twice, of all that such a layer may have in GPU memory and back."""
    experts = [shard.units for shard in linears if shard.picks and shard.same_bits]
    return table_bytes(4 * 2 * max(experts) * len(experts)) if experts else 0


def step_table_bytes(layers: int, kv_heads: int, rows: int, batch: int, pages: int, has_states: bool = False) -> int:
    """Bytes that hold any step's tables: positions, for each of `layers` where tokens go, a page table, starts and
    stops, and each row's place among the states of fixed size where a model has such."""
    per_layer = (
        table_bytes(8 * rows * kv_heads) + table_bytes(4 * batch * kv_heads * pages) + 2 * table_bytes(4 * batch)
    )
    return table_bytes(8 * rows) + layers * per_layer + (table_bytes(8 * rows) if has_states else 0)
