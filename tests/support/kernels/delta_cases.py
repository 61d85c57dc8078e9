"""Layers of gated DeltaNet as `delta_step` is given them, the rule in float64, head by head, and a check of any op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import silu, softplus

from cpu_kernels.contract import DeltaRule, DeltaStates
from tests.support.kernels.cpu_oracles import guarded, nmse, only_inside_written

EXACT = 1e-11  # NMSE of float32 arithmetic


class Shape(NamedTuple):
    """Heads and widths of a layer."""

    key_heads: int
    per_key: int
    key_dim: int
    value_dim: int
    taps: int
    is_tiled: bool = False

    @property
    def value_heads(self) -> int:
        """Of all key heads."""
        return self.key_heads * self.per_key

    @property
    def features(self) -> int:
        """Of the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_size(self) -> int:
        """Numbers of a sequence."""
        return self.value_heads * self.key_dim * self.value_dim + (self.taps - 1) * self.features


PUBLISHED = Shape(16, 2, 128, 128, 4)
SHAPES = (PUBLISHED, Shape(2, 3, 17, 20, 2, True), Shape(3, 1, 16, 112, 5), Shape(1, 2, 5, 70, 3, True))


class Case(NamedTuple):
    """What a call is given, but for where it writes."""

    projected: torch.Tensor
    gates: torch.Tensor
    rule: DeltaRule
    states: torch.Tensor
    ids: torch.Tensor


def drawn(shape: Shape, ids: Sequence[int], padding: int = 3) -> Case:
    """Decays from nearly none to nearly all, states that are not zero."""
    generator = torch.Generator().manual_seed(shape.key_dim)
    normal = partial(torch.randn, generator=generator)
    rows, heads = len(ids), shape.value_heads
    rates, bias = -2 * normal(heads).exp(), normal(heads)
    rule = DeltaRule(normal(shape.taps, shape.features), rates, bias, normal(shape.value_dim), 1e-6, shape.is_tiled)
    width = 2 * (shape.key_dim + shape.per_key * shape.value_dim) + padding
    units, gates = normal(rows, shape.key_heads, width), 2 * normal(rows, 2 * heads + padding)
    return Case(units, gates, rule, normal(4, shape.state_size), torch.tensor(ids))


def oracle(
    shape: Shape,
    case: Case,
    decay_last: bool = False,
    forgets: bool = False,
    turned: bool = False,
    shares_keys: bool = True,
    scale: bool = True,
    tiled: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, states) as the contract has it, in float64; the switches plant errors."""
    states, outs = case.states.double(), []
    for units, gates, sequence in zip(case.projected.double(), case.gates.double(), case.ids.tolist(), strict=True):
        matrices = states[sequence, : shape.value_heads * shape.key_dim * shape.value_dim]
        matrices = matrices.view(shape.value_heads, shape.key_dim, shape.value_dim)
        kept = states[sequence, matrices.numel() :].view(shape.taps - 1, shape.features)
        values = shape.per_key * shape.value_dim
        widths = [shape.key_dim, shape.key_dim, values, values]
        *qkv, z = (part.flatten() for part in units[:, : sum(widths)].split(widths, 1))
        inputs = torch.cat([kept, torch.cat(qkv)[None]])
        taps = case.rule.conv.double().flip(0) if turned else case.rule.conv.double()
        mixed = silu((inputs * taps).sum(0))
        kept.copy_(torch.zeros_like(kept) if forgets else inputs[1:].clone())
        keys = shape.key_heads * shape.key_dim
        q, k, v = mixed.split([keys, keys, shape.value_heads * shape.value_dim])
        q, k = (_unit(part.view(shape.key_heads, -1)) for part in (q, k))
        q = q * shape.key_dim**-0.5 if scale else q
        out = torch.zeros(shape.value_heads, shape.value_dim, dtype=torch.float64)
        for head in range(shape.value_heads):
            key = head // shape.per_key if shares_keys else head % shape.key_heads
            a, b = gates[shape.value_heads + head], gates[head]
            decay = torch.exp(case.rule.rates[head].double() * softplus(a + case.rule.dt_bias[head]))
            own, value = matrices[head], v.view(shape.value_heads, -1)[head]
            recalled = k[key] @ own * (1.0 if decay_last else decay)
            own.copy_(decay * own + k[key][:, None] * (b.sigmoid() * (value - recalled)))
            y = q[key] @ own
            normed = y / torch.sqrt(y.square().mean() + case.rule.eps) * case.rule.norm
            is_tiled = case.rule.is_tiled if tiled is None else tiled
            place = head % shape.per_key * shape.key_heads + key if is_tiled else head
            out[place] = normed * silu(z.view(shape.value_heads, -1)[head])
        outs.append(out.flatten())
    return torch.stack(outs), states


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def stepped(
    op: Callable[..., None], shape: Shape, case: Case, device: str = "cpu", by_feature: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, states) of an op, on the CPU; asserts that it wrote what it had to and no more.

    by_feature: the convolution's taps lie side by side in memory, as in a checkpoint.
    """
    rows, features = len(case.ids), shape.value_heads * shape.value_dim
    out, around = (tensor.to(device) for tensor in guarded(rows, features))
    states, around_states = (tensor.to(device) for tensor in guarded(*case.states.shape))
    out, states = around[:, 16 : 16 + features], around_states[:, 16 : 16 + shape.state_size]
    states.copy_(case.states)
    conv = case.rule.conv.T.contiguous().T if by_feature else case.rule.conv
    rule = _on(case.rule, device)._replace(conv=conv.to(device))
    op(case.projected.to(device), case.gates.to(device), rule, DeltaStates(states), case.ids.to(device), out)

    assert only_inside_written(around.cpu()) and only_inside_written(around_states.cpu())
    return out.cpu(), states.cpu()


