"""What a model asks of a machine, in names, bytes and operations. No tensors, no devices, no torch.

A workload is a list of shards with closed names: `layers.N.` with the kinds of its linears, `head`, `layers.N.kv` and
`embed`.
The runtime describes its model this way; the planner and the cost model know nothing else about it.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from cpu_kernels.formats import segments
from placement.plan.drafting import Drafting, Guesses
from placement.plan.shards import KvShard, LayerShards, LinearShard, StateShard

KV_DTYPES = ("fp32", "bf16", "q8", "q4")

# Long enough for the bus to reach its rate, short enough that slots cost little memory and the first piece is soon
# there.
STAGING_PIECE_BYTES = 8 * 2**20

# A batch of copies serves two steps behind the one that missed them at the soonest. Of drawn routes of 8 of 128 experts
# four serve 4 to 16 points more than two where the bus has time for them, of routes of 4 up to 5 points fewer where a
# batch then takes it twice as long; and they take DRAM from the CPU lane.
MOST_INSERTS = 2

OF_SHARDS = ("by_layer", "layers", "num_layers", "layer_features", "has_row_cuts", "weight_bytes")  # they alone decide

DRAFTED_ROWS = 16  # of a pass, with drafts, however few sequences there are

ROW_TIER_LIMITS = (1, 4, 16, 64)
NUM_ROW_TIERS = len(ROW_TIER_LIMITS) + 1
ROW_TIER_NAMES = ("1", "2-4", "5-16", "17-64", "65+")


def row_tier(rows: int) -> int:
    """Index of the row tier of a call with `rows` token rows: 1 | 2-4 | 5-16 | 17-64 | 65+."""
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return bisect_left(ROW_TIER_LIMITS, rows)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


class ChunkChoice(NamedTuple):
    """A prefill chunk in rows, and `Workload.resident_bytes` with it: the tables of a step grow with its rows."""

    rows: int
    resident_bytes: int


@dataclass(frozen=True)
class Workload:
    """Everything the planner may know about a model and the use made of it.

    weight_dtype: what tables call the formats of the linears. kv_dtype: fp32 | bf16 | q8 | q4. embed_bytes: the token
    embedding, read a row at a time from host memory. resident_bytes: norms, biases, rotary tables: in GPU memory
    whenever there is a GPU. activation_bytes_per_row: peak activations of one token row in GPU memory;
    host_activation_bytes_per_row: in host memory, 0 is as many. max_context, prefill_chunk: tokens; max_batch:
    sequences; page_size: tokens of one KV page. elastic: units in GPU memory have a copy in DRAM, so that a loaded
    model can move to a plan for another GPU budget. kv_tokens: KV slots that all sequences share, None is max_context
    for each; a sequence reserves the pages of its own prompt and answer, so fewer slots still serve many short ones.
    staging_piece_bytes: of what crosses the bus at a time, which is what a staging slot holds. row_cuts: o and down as
    a paired plan cuts them, by rows; empty where only column plans are possible. chunk_choices: prefill chunks that the
    planner may choose instead, ascending; empty where the chunk is given. smaller_chunks: those below them, descending,
    for budgets in which none of them finds room: one after another. small_calls: operations of a pass on the CPU beside
    linears and attention; 0 is four a layer. states: what layers keep of each sequence beside keys and values.
    prefix_states: at how many ends of prompts they are kept in host memory, for prompts that go on from there. inserts:
    the most experts of a layer that are copied into expert slots behind a step, 0 leaves in them what is there.
    drafting: how tokens are made where somebody drafts, None where nobody does.
    """

    model: str
    weight_dtype: str
    linears: tuple[LinearShard, ...]
    kv: tuple[KvShard, ...]
    embed_bytes: int
    resident_bytes: int
    activation_bytes_per_row: int
    max_context: int
    max_batch: int
    page_size: int
    num_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    prefill_chunk: int
    kv_dtype: str = "bf16"
    elastic: bool = False
    kv_tokens: int | None = None
    row_cuts: tuple[LinearShard, ...] = ()
    staging_piece_bytes: int = STAGING_PIECE_BYTES
    host_activation_bytes_per_row: int = 0
    chunk_choices: tuple[ChunkChoice, ...] = ()
    smaller_chunks: tuple[ChunkChoice, ...] = ()
    small_calls: int = 0
    states: tuple[StateShard, ...] = ()
    prefix_states: int = 0
    inserts: int = MOST_INSERTS
    drafting: Drafting | None = None

    def __post_init__(self) -> None:
        for field in ("max_context", "max_batch", "page_size", "prefill_chunk"):
            if getattr(self, field) < 1:
                raise ValueError(f"workload {self.model}: {field} must be at least 1, got {getattr(self, field)}")
        if self.elastic and any(shard.row_cut for shard in self.linears):
            raise ValueError(f"workload {self.model}: an elastic plan moves columns, so no linear of it is cut by rows")
        if self.kv_tokens is not None and self.kv_tokens < self.max_context:
            raise ValueError(
                f"workload {self.model}: kv_tokens is {self.kv_tokens}, less than one sequence of max_context "
                f"{self.max_context}; give at least that"
            )

    def with_chunk(self, choice: ChunkChoice) -> "Workload":
        """The workload with one of its chunk choices, and none left."""
        return self.resized(
            prefill_chunk=choice.rows, resident_bytes=choice.resident_bytes, chunk_choices=(), smaller_chunks=()
        )

    def resized(self, **changes: Any) -> "Workload":
        """The workload with other values than its shards; what those alone decide is found out once."""
        other = replace(self, **changes)
        vars(other).update((name, getattr(self, name)) for name in OF_SHARDS)
        return other

    def is_called_alike(self, other: "Workload") -> bool:
        """Whether another workload differs in how many experts are copied into expert slots at most."""
        return self == replace(other, inserts=self.inserts)

    def in_smaller_chunks(self) -> "Iterator[Workload]":
        """The workload, then with each of its smaller chunks in turn, and no other choice."""
        yield self
        for choice in self.smaller_chunks:
            yield self.with_chunk(choice)

    def format_of(self, shard: LinearShard) -> str:
        """What the weights of a linear are packed as."""
        return shard.weight_format or self.weight_dtype

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """The formats that parts of the linears are packed in, each once."""
        parts = (part for shard in self.linears for part in segments(self.format_of(shard), shard.in_features))
        of_experts = (shard.down_format for shard in self.linears if shard.down_format)
        return tuple(dict.fromkeys((*(part.format.name for part in parts), *of_experts)))

    def heads_of(self, shard: KvShard) -> int:
        """Query heads of a layer."""
        return shard.heads or self.num_heads

    def head_dim_of(self, shard: KvShard) -> int:
        """Numbers in a head of a layer."""
        return shard.head_dim or self.head_dim

    @property
    def caches(self) -> tuple[tuple[str, int, int], ...]:
        """What attention is like: every cache dtype with its query heads per KV head and their size."""
        shapes = ((max(1, round(self.heads_of(kv) / kv.kv_heads)), self.head_dim_of(kv)) for kv in self.kv)
        return tuple((self.kv_dtype, *shape) for shape in dict.fromkeys(shapes))

    @property
    def is_mixed(self) -> bool:
        """Whether linears differ in what their weights are packed as."""
        formats = {self.format_of(shard) for shard in self.linears}
        return len(formats) > 1 or any(shard.down_format for shard in self.linears)

    @cached_property
    def weight_bytes(self) -> int:
        """Packed bytes of every linear."""
        return sum(shard.total_bytes for shard in self.linears)

    @cached_property
    def has_row_cuts(self) -> bool:
        """Whether some linear is cut by rows."""
        return any(shard.row_cut for shard in self.linears)

    @cached_property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Every layer that has a linear or a cache."""
        of_linears = {shard.layer for shard in self.linears if shard.layer is not None}
        return tuple(sorted(of_linears | {shard.layer for shard in self.kv}))

    @cached_property
    def by_layer(self) -> tuple[LayerShards, ...]:
        """Every layer, and the head last, by its shards."""
        linears: dict[int | None, list[int]] = {layer: [] for layer in (*self.layers, None)}
        for index, shard in enumerate(self.linears):
            linears[shard.layer].append(index)
        kv = {shard.layer: index for index, shard in enumerate(self.kv)}
        kinds: dict[tuple[object, ...], int] = {}
        return tuple(
            LayerShards(kinds.setdefault(self._kind(indices, kv.get(layer)), len(kinds)), tuple(indices), kv.get(layer))
            for layer, indices in linears.items()
            if indices or layer in kv
        )

    def _kind(self, linears: list[int], kv: int | None) -> tuple[object, ...]:
        shards = [self.linears[i] for i in linears]
        cache = None if kv is None else replace(self.kv[kv], name="", layer=0)
        return cache, *((s.kind, s.shape, s.block, s.per_kv_head, s.is_head) for s in shards)

    @cached_property
    def layer_features(self) -> int:
        """Inputs and outputs of all linears of the layers together."""
        return sum(s.in_features + s.out_features for s in self.linears if not s.is_head)

    @property
    def linear_kinds(self) -> tuple[str, ...]:
        """What the linears of the layers are called, in order."""
        return tuple(dict.fromkeys(shard.kind for shard in self.linears if not shard.is_head))

    @property
    def state_bytes(self) -> int:
        """States of all sequences, and what drafts leave: in GPU memory whenever there is a GPU."""
        return self.max_batch * sum(shard.bytes_per_sequence for shard in self.states) + self.draft_bytes

    @property
    def draft_rows(self) -> int:
        """The most rows of a pass with drafts of a model with states; 0 where it may have none."""
        may_draft = self.states and all(shard.draft_features for shard in self.states)
        return max(DRAFTED_ROWS, self.max_batch) if may_draft else 0

    @property
    def draft_bytes(self) -> int:
        """What such a pass leaves: its rows, their ids, and a state of each sequence in one layer after the other."""
        if not self.draft_rows:
            return 0
        features = sum(shard.draft_features for shard in self.states)
        spare = self.max_batch * max(shard.bytes_per_sequence for shard in self.states)
        return self.draft_rows * (4 * features + 8) + spare

    @property
    def prefix_state_bytes(self) -> int:
        """Host memory of the states that are kept at ends of prompts."""
        return self.prefix_states * sum(shard.bytes_per_sequence for shard in self.states)

    @cached_property
    def full_tokens(self) -> int:
        """KV slots of all sequences together in a layer that attends to everything, in whole pages."""
        every_sequence = round_up(self.max_context, self.page_size) * self.max_batch
        if self.kv_tokens is None:
            return every_sequence
        return min(every_sequence, round_up(self.kv_tokens, self.page_size))

    @property
    def min_gpu_tokens(self) -> int:
        """Fewest KV slots with which a GPU-owned KV head can work: one prefill chunk and a page for every sequence."""
        chunk = round_up(min(self.max_context, self.prefill_chunk), self.page_size)
        return min(self.full_tokens, chunk + self.page_size * self.max_batch)

    def sequence_tokens(self, shard: KvShard) -> int:
        """Most KV slots that one sequence ever takes in a layer: its context, or its window, a chunk and a page."""
        whole = round_up(self.max_context, self.page_size)
        if not shard.window:
            return whole
        return min(whole, round_up(shard.window + self.activation_rows, self.page_size) + self.page_size)

    def layer_tokens(self, shard: KvShard) -> int:
        """Most KV slots that all sequences together ever take in a layer, in whole pages."""
        return min(self.full_tokens, self.max_batch * self.sequence_tokens(shard))

    @property
    def activation_rows(self) -> int:
        """The most rows of one call."""
        return max(self.prefill_chunk, self.max_batch)

    @property
    def drafter_bytes(self) -> dict[str, dict[str, int]]:
        """What drafts for the model, by place and kind, as `Drafting.taken_bytes`."""
        return Drafting(1, Guesses(0.0)).taken_bytes if self.drafting is None else self.drafting.taken_bytes

    @property
    def drafter_gpu_bytes(self) -> int:
        """What a drafter has of the GPU budget beside this model."""
        return 0 if self.drafting is None else self.drafting.gpu_bytes

    @property
    def drafter_host_bytes(self) -> int:
        """What a drafter takes of host memory beside this model, pinned memory included."""
        return 0 if self.drafting is None else self.drafting.host_bytes

    def shard_names(self) -> Iterator[str]:
        """Every shard name, in model order."""
        yield "embed"
        by_layer: dict[int | None, list[str]] = {}
        shards: tuple[LinearShard | KvShard, ...] = (*self.linears, *self.kv)
        for shard in shards:
            by_layer.setdefault(shard.layer, []).append(shard.name)
        for layer in (*self.layers, None):
            yield from by_layer.get(layer, [])
