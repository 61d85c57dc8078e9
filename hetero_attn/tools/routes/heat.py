"""Which experts a text keeps warm: how soon a layer's experts are chosen again, and what recency would serve.

A layer's *stack* is the order in which its experts were last chosen. How deep an expert lies there when it is chosen
again says for every number of slots at once whether slots kept by recency would have held it (Mattson et al., 1970):
one pass gives the whole curve of hits. What is chosen together is looked up together and then put on top.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.llm import LLM
from hetero_attn.tools.forced_runs import forced
from hetero_attn.tools.routes.watch import Routes, watched
from placement.plan.heat import ExpertHeat, by_gain
from placement.plan.units import format_bytes

SOON = 8  # tokens
BUDGETS = (1, 2, 4, 8, 16)  # GiB of slots that a table shows
GIB = 1 << 30


def stack_distances(ids: torch.Tensor) -> list[int | None]:
    """How many other experts were chosen since each pick's last time, row by row of int64 [rows, k]; None for the first
    time."""
    stack: list[int] = []
    found: list[int | None] = []
    for row in ids.tolist():
        found += [stack.index(expert) if expert in stack else None for expert in row]
        stack = row[::-1] + [expert for expert in stack if expert not in row]
    return found


def hit_curve(distances: Sequence[int | None], experts: int) -> list[float]:
    """The share of picks that 0, 1, ... `experts` slots kept by recency serve."""
    counts = [0] * (experts + 1)
    for distance in distances:
        if distance is not None:
            counts[distance + 1] += 1
    total, curve = 0, []
    for count in counts:
        total += count
        curve.append(total / max(1, len(distances)))
    return curve


@dataclass(frozen=True, slots=True)
class LayerHeat:
    """One layer's experts over a text.

    distinct: how many were chosen at all; next_token, soon: shares of the picks that are made again at the next token,
    or at one of the next SOON; hits: by the number of slots, see `hit_curve`. counts: picks of each expert.
    """

    name: str
    experts: int
    per_row: int
    distinct: int
    next_token: float
    soon: float
    hits: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def heat(self) -> ExpertHeat:
        """What plans read of it."""
        popular = sorted(range(self.experts), key=lambda expert: -self.counts[expert])
        most = accumulate((self.counts[expert] for expert in popular), initial=0)
        return ExpertHeat(self.hits, tuple(count / max(1, sum(self.counts)) for count in most), tuple(popular))

    @classmethod
    def of(cls, name: str, ids: torch.Tensor, experts: int) -> "LayerHeat":
        """Of the ids int64 [rows, k] that were chosen row by row."""
        return cls(
            name=name,
            experts=experts,
            per_row=ids.shape[1],
            distinct=len(ids.unique()),
            next_token=_share_again(ids, 1),
            soon=_share_again(ids, SOON),
            hits=tuple(hit_curve(stack_distances(ids), experts)),
            counts=tuple(torch.bincount(ids.flatten(), minlength=experts).tolist()),
        )


def _share_again(ids: torch.Tensor, distance: int) -> float:
    """The share of picks, of all rows with a next one, that one of the `distance` rows behind theirs makes too."""
    rows = [set(row) for row in ids.tolist()]
    after = [set().union(*rows[at + 1 : at + 1 + distance]) for at in range(len(rows) - 1)]
    return sum(len(row & later) for row, later in zip(rows, after, strict=False)) / max(1, ids[:-1].numel())


@dataclass(frozen=True, slots=True)
class HeatReport:
    """The heat of every layer with experts over `tokens` tokens of a text; expert_bytes: of one of them, packed."""

    model: str
    tokens: int
    expert_bytes: int
    layers: tuple[LayerHeat, ...]

    def served(self, memory_bytes: int) -> tuple[int, float]:
        """(slots, share of all picks) that so much memory holds and serves, given to the layers by equal gain."""
        curves = [layer.hits for layer in self.layers]
        slots = by_gain(curves, memory_bytes // self.expert_bytes)
        return sum(slots), sum(curve[count] for curve, count in zip(curves, slots, strict=True)) / len(curves)

    def table(self) -> str:
        """Plain text for people, at most 80 columns wide."""
        first = self.layers[0]
        lines = [
            f"{self.model}: {self.tokens} tokens",
            f"{first.per_row} of {first.experts} experts a row in {len(self.layers)} layers, "
            f"{format_bytes(self.expert_bytes)} an expert",
            "                     distinct   next token   within 8     slots for 50, 80, 95 %",
        ]
        lines += [
            f"  {layer.name:<18} {layer.distinct:>8}   {layer.next_token:>10.0%}   {layer.soon:>8.0%}     "
            + ", ".join(f"{_slots_for(layer.hits, share):>3}" for share in (0.5, 0.8, 0.95))
            for layer in self.layers
        ]
        lines.append("slots kept by recency, given to layers by equal gain, would serve of all picks:")
        whole = sum(layer.experts for layer in self.layers) * self.expert_bytes
        for size in (GIB * budget for budget in BUDGETS):
            slots, share = self.served(min(size, whole))
            lines.append(f"  {format_bytes(min(size, whole)):>10}: {share:.0%} ({slots} slots)")
            if size >= whole:
                break
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def _slots_for(hits: Sequence[float], share: float) -> str:
    """The fewest slots that serve such a share of the picks; a dash where all of them do not."""
    return next((str(slots) for slots, served in enumerate(hits) if served >= share), "-")


def run(llm: LLM, token_ids: Sequence[int]) -> HeatReport:
    """Watch what a loaded mixture of experts chooses over a text; raises UnsupportedModelError for a model
    without any."""
    linears = [linear for linear in llm.engine.weights.spec.linears if linear.kind == "experts"]
    if not linears:
        raise UnsupportedModelError(f"{llm.plan.model} has no experts, so it has no routes")
    routes = Routes()
    with watched(llm.engine, routes):
        forced(llm.engine, token_ids, 0)
    layers = tuple(
        LayerHeat.of(linear.name, torch.cat(ids), linear.units) for linear, ids in zip(linears, routes.ids, strict=True)
    )
    return HeatReport(llm.plan.model, len(token_ids), max(linear.unit_bytes for linear in linears), layers)
