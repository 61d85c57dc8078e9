"""How much a rounding of each weight, alone, changes what a model says on a text.

To second order the KL divergence of the output grows with the squared error of a linear's own output. So every weight
is rounded once, coarsely, and its divergence measured; that of a type is in proportion to the error that the type makes
in the linear's output. A linear of layer i is measured by the layers from i on, which begin with what the unrounded
layers before them left; where a head is tied to the embedding both uses are measured together, and a layer's experts
are rounded together. Tokens that are likely nowhere in the text are left out of the distributions that are compared.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from cpu_kernels import CpuKernels
from hetero_attn.serving.progress import steps_bar
from hetero_attn.spec.weights import Part
from hetero_attn.tools.quantize.choose import Loss
from hetero_attn.tools.quantize.errors import (
    SAMPLED_ROWS,
    errors_of_types,
    kept_as_it_is,
    squared_error,
    without_beaten,
)
from hetero_attn.tools.quantize.feedback import Moments
from hetero_attn.tools.quantize.layer_runs import LayerRuns
from hetero_attn.tools.quantize.stacks import stack_of

Result = TypeVar("Result")
Member = tuple[Part, torch.Tensor, int]  # as `LayerRuns.parts` gives it
MEASURED_TOKENS = 128
COARSE_GROUP, COARSE_CODES = 32, 7
LEAST_KL = 1e-9  # so that of two weights without any effect the cheaper type is taken for neither by chance
LIKELY, LIKELY_SHARE = 1e-4, 0.98  # a token's probability somewhere, and what such tokens have together on average


def losses(runs: LayerRuns, own: Mapping[str, str], ops: CpuKernels) -> dict[str, Loss]:
    """What every weight costs in each type that it may have, by its stack; a tied head with its embedding.

    runs: over one window, several of which run together. own: types of stacks whose codes are already in the source.
    """
    starts = [runs.embedded()]
    for layer in range(runs.layers):
        starts.append(runs.after_layer(layer, starts[-1]))
    said = _Said(runs, starts[-1].flatten(0, 1))
    measured: dict[str, Loss] = {}
    for layer in steps_bar(range(runs.layers), "measuring what each linear costs"):
        measured |= _of_layer(runs, layer, starts[layer], said, own, ops)
    for name, rows, count, starts_at in _ends(runs, starts):
        found = _changed([rows], lambda: _divergences(runs, *starts_at(), said)[0])  # noqa: B023
        measured[name] = _loss([(_flat(rows)[:count], None)], found, own.get(name), ops)
    return {name: loss for name, loss in measured.items() if loss.kl}


def _of_layer(
    runs: LayerRuns, layer: int, start: torch.Tensor, said: "_Said", own: Mapping[str, str], ops: CpuKernels
) -> dict[str, Loss]:
    moments, members = Moments(), dict[str, list[Member]]()
    runs.after_layer(layer, start, moments)
    for member in runs.parts(layer):
        members.setdefault(stack_of(member[0].tensor), []).append(member)
    run = partial(runs.after_layer, layer, start)
    changed = [_changed([rows for _, rows, _ in each], run) for each in members.values()]
    found = _divergences(runs, layer + 1, changed, said)
    return {
        stack: _stack_loss(each, moments, divergence, own.get(stack), ops)
        for (stack, each), divergence in zip(members.items(), found, strict=True)
    }


class _Said:
    """What the unrounded model says of the likely tokens, at every position."""

    def __init__(self, runs: LayerRuns, hidden: torch.Tensor) -> None:
        logs = runs.log_probabilities(hidden)
        likely = (logs.amax(0) > math.log(LIKELY)).nonzero()[:, 0]
        is_most = logs[:, likely].exp().sum(1).mean().item() > LIKELY_SHARE
        self._runs, self._tokens = runs, likely if is_most else None
        self._logs = torch.log_softmax(logs[:, likely], 1) if is_most else logs

    def divergence(self, hidden: torch.Tensor) -> float:
        """The mean divergence to what is said from other hidden states [rows, hidden_size]."""
        after = self._runs.log_probabilities(hidden, among=self._tokens)
        return (self._logs.exp() * (self._logs - after)).sum(-1).mean().item()


def _ends(
    runs: LayerRuns, starts: list[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, int, Callable[[], tuple[int, list[torch.Tensor]]]]]:
    """Embedding and head, a tied pair once: the tensor, its rows, how many are no padding, and from where on the model
    is run with others."""
    name, embedding = runs.embedding
    for part, rows, _ in runs.head_parts():
        if part.tensor != name:
            yield part.tensor, rows, part.rows, lambda: (runs.layers, [starts[-1]])
        is_tied = part.tensor == name
        count = part.rows if is_tied else embedding.shape[0]
        yield name, rows if is_tied else embedding, count, lambda: (0, [runs.embedded()])


def _divergences(runs: LayerRuns, layer: int, changed: list[torch.Tensor], said: _Said) -> list[float]:
    """The mean divergence of the output for each of what the layers from `layer` on begin with."""
    hidden = torch.cat(changed)
    for index in range(layer, runs.layers):
        hidden = runs.after_layer(index, hidden)
    return [said.divergence(each.flatten(0, 1)) for each in hidden.split(changed[0].shape[0])]


def _changed(weights: list[torch.Tensor], run: Callable[[], Result]) -> Result:
    """What `run` gives while the rows of weights are rounded coarsely."""
    kept = [rows.clone() for rows in weights]
    for rows in weights:
        rows.copy_(rounded_coarsely(_flat(rows)).view(rows.shape))
    try:
        return run()
    finally:
        for rows, before in zip(weights, kept, strict=True):
            rows.copy_(before)


def _flat(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, rows.shape[-1]).float()


def _stack_loss(members: list[Member], moments: Moments, divergence: float, own: str | None, ops: CpuKernels) -> Loss:
    """Of what of a stack is read at all: an expert that no token has chosen costs nothing in any type."""
    found = [(_flat(rows)[: part.rows], moments.mean(address)) for part, rows, address in members]
    read = [(rows, mean) for rows, mean in found if mean is not None] or [(rows, None) for rows, _ in found]
    loss = _loss(read, divergence, own, ops)
    return replace(loss, rows=sum(rows.shape[0] for rows, _ in found))


def _loss(
    weights: list[tuple[torch.Tensor, torch.Tensor | None]], divergence: float, own: str | None, ops: CpuKernels
) -> Loss:
    """divergence: of the weights, rows [rows, in_features] and the moments of their inputs, rounded coarsely together.
    Without moments every error counts alike."""
    coarse = sum(squared_error(rounded_coarsely(rows), rows, mean) for rows, mean in weights)
    scale = max(divergence, LEAST_KL) / max(coarse, 1e-30)
    kl: dict[str, float] = {}
    for rows, mean in weights:
        sample = rows[:: max(1, rows.shape[0] * len(weights) // SAMPLED_ROWS)].contiguous()
        for kind, error in errors_of_types(sample, mean, ops).items():
            kl[kind] = kl.get(kind, 0.0) + scale * error
    rows, in_features = weights[0][0].shape
    return Loss(rows, in_features, without_beaten(kl | kept_as_it_is(own, in_features)))


def rounded_coarsely(rows: torch.Tensor) -> torch.Tensor:
    """Rows of about four bits in groups of 32, or what divides the inputs, without any search."""
    group = COARSE_GROUP if rows.shape[1] % COARSE_GROUP == 0 else rows.shape[1]
    groups = rows.reshape(-1, group)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-30) / COARSE_CODES
    return ((groups / scale).round_() * scale).view(rows.shape)
