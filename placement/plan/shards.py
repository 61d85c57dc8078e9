"""The parts of a workload: a linear, a cache, a state of fixed size, each with its bytes and its operations."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from placement.plan.heat import ExpertHeat, assumed_heat, distinct_experts


@dataclass(frozen=True, slots=True)
class LinearShard:
    """One fused linear layer, cut into equal units: by output feature, or by input feature where `row_cut`.

    name: closed shard name; kind: its last word; layer: index, or None for the head, which runs on the rows of which
    logits are wanted. block: of the layer, whose linears a paired plan cuts alike. per_kv_head: a unit makes the q, k
    and v of a KV head of the layer's cache.
    units: number of cuttable pieces; unit_bytes, unit_features: packed bytes and output features of one unit.
    in_features: width of the input row; flops_per_row_per_unit: multiplications plus additions for one row and unit.
    weight_format: what the unit is packed as, a format of cpu_kernels/formats or a mix of them; empty is the
    workload's. down_format: of experts, what their last product is packed as where it is another one, else empty.
    picks: of experts, whose units are whole experts: how many of them a row is computed by; 0 where it is all units.
    same_bits: of experts, whether every lane computes the same bits, so that one may change its lane from step to step.
    heat: of experts, how warm they were over a text; None is assumed.
    row_cut: a unit is a run of input features and adds to every output; its dram-home units stream together or not at
    all.
    """

    name: str
    kind: str
    layer: int | None
    units: int
    unit_bytes: int
    unit_features: int
    in_features: int
    flops_per_row_per_unit: int
    row_cut: bool = False
    weight_format: str = ""
    block: str = ""
    per_kv_head: bool = False
    picks: int = 0
    same_bits: bool = False
    heat: ExpertHeat | None = None
    down_format: str = ""

    def __post_init__(self) -> None:
        if self.name.rpartition(".")[2] != self.kind:
            raise ValueError(f"{self.name}: kind is {self.kind!r}, expected the last word of the name")
        if self.units < 1 or self.unit_bytes < 1 or self.unit_features < 1:
            raise ValueError(
                f"{self.name}: units, unit_bytes and unit_features must be positive, got "
                f"{self.units}, {self.unit_bytes}, {self.unit_features}"
            )

    @property
    def is_head(self) -> bool:
        """Whether it runs only on the rows of which logits are wanted."""
        return self.layer is None

    def touched(self, rows: float, together: int = 1) -> float:
        """Expected share of the units that a call of so many rows reads: of experts 1 - (1 - picks / units)^rows.

        together: how many of the rows are a sequence's neighbours, which choose experts of each other as their heat
        says; each such run chooses apart from the others.
        """
        if not self.picks:
            return 1.0
        one = self.picks if together == 1 else distinct_experts(self.heat or self._assumed, self.picks, together)
        return 1.0 - (1.0 - one / self.units) ** (rows / together)

    def rows_of_one(self, rows: float, together: int = 1) -> float:
        """Expected rows of a unit that a call of so many rows reads; together as in `touched`."""
        return rows * self.picks / (self.units * self.touched(rows, together)) if self.picks else rows

    def served(self, rows: int, expert_slots: int, hits: float) -> float:
        """Expected share of the experts that a call of so many rows reads which so many expert slots hold.

        hits: their share of one row's picks. The experts in slots are taken to be chosen equally often, and so are
        the others.
        """
        if not expert_slots:
            return 0.0
        others = self.units - expert_slots
        if not others:
            return 1.0
        inside = expert_slots * (1.0 - (1.0 - min(1.0, self.picks * hits / expert_slots)) ** rows)
        outside = others * (1.0 - (1.0 - min(1.0, self.picks * (1.0 - hits) / others)) ** rows)
        return inside / (inside + outside)

    def curve(self, by_recency: bool) -> tuple[float, ...]:
        """The share of picks that 0, 1, ... expert slots serve, kept by recency where the experts allow it."""
        heat = self.heat or self._assumed
        return heat.recent if by_recency and self.same_bits else heat.fixed

    @property
    def _assumed(self) -> ExpertHeat:
        return assumed_heat(self.units, self.picks)

    @property
    def shape(self) -> tuple[int | str, ...]:
        """Everything that decides what the linear costs, without its name and layer."""
        sizes = self.units, self.unit_bytes, self.unit_features, self.in_features, self.flops_per_row_per_unit
        return (*sizes, int(self.row_cut), self.picks, self.weight_format, self.down_format)

    @property
    def total_bytes(self) -> int:
        """Packed bytes of the whole linear."""
        return self.units * self.unit_bytes

    @property
    def out_features(self) -> int:
        """Output features of the whole linear, padding included."""
        return self.units * self.unit_features


@dataclass(frozen=True, slots=True)
class KvShard:
    """The KV cache of one layer: `kv_heads` KV heads, K plus V of one KV head for one token is `bytes_per_token`.

    window: sliding window in tokens, 0 for full attention. heads, head_dim: of the layer's queries, 0 is as many as the
    workload says.
    """

    name: str
    layer: int
    kv_heads: int
    bytes_per_token: int
    window: int = 0
    heads: int = 0
    head_dim: int = 0

    @property
    def groups(self) -> int:
        """`kv_heads`, by the name that plans print."""
        return self.kv_heads

    def visible_tokens(self, context: int) -> int:
        """How many of `context` cached tokens a new token attends to."""
        return min(context, self.window) if self.window else context


@dataclass(frozen=True, slots=True)
class StateShard:
    """What one layer keeps of a sequence, however long that is: float32 values of this shape, beside the residual.

    draft_features: numbers of a row that was a draft, by which the state moves on once it is right; 0 where none may
    be.
    """

    name: str
    layer: int
    shape: tuple[int, ...]
    draft_features: int = 0

    @property
    def bytes_per_sequence(self) -> int:
        """What one sequence takes."""
        return 4 * prod(self.shape)


class LayerShards(NamedTuple):
    """A layer, or the head, by the indices of its linears and its cache in a workload, None where it has none. kind: a
    number that layers share whose shards differ in name and layer alone."""

    kind: int
    linears: tuple[int, ...]
    kv: int | None
