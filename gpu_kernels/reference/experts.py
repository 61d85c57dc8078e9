"""Experts: which ones a row goes to, each pick times its own, and their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from cpu_kernels.contract import Picks, Routes
from gpu_kernels.experts import ordered
from gpu_kernels.reference.linear_layer import linear, quantize_activation
from gpu_kernels.reference.packed import BLOCK_FEATURES, mixed_parts


def route(x: Tensor, router: Tensor, gated: bool, normalise: bool, into: Routes) -> None:
    experts, top_k = into.starts.shape[0] - 1, into.ids.shape[1]
    logits = x @ router.T.to(x.dtype)
    best = torch.sort(logits[:, :experts], dim=-1, descending=True, stable=True).indices[:, :top_k].sort(-1).values
    route_to(best, x, router, gated, normalise, into)


def route_to(best: Tensor, x: Tensor, router: Tensor, gated: bool, normalise: bool, into: Routes) -> None:
    """What `route` writes where the experts of every row are `best`, int64 [rows, k], ascending, whatever the scores
    are."""
    ids, places, sources, starts, weights = into
    experts, top_k = starts.shape[0] - 1, ids.shape[1]
    logits = x @ router.T.to(x.dtype)
    scores = torch.softmax(logits[:, :experts], dim=-1)
    chosen = scores.gather(1, best)
    weights[:, :top_k] = chosen / chosen.sum(-1, keepdim=True) if normalise else chosen
    weights[:, top_k] = torch.sigmoid(logits[:, experts]) if gated else 1.0
    ids.copy_(best)
    order = torch.sort(best.flatten(), stable=True).indices
    sources.copy_(order // top_k)
    places.view(-1)[order] = torch.arange(order.shape[0], dtype=places.dtype, device=places.device)
    starts[0] = 0
    everyone = torch.arange(experts, device=best.device)
    starts[1:] = (best.flatten()[:, None] == everyone).sum(0).cumsum(0)


def expert_linear(x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
    sources, starts, first = picks
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
