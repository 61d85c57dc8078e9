"""delta_step against the rule in float64, head by head; its bits, its memory, and errors that the comparison must see."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import silu, softplus

from cpu_kernels.contract import DeltaRule
from tests.support.cpu_oracles import ISAS, guarded, kernels, nmse, only_inside_written

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
    def value_heads(self):
        return self.key_heads * self.per_key

    @property
    def features(self):
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_size(self):
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


def drawn(shape, ids, padding=3):
    """Decays from nearly none to nearly all, states that are not zero."""
    generator = torch.Generator().manual_seed(shape.key_dim)
    normal = partial(torch.randn, generator=generator)
    rows, heads = len(ids), shape.value_heads
    rates, bias = -2 * normal(heads).exp(), normal(heads)
    rule = DeltaRule(normal(shape.taps, shape.features), rates, bias, normal(shape.value_dim), 1e-6, shape.is_tiled)
    width = 2 * (shape.key_dim + shape.per_key * shape.value_dim) + padding
    units, gates = normal(rows, shape.key_heads, width), 2 * normal(rows, 2 * heads + padding)
    return Case(units, gates, rule, normal(4, shape.state_size), torch.tensor(ids))


def oracle(shape, case, decay_last=False, forgets=False, turned=False, shares_keys=True, scale=True, tiled=None):
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
        q, k = (unit(part.view(shape.key_heads, -1)) for part in (q, k))
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


def unit(x):
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def stepped(shape, case, isa=None, threads=2):
    """(out, states, the memory around out) of the kernel."""
    states = case.states.clone()
    out, memory = guarded(len(case.ids), shape.value_heads * shape.value_dim)
    kernels(isa, threads).delta_step(case.projected, case.gates, case.rule, states, case.ids, out)
    return out, states, memory


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_rule(shape, isa):
    """Two rows of one sequence among them, in their order, and a state that nobody reads stays."""
    case = drawn(shape, [2, 0, 2])
    out, states, memory = stepped(shape, case, isa)
    expected, after = oracle(shape, case)

    assert only_inside_written(memory)
    assert nmse(out, expected) <= EXACT and nmse(states, after) <= EXACT
    assert torch.equal(states[[1, 3]], case.states[[1, 3]])


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_depend_neither_on_threads_nor_on_what_stands_beside(shape):
    case = drawn(shape, [2, 0, 1])
    out, states, _ = stepped(shape, case)
    alone, state_alone, _ = stepped(shape, case, threads=1)
    one = Case(case.projected[1:2], case.gates[1:2], case.rule, case.states, case.ids[1:2])
    row, state, _ = stepped(shape, one, threads=3)

    assert torch.equal(out, alone) and torch.equal(states, state_alone)
    assert torch.equal(out[1], row[0]) and torch.equal(states[0], state[0])


def test_tokens_at_once_are_tokens_one_by_one():
    shape = SHAPES[2]
    case = drawn(shape, [1] * 6)
    out, states, _ = stepped(shape, case)
    kept, rows = case.states, []
    for row in range(6):
        one = Case(case.projected[row : row + 1], case.gates[row : row + 1], case.rule, kept, case.ids[:1])
        own, kept, _ = stepped(shape, one)
        rows.append(own[0])

    assert torch.equal(torch.stack(rows), out) and torch.equal(kept, states)


def test_a_recorded_step_reads_ids_and_states_when_it_runs():
    shape = SHAPES[1]
    case, ops = drawn(shape, [3, 1]), kernels()
    states, ids = case.states.clone(), torch.tensor([0, 0])
    out = torch.zeros(2, shape.value_heads * shape.value_dim)
    program = ops.record(lambda: ops.delta_step(case.projected, case.gates, case.rule, states, ids, out))
    assert torch.equal(states, case.states)
    ids.copy_(case.ids)
    program.run()
    expected, after, _ = stepped(shape, case)

    assert torch.equal(out, expected) and torch.equal(states, after)


PLANTED = {
    "the state decays behind the read": {"decay_last": True},
    "inputs are not kept": {"forgets": True},
    "the oldest input has the newest tap": {"turned": True},
    "another key head's values": {"shares_keys": False},
    "queries not scaled": {"scale": False},
    "heads of the output in the other order": {"tiled": True},
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_not_within_the_bound(planted):
    """Each in the rule that the kernel is compared with; the norm of the output hides none of them."""
    shape = SHAPES[0]._replace(key_heads=3, key_dim=16, value_dim=32)
    case = drawn(shape, [2, 0, 2])
    case = case._replace(rule=case.rule._replace(eps=1e-2))
    out, states, _ = stepped(shape, case)
    expected, after = oracle(shape, case)
    wrong, wrong_after = oracle(shape, case, **PLANTED[planted])

    assert nmse(out, expected) <= EXACT and nmse(states, after) <= EXACT
    assert max(nmse(out, wrong), nmse(states, wrong_after)) > 1e6 * EXACT


@pytest.mark.parametrize("gate", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_gates_of_any_size(gate):
    """Softplus and sigmoid neither overflow nor lose what is left of them."""
    shape = SHAPES[3]
    case = drawn(shape, [0])
    case.gates.fill_(gate)
    case = case._replace(rule=case.rule._replace(rates=torch.full_like(case.rule.rates, -1e-3)))
    out, states, _ = stepped(shape, case)
    expected, after = oracle(shape, case)

    assert nmse(out, expected) <= EXACT and nmse(states, after) <= EXACT


@pytest.mark.parametrize("ids", [[0, 4], [-1, 0]])
def test_a_sequence_without_a_state_is_named(ids):
    case = drawn(SHAPES[1], ids)
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.3"):
        stepped(SHAPES[1], case)


def test_no_rows_are_nothing():
    case = drawn(SHAPES[1], [])
    case = case._replace(ids=torch.zeros(0, dtype=torch.int64))
    _, states, _ = stepped(SHAPES[1], case)

    assert torch.equal(states, case.states)


WRONG = {
    r"rates has 5 value heads": lambda case: case._replace(
        rule=case.rule._replace(rates=torch.zeros(5), dt_bias=torch.zeros(5))),
    r"conv has 189 features": lambda case: case._replace(rule=case.rule._replace(conv=torch.zeros(2, 189))),
    r"conv has 1 taps": lambda case: case._replace(rule=case.rule._replace(conv=case.rule.conv[:1])),
    r"projected has 150 features a key head; it must have 154": lambda case: case._replace(
        projected=case.projected[..., :150]),
    r"gates has 11 columns": lambda case: case._replace(gates=case.gates[:, :11]),
    r"states has shape": lambda case: case._replace(states=case.states[:, :-1]),
    r"ids is torch.int32": lambda case: case._replace(ids=case.ids.int()),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_wrong_shapes_are_refused(words):
    with pytest.raises(ValueError, match=words):
        stepped(SHAPES[1], WRONG[words](drawn(SHAPES[1], [0, 1])))
