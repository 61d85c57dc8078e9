"""Routing and what surrounds experts on the GPU lane, in torch's own kernels: small, of fixed shapes, read by no host.

    route       ids = the k largest of x router^T, of equal ones the lower id;  w = softmax(x router^T) there
    combine     y += sum_j w_j p_j, experts ascending
    scale_rows  y[r] = f[r] y[r];  add_expert_bias  y[place] += bias[its expert];  add_sinks  y *= sigmoid(lse - s)
    norm_heads  q = q / sqrt(mean over all heads of q^2 + eps) * weight, k likewise

The products of a router have float32's digits: with TF32, or rounded to bf16, near scores would change places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpu_kernels.contract import Partial, Picks, Routes, Scoring
from gpu_kernels.reference.experts import sorting_keys


def route(x: Tensor, router: Tensor, scoring: Scoring, into: Routes) -> None:
    ids, places, sources, starts, weights, _ = into
    experts, top_k = into.experts, ids.shape[1]
    products = _product(x, router)
    logits = products[:, :experts] if scoring.bias is None else products[:, :experts] + scoring.bias
    scores = torch.sigmoid(logits) if scoring.sigmoid else torch.softmax(logits, dim=-1)
    best = _highest(_choices(scores if scoring.sigmoid else logits, scoring), top_k).sort(-1).values
    chosen = scores.gather(1, best)
    if scoring.normalised:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + scoring.eps)
    weights[:, :top_k].copy_(chosen * scoring.scale)
    weights[:, top_k].copy_(torch.sigmoid(products[:, experts]) if scoring.gated else torch.ones_like(products[:, 0]))
    ids.copy_(best)
    keys = sorting_keys(best, into)
    order = torch.sort(keys, stable=True).indices
    sources.copy_(order // top_k)
    places.view(-1).scatter_(0, order, torch.arange(order.shape[0], dtype=places.dtype, device=places.device))
    below = keys[:, None] < torch.arange(starts.shape[0], device=keys.device)
    starts.copy_(below.sum(0))


def _highest(values: Tensor, count: int) -> Tensor:
    """Indices of the highest values of each row, of equal ones the lower."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]


def _choices(scores: Tensor, scoring: Scoring) -> Tensor:
    """What experts are chosen by: corrected scores, -inf in groups that are not kept."""
    if scoring.correction is not None:
        scores = scores + scoring.correction
    if scoring.kept_groups == scoring.groups:
        return scores
    in_groups = scores.unflatten(-1, (scoring.groups, -1))
    kept = _highest(in_groups.topk(2, -1).values.sum(-1), scoring.kept_groups)
    is_shut = torch.ones_like(in_groups[..., 0], dtype=torch.bool).scatter_(1, kept, False)
    return in_groups.masked_fill(is_shut[..., None], -torch.inf).flatten(1)


def add_expert_bias(bias: Tensor, picks: Picks, out: Tensor) -> None:
    places = torch.arange(out.shape[0], dtype=picks.starts.dtype, device=out.device)
    experts = torch.searchsorted(picks.starts, places, right=True) - 1 - picks.first
    count = bias.shape[0] if picks.held is None else picks.held.shape[0]
    is_own = (experts >= 0) & (experts < count)
    own = experts.clamp(0, count - 1)
    added = bias[own if picks.held is None else picks.held[own]]
    out.copy_(torch.where(is_own[:, None], out + added, out))


def add_sinks(sinks: Tensor, into: Partial) -> None:
    into.out.mul_(torch.sigmoid(into.lse - sinks)[..., None])


def sigmoid_mul(gate: Tensor, out: Tensor) -> None:
    out.mul_(torch.sigmoid(gate))


def _product(x: Tensor, router: Tensor) -> Tensor:
    """x router^T rounded to float32 once.

    In float64, because whether products of float32 are TF32 is a setting of the whole process, which other threads
    read, and which raises where the process has made it by torch's other interface. So a row's products are nearly
    always the same bits whatever rows stand beside it, too. A router is small.
    """
    if x.shape[0] == 1:  # without a copy of the router
        return (x.double()[:, None, :] * router).sum(-1).float()
    return (x.double() @ router.double().T).float()


def combine(near: Tensor, far: Tensor, border: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> None:
    for pick in range(places.shape[1]):
        place = places[:, pick].long()
        output = torch.where((place < border)[:, None], near[place], far[place])
        out.addcmul_(weights[:, pick, None], output)


def scale_rows(factors: Tensor, out: Tensor) -> None:
    out.mul_(factors)


def norm_heads(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
    kv_heads, q_width, k_width = qkv.shape[1], q_norm.shape[0] // qkv.shape[1], k_norm.shape[0] // qkv.shape[1]
    parts = (qkv[:, :, :q_width], q_norm), (qkv[:, :, q_width : q_width + k_width], k_norm)
    for part, weight in parts:
        inverse = torch.rsqrt(part.square().mean((1, 2), keepdim=True) + eps)
        part.copy_(part * inverse * weight.view(kv_heads, -1))
