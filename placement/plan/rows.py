"""The rows in which a plan is written and shown: neighbouring layers with equal shards and placements are one row, and
where it is shown, all that look alike."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SOME = ".."  # between two layers of a row that leaves out some between them


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Neighbouring layers whose shards of one kind have equal shape and placement; `label` is a policy pattern."""

    label: str
    shards: tuple[Any, ...]
    placement: Any

    @property
    def count(self) -> int:
        """Number of shards in the row."""
        return len(self.shards)


def plan_rows(shards: Sequence[Any], placements: Sequence[Any]) -> Iterator[PlanRow]:
    """Join equal neighbours: `layers.0-15.qkv`. Rows come in order of kind, then of layer."""
    by_kind: dict[str, list[tuple[Any, Any]]] = {}
    for shard, placement in zip(shards, placements, strict=True):
        by_kind.setdefault(shard.name.rpartition(".")[2], []).append((shard, placement))
    for pairs in by_kind.values():
        start = 0
        for i in range(1, len(pairs) + 1):
            if i == len(pairs) or not _same(pairs[i - 1], pairs[i]):
                yield _joined(pairs[start:i])
                start = i


def shown_rows(rows: Iterator[PlanRow], look: Callable[[PlanRow], Hashable]) -> list[PlanRow]:
    """Join those of a kind that look alike, wherever their layers are: `layers.3..39.kv` is some of these layers."""
    alike: dict[tuple[str, Hashable], list[PlanRow]] = {}
    for row in rows:
        kind = row.label.rpartition(".")[2]
        alike.setdefault((kind, look(PlanRow(row.label, row.shards[:1], row.placement))), []).append(row)
    return [_together(parts) for parts in alike.values()]


def _together(rows: list[PlanRow]) -> PlanRow:
    if len(rows) == 1:
        return rows[0]
    shards = tuple(shard for row in rows for shard in row.shards)
    first, last = shards[0], shards[-1]
    between = "-" if last.layer - first.layer == len(shards) - 1 else SOME
    label = first.name.replace(f".{first.layer}.", f".{first.layer}{between}{last.layer}.", 1)
    return PlanRow(label, shards, rows[0].placement)


def _same(left: tuple[Any, Any], right: tuple[Any, Any]) -> bool:
    return (
        all(_anonymous(a) == _anonymous(b) for a, b in zip(left, right, strict=True))
        and right[0].layer == (left[0].layer or 0) + 1
    )


def _anonymous(value: Any) -> tuple[Any, ...]:
    return tuple(getattr(value, name) for name in value.__slots__ if name not in ("name", "layer", "heat"))


def _joined(pairs: list[tuple[Any, Any]]) -> PlanRow:
    first, last = pairs[0][0], pairs[-1][0]
    label = (
        first.name if len(pairs) == 1 else first.name.replace(f".{first.layer}.", f".{first.layer}-{last.layer}.", 1)
    )
    return PlanRow(label, tuple(shard for shard, _ in pairs), pairs[0][1])
