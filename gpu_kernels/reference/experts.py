"""Experts: which ones a row goes to, each pick times its own, and their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from cpu_kernels.contract import Picks, Routes, Scoring
from gpu_kernels.experts import ordered
from gpu_kernels.reference.linear_layer import linear, quantize_activation
from gpu_kernels.reference.packed import BLOCK_FEATURES, mixed_parts


def route(x: Tensor, router: Tensor, scoring: Scoring, into: Routes) -> None:
    experts, top_k = into.experts, into.ids.shape[1]
    scores = in_best_groups(choice_scores(x, router[:experts], scoring), scoring)
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k].sort(-1).values
    route_to(best, x, router, scoring, into)


def route_to(best: Tensor, x: Tensor, router: Tensor, scoring: Scoring, into: Routes) -> None:
    """What `route` writes where the experts of every row are `best`, int64 [rows, k], ascending, whatever the scores
    are."""
    ids, places, sources, starts, weights, _ = into
    experts, top_k = into.experts, ids.shape[1]
    logits = _logits(x, router[:experts], scoring)
    chosen = (logits.sigmoid() if scoring.sigmoid else torch.softmax(logits, dim=-1)).gather(1, best)
    if scoring.normalised:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + scoring.eps)
    weights[:, :top_k] = scoring.scale * chosen
    weights[:, top_k] = torch.sigmoid(x @ router[experts].to(x.dtype)) if scoring.gated else 1.0
    ids.copy_(best)
    keys = sorting_keys(best, into)
    order = torch.sort(keys, stable=True).indices
    sources.copy_(order // top_k)
    places.view(-1)[order] = torch.arange(order.shape[0], dtype=places.dtype, device=places.device)
    starts[0] = 0
    everyone = torch.arange(starts.shape[0] - 1, device=best.device)
    starts[1:] = (keys[:, None] == everyone).sum(0).cumsum(0)


def sorting_keys(best: Tensor, into: Routes) -> Tensor:
    """What picks are sorted by, int64 [rows * k]: their expert, or where there are expert slots the slot that holds it,
    and behind all slots the expert."""
    if into.expert_slots is None:
        return best.flatten()
    slots = into.expert_slots.long()[best.long()]
    return torch.where(slots >= 0, slots, best + (into.starts.shape[0] - 1 - into.experts)).flatten()


def choice_scores(x: Tensor, router: Tensor, scoring: Scoring) -> Tensor:
    """What experts are chosen by, [rows, experts], groups apart: the softmax keeps the order of its logits."""
    logits = _logits(x, router, scoring)
    scores = logits.sigmoid() if scoring.sigmoid else logits
    return scores if scoring.correction is None else scores + scoring.correction.to(x.dtype)


def in_best_groups(scores: Tensor, scoring: Scoring) -> Tensor:
    """Scores with -inf where an expert's group is not one of the best."""
    if scoring.kept_groups == scoring.groups:
        return scores
    size, kept = scores.shape[1] // scoring.groups, torch.full_like(scores, -torch.inf)
    for row, values in enumerate(scores):
        sums = [group.sort(descending=True).values[:2].sum().item() for group in values.split(size)]
        best = sorted(range(scoring.groups), key=lambda group: -sums[group])[: scoring.kept_groups]
        for group in best:
            kept[row, group * size : (group + 1) * size] = values[group * size : (group + 1) * size]
    return kept


def _logits(x: Tensor, router: Tensor, scoring: Scoring) -> Tensor:
    logits = x @ router.T.to(x.dtype)
    return logits if scoring.bias is None else logits + scoring.bias.to(x.dtype)


def expert_linear(x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
    sources, starts, first, _ = picks
    bounds = starts[first : first + weight.shape[0] + 1].tolist()
    for expert, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if start < stop:
            rows = x[start:stop] if sources is None else x[sources[start:stop].long()]
            _linear_of_expert(rows, weight[expert], weight_dtype, out[start:stop])


def _linear_of_expert(x: Tensor, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
    for name, blocks, columns in mixed_parts(weight, weight_dtype, x.shape[-1]):
        if name in ordered.WHOLE_FORMS and x.dtype == torch.float32:
            out[:, columns] = ordered.whole_linear(*quantize_activation(x), blocks, name)
        else:
            part = torch.empty(x.shape[0], blocks.shape[0] * BLOCK_FEATURES, dtype=out.dtype, device=out.device)
            linear(x, blocks, name, None, part)
            out[:, columns] = part


def combine(near: Tensor, far: Tensor, border: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> None:
    for pick, place in enumerate(places.long().unbind(1)):
        output = torch.where((place < border)[:, None], near[place], far[place])
        out += weights[:, pick, None] * output


def scale_rows(factors: Tensor, out: Tensor) -> None:
    out *= factors


def add_expert_bias(bias: Tensor, picks: Picks, out: Tensor) -> None:
    bias = bias if picks.held is None else bias[picks.held.long()]
    bounds = picks.starts[picks.first : picks.first + bias.shape[0] + 1].tolist()
    for values, start, stop in zip(bias, bounds, bounds[1:]):
        out[start:stop] += values
