"""Routing and what surrounds experts on the GPU lane, in torch's own kernels: small, of fixed shapes, read by no host.

    route       ids = the k largest of x router^T, of equal ones the lower id;  w = softmax(x router^T) there
    combine     y += sum_j w_j p_j, experts ascending
    scale_rows  y[r] = f[r] y[r]
    norm_heads  q = q / sqrt(mean over all heads of q^2 + eps) * weight, k likewise

The products of a router have float32's digits: with TF32, or rounded to bf16, near scores would change places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpu_kernels.contract import Routes


def route(x: Tensor, router: Tensor, gated: bool, normalise: bool, into: Routes) -> None:
    ids, places, sources, starts, weights = into
    experts, top_k = starts.shape[0] - 1, ids.shape[1]
    logits = _product(x, router)
    best = torch.sort(logits[:, :experts], dim=-1, descending=True, stable=True).indices[:, :top_k].sort(-1).values
    chosen = torch.softmax(logits[:, :experts], dim=-1).gather(1, best)
    weights[:, :top_k].copy_(chosen / chosen.sum(-1, keepdim=True) if normalise else chosen)
    weights[:, top_k].copy_(torch.sigmoid(logits[:, experts]) if gated else torch.ones_like(logits[:, 0]))
    ids.copy_(best)
    picks = best.flatten()
    order = torch.sort(picks, stable=True).indices
    sources.copy_(order // top_k)
    places.view(-1).scatter_(0, order, torch.arange(order.shape[0], dtype=places.dtype, device=places.device))
    below = picks[:, None] < torch.arange(experts + 1, device=picks.device)
    starts.copy_(below.sum(0))


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
