"""The gated delta rule over the tokens of sequences, in torch, where the residual stream lives.

Per value head, of a token with query q, key k, value v, decay g <= 0 and strength b:

    S = exp(g) S + k u^T,  u = b (v - (exp(g) S)^T k);  out = S^T q

A chunk of tokens at once, with G the running sum of g and D_ij = exp(G_i - G_j) for j <= i:

    (1 + strictly lower of b_i (k_i . k_j) D_ij) U = b V - b exp(G) (K S)
    out = exp(G) (Q S) + (lower of (q_i . k_j) D_ij) U;   S = exp(G_end) S + (exp(G_end - G) K)^T U

which is the same in exact arithmetic. Gated Delta Networks (arXiv 2412.06464), DeltaNet's UT transform (2406.06484).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cpu_kernels.contract import L2_EPS

CHUNK_TOKENS = 64


class DeltaTokens(NamedTuple):
    """Tokens of some sequences of one length, float32: q, k [sequences, heads, tokens, key_dim]; v [.., value_dim];
    decay, strength [sequences, heads, tokens]."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    strength: Tensor


def unit_length(x: Tensor) -> Tensor:
    """Vectors over the last dimension, of length one."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def gated_delta(tokens: DeltaTokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """(out like v, the state behind the tokens) from the state in front of them, [sequences, heads, key_dim,
    value_dim]."""
    outs = []
    for start in range(0, tokens.q.shape[2], CHUNK_TOKENS):
        chunk = DeltaTokens(*(part[:, :, start : start + CHUNK_TOKENS] for part in tokens))
        out, state = _chunk(chunk, state)
        outs.append(out)
    return torch.cat(outs, 2), state


def _chunk(tokens: DeltaTokens, state: Tensor) -> tuple[Tensor, Tensor]:
    total = tokens.decay.cumsum(-1)
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    since = total.exp()[..., None]  # of what was there before
    strength = tokens.strength[..., None]
    system = (strength * (tokens.k @ tokens.k.mT) * between).tril(-1)
    right = strength * (tokens.v - since * (tokens.k @ state))
    updates = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    out = since * (tokens.q @ state) + ((tokens.q @ tokens.k.mT) * between) @ updates
    until = (total[..., -1:] - total).exp()[..., None]
    return out, since[..., -1:, :] * state + (until * tokens.k).mT @ updates


def short_convolution(x: Tensor, before: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """(out like x, the inputs that the next call begins with) of a causal convolution over time, feature by feature.

    x: [sequences, tokens, features]. before: [sequences, taps - 1, features]. kernel: [features, taps], the newest
    input's last.
    """
    tokens, taps = x.shape[1], kernel.shape[1]
    inputs = torch.cat([before, x], 1)
    out = torch.zeros_like(x)
    for tap in range(taps):
        out += inputs[:, tap : tap + tokens] * kernel[:, tap]
    return out, inputs[:, tokens:]