def check_delta_step(op: Callable[..., None], device: str, shape: Shape, ids: Sequence[int] = (2, 0, 2)) -> None:
    """delta_step of rows whose ids are in no order, two of them of one sequence; states that nobody reads stay."""
    case = drawn(shape, ids)
    case = case._replace(rule=case.rule._replace(eps=1e-2))
    expected, after = oracle(shape, case)
    out, states = stepped(op, shape, case, device, by_feature=True)
    idle = [each for each in range(len(states)) if each not in ids]

    assert nmse(out, expected) <= EXACT and nmse(states, after) <= EXACT
    assert torch.equal(states[idle], case.states[idle])


def check_drafts(op: Callable[..., None], shape: Shape, device: str = "cpu") -> None:
    """A row and drafts behind it, of two sequences and of one that has none: bits of the same rows without drafts among
    them, states as the rows before the drafts leave them; and drafts that come again as rows leave what they left."""
    drafted, plain = drawn(shape, [2, ~2, ~2, ~2, 0, 1, ~1, ~1]), drawn(shape, [2, 2, 2, 2, 0, 1, 1, 1])
    states, spare = drafted.states.clone().to(device), torch.full_like(drafted.states, torch.nan).to(device)
    out, after = stepped(op, shape, plain, device)
    first = torch.tensor([0, 4, 5])
    _, kept = stepped(op, shape, _rows(plain, first), device)
    found, rule = torch.zeros(out.shape, device=device), _on(drafted.rule, device)
    given = drafted.projected.to(device), drafted.gates.to(device)
    op(*given, rule, DeltaStates(states, spare), drafted.ids.to(device), found)

    assert torch.equal(found.cpu(), out) and torch.equal(states.cpu(), kept)
    assert torch.equal(spare.cpu()[[1, 2]], after[[1, 2]]) and spare[[0, 3]].isnan().all()
    for rows in (slice(1, 3), slice(6, 8)):
        again = torch.zeros(2, out.shape[1], device=device)
        op(*(part[rows] for part in given), rule, DeltaStates(states), plain.ids[rows].to(device), again)
        assert torch.equal(again.cpu(), out[rows])
    assert torch.equal(states.cpu()[1], after[1]) and not torch.equal(states.cpu()[2], after[2])


def _on(rule: DeltaRule, device: str) -> DeltaRule:
    return DeltaRule(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in rule))


def _rows(case: Case, rows: torch.Tensor) -> Case:
    return case._replace(projected=case.projected[rows], gates=case.gates[rows], ids=case.ids[rows])
