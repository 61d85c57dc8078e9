"""Which experts a run chooses: watched, compared with those of another run, and replayed.

Routing is a step: a number at the edge of two experts that rounding moves gives a row another expert, and then other
numbers altogether. So two runs are compared by what they choose, and by how near the choices were that differ; and a
run that is made to choose what another one chose shows what its arithmetic alone does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cpu_kernels.contract import Scoring
from gpu_kernels import reference
from hetero_attn.engine.engine import Engine

TIE = 1e-5  # of a standard deviation of a row's scores: nearer ones may change places in float32


@dataclass(slots=True)
class Routes:
    """What every router of a model chose, in the order in which the routers are met.

    ids: of each, tensors int64 [rows, k], one behind the other. gaps: how far the last one chosen was from the next
    one, float64 [rows] each, in standard deviations of the row's scores. wrong: rows whose ids are not the best by the
    very numbers that the router read.
    """

    ids: list[list[torch.Tensor]] = field(default_factory=list)
    gaps: list[list[torch.Tensor]] = field(default_factory=list)
    wrong: int = 0

    def add(self, layer: int, x: torch.Tensor, router: torch.Tensor, scoring: Scoring, ids: torch.Tensor) -> None:
        """Keep what a router, f32 [experts, hidden], chose from `x`, f32 [rows, hidden]."""
        own = (part if part is None else part.cpu() for part in (scoring.bias, scoring.correction))
        on_host = scoring._replace(**dict(zip(("bias", "correction"), own, strict=True)))
        scores, k = reference.choice_scores(x.cpu().double(), router.cpu().double(), on_host), ids.shape[1]
        best, order = reference.in_best_groups(scores, on_host).sort(-1, descending=True)
        spread = scores.std(-1, unbiased=False).clamp_min(1e-300)
        is_all = k == scores.shape[1]
        gaps = torch.full_like(spread, torch.inf) if is_all else (best[:, k - 1] - best[:, k]) / spread
        chosen = ids.cpu().long()
        differs = (order[:, :k].sort(-1).values != chosen).any(-1)
        self.wrong += int((differs & (gaps > TIE)).sum())
        if layer == len(self.ids):
            self.ids.append([])
            self.gaps.append([])
        self.ids[layer].append(chosen)
        self.gaps[layer].append(gaps)


@dataclass(frozen=True, slots=True)
class RouteAgreement:
    """How a run's choices compare with those of another.

    agreement: share of its picks that the other made too. smallest_gap: between the last chosen and the next expert, in
    the other run, in standard deviations of a row's scores; None where every expert is always chosen. widest_flip:
    such a gap where the choices differ, 0 where none does. wrong: rows of the run whose experts are not the best by
    what its router read.
    """

    agreement: float
    smallest_gap: float | None
    widest_flip: float
    wrong: int

    def line(self) -> str:
        """One line of a report."""
        gap = "every expert is chosen" if self.smallest_gap is None else f"nearest choice {self.smallest_gap:.1e}"
        flips = f", widest that differs {self.widest_flip:.1e}" if self.agreement < 1 else ""
        wrong = f"\n    {self.wrong} rows NOT COMPUTED BY THEIR BEST EXPERTS" if self.wrong else ""
        return f"  experts: {self.agreement:.2%} of the picks alike; {gap}{flips}{wrong}\n"


def agreement(actual: Routes, other: Routes) -> RouteAgreement:
    """Compare two runs over the same rows."""
    same, picks, widest, smallest = 0, 0, 0.0, torch.inf
    for layers in zip(actual.ids, other.ids, other.gaps, strict=True):
        ids, others, gaps = (torch.cat(parts) for parts in layers)
        found = (ids[:, :, None] == others[:, None, :]).any(-1)
        same, picks = same + int(found.sum()), picks + found.numel()
        flipped = gaps[~found.all(-1)]
        widest = max(widest, flipped.max().item()) if flipped.numel() else widest
        smallest = min(smallest, gaps.min().item())
    return RouteAgreement(same / picks, smallest if smallest < torch.inf else None, widest, actual.wrong)


class _Ops:
    """Operations of which `route` is another."""

    def __init__(self, ops: Any, route: Callable[..., None]) -> None:
        self._ops, self.route = ops, route

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


@contextmanager
def watched(engine: Engine, routes: Routes) -> Iterator[None]:
    """Within this, `routes` keeps what the engine's routers choose; steps take the plain path."""

    def route(ops: Any, layer: int, x: torch.Tensor, router: torch.Tensor, *others: Any) -> None:
        ops.route(x, router, *others)
        scoring, into = others
        routes.add(layer, x, router[: into.experts], scoring, into.ids)

    with _routing_by(engine, route):
        yield


@contextmanager
def replayed(engine: Engine, routes: Routes) -> Iterator[None]:
    """Within this, rows, from the first of a sequence on, are computed by the experts of `routes`, with the
    weights that the engine's own scores give them; steps take the plain path."""
    ids, done = [torch.cat(parts) for parts in routes.ids], [0] * len(routes.ids)

    def route(ops: Any, layer: int, x: torch.Tensor, *others: Any) -> None:
        first, done[layer] = done[layer], done[layer] + x.shape[0]
        reference.route_to(ids[layer][first : done[layer]].to(x.device), x, *others)

    with _routing_by(engine, route):
        yield


@contextmanager
def _routing_by(engine: Engine, route: Callable[..., None]) -> Iterator[None]:
    """Within this, `route(the engine's operations, which router, *its arguments)` routes."""
    lanes, layers = engine.lanes, {}
    side, name = (lanes, "host_ops") if lanes.device is None else (lanes.device, "ops")
    kept = getattr(side, name)

    def routed(x: torch.Tensor, router: torch.Tensor, *others: Any) -> None:
        route(kept, layers.setdefault(router.data_ptr(), len(layers)), x, router, *others)

    setattr(side, name, _Ops(kept, routed))
    try:
        with engine.forward.watched_layers(lambda layer, residual: None):
            yield
    finally:
        setattr(side, name, kept)
