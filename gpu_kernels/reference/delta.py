"""A token of gated DeltaNet between its projections, one row after the other, and the sizes that a call is of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from cpu_kernels.contract import L2_EPS, DeltaRule, DeltaStates


class DeltaSizes(NamedTuple):
    """Heads and widths of a layer, and how many inputs a step of its convolution reads."""

    key_heads: int
    per_key: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def value_heads(self) -> int:
        """Value heads of all key heads."""
        return self.key_heads * self.per_key

    @property
    def features(self) -> int:
        """Features that the convolution sees."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def matrices(self) -> int:
        """Numbers of a state in front of the kept inputs."""
        return self.value_heads * self.key_dim * self.value_dim


def delta_sizes(
    projected: Tensor, gates: Tensor, rule: DeltaRule, states: DeltaStates, ids: Tensor, out: Tensor
) -> DeltaSizes:
    """What the arguments of `delta_step` say that the layer is; AssertionError where they contradict each other."""
    (rows, key_heads, unit), (taps, features) = projected.shape, rule.conv.shape
    value_heads, value_dim = rule.rates.shape[0], rule.norm.shape[0]
    assert key_heads and value_heads % key_heads == 0, f"rates has {value_heads} value heads for {key_heads} key heads"
    key_dim, left = divmod(features - value_heads * value_dim, 2 * key_heads)
    assert left == 0 < key_dim, f"conv has {features} features: not two of each key head beside {value_heads} values"
    assert taps >= 2, f"conv has {taps} taps; it must have at least 2"
    sizes = DeltaSizes(key_heads, value_heads // key_heads, key_dim, value_dim, taps)
    width = 2 * (key_dim + sizes.per_key * value_dim)
    assert unit >= width, f"projected has {unit} features a key head; it must have {width}"
    assert gates.shape[0] == rows and gates.shape[1] >= 2 * value_heads, f"gates is {tuple(gates.shape)}"
    size = sizes.matrices + (taps - 1) * features
    for each in states:
        assert each is None or each.shape[1:] == (size,), (
            f"states is {tuple(each.shape)}; each must have {size} numbers"
        )
    assert ids.shape == (rows,) and ids.dtype == torch.int64, f"ids is {ids.dtype} {tuple(ids.shape)}"
    assert out.shape == (rows, value_heads * value_dim), f"out is {tuple(out.shape)}"
    assert rule.dt_bias.shape == rule.rates.shape, f"dt_bias is {tuple(rule.dt_bias.shape)}"
    return sizes


def delta_step(
    projected: Tensor, gates: Tensor, rule: DeltaRule, states: DeltaStates, ids: Tensor, out: Tensor
) -> None:
    sizes, before = delta_sizes(projected, gates, rule, states, ids, out), None
    for row, place in enumerate(ids.tolist()):
        state = states.values[place] if place >= 0 else states.spare[~place]
        if place < 0 and place != before:
            state.copy_(states.values[~place])
        out[row], before = _token(sizes, projected[row], gates[row], rule, state), place


def _token(sizes: DeltaSizes, units: Tensor, gates: Tensor, rule: DeltaRule, state: Tensor) -> Tensor:
    """The output of one row; its sequence's state is written."""
    key_heads, per_key, key_dim, value_dim, taps = sizes
    matrices = state[: sizes.matrices].view(-1, key_dim, value_dim)
    kept = state[sizes.matrices :].view(taps - 1, -1)
    widths = [key_dim, key_dim, per_key * value_dim, per_key * value_dim]
    *qkv, z = (part.flatten() for part in units[:, : sum(widths)].split(widths, 1))
    inputs = torch.cat([kept, torch.cat(qkv)[None]])
    mixed = silu((inputs * rule.conv).sum(0))
    kept.copy_(inputs[1:])
    q, k, v = mixed.split([key_heads * key_dim, key_heads * key_dim, sizes.value_heads * value_dim])
    q, k = (_unit_length(part.view(key_heads, -1)).repeat_interleave(per_key, 0) for part in (q, k))
    b, a = gates[: sizes.value_heads], gates[sizes.value_heads : 2 * sizes.value_heads]
    matrices.mul_(torch.exp(rule.rates * softplus(a + rule.dt_bias))[:, None, None])
    change = b.sigmoid()[:, None] * (v.view(-1, value_dim) - (k[:, :, None] * matrices).sum(1))
    matrices.add_(k[:, :, None] * change[:, None])
    y = (q[:, :, None] * matrices).sum(1) * key_dim**-0.5
    normed = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + rule.eps) * rule.norm * silu(z.view(-1, value_dim))
    by_key = normed.view(key_heads, per_key, value_dim)
    return (by_key.transpose(0, 1) if rule.is_tiled else by_key).flatten()


def _unit_length(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
