"""delta_step in Triton against the rule in float64, the reference and the CPU kernel; nothing that its programs share."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.contract import DeltaStates
from tests.support.kernels.cpu_oracles import kernels, nmse
from tests.support.kernels.delta_cases import (
    EXACT,
    PUBLISHED,
    SHAPES,
    Case,
    Shape,
    check_delta_step,
    check_drafts,
    drawn,
    oracle,
    stepped,
)

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels import reference
from gpu_kernels.small import delta_step as module
from gpu_kernels.small.delta_step import delta_step

SMALL = Shape(2, 4, 24, 40, 4, True)
OTHERS = (PUBLISHED._replace(key_heads=2), SMALL, SMALL._replace(is_tiled=False, per_key=1))


@pytest.mark.parametrize("shape", (*SHAPES[1:], *OTHERS))
def test_rows_are_the_rule(device, shape):
    check_delta_step(delta_step, device, shape)


@pytest.mark.parametrize("tile", [64, 512])
def test_a_state_that_is_taken_some_columns_at_a_time(device, monkeypatch, tile):
    monkeypatch.setattr(module, "TILE", tile)
    module._shape.cache_clear()
    check_delta_step(delta_step, device, SMALL)
    module._shape.cache_clear()


@pytest.mark.parametrize("ids", [[1], [3, 1, 0, 2], [1, 1, 1, 1, 1]])
def test_rows_are_those_of_the_reference_and_of_the_cpu(device, ids):
    case = drawn(SMALL, ids)
    found = stepped(delta_step, SMALL, case, device)
    for other in (reference.delta_step, kernels().delta_step):
        for actual, expected in zip(found, stepped(other, SMALL, case), strict=True):
            assert nmse(actual, expected) <= 1e-12


def test_bits_depend_neither_on_what_stands_beside_nor_on_where_taps_lie(device):
    case = drawn(SMALL, [2, 0, 1])
    out, states = stepped(delta_step, SMALL, case, device)
    again, states_again = stepped(delta_step, SMALL, case, device, by_feature=True)
    one = Case(case.projected[1:2], case.gates[1:2], case.rule, case.states, case.ids[1:2])
    row, state = stepped(delta_step, SMALL, one, device)

    assert torch.equal(out, again) and torch.equal(states, states_again)
    assert torch.equal(out[1], row[0]) and torch.equal(states[0], state[0])


@pytest.mark.usefixtures("only_interpreted")
def test_programs_in_any_order_are_the_same_bits(monkeypatch):
    """Planted into the interpreter: the last program first. What one writes no other one reads."""
    from triton.runtime.interpreter import interpreter_builder

    case = drawn(SMALL, [2, 0, 2, 1, 0])
    forwards, place = stepped(delta_step, SMALL, case), interpreter_builder.set_grid_idx
    last = SMALL.key_heads - 1, len(case.ids) - 1
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: place(last[0] - x, last[1] - y, z))
    backwards = stepped(delta_step, SMALL, case)

    assert all(map(torch.equal, forwards, backwards))


def test_tokens_at_once_are_tokens_one_by_one(device):
    case = drawn(SMALL, [1] * 4)
    out, states = stepped(delta_step, SMALL, case, device)
    kept, rows = case.states, []
    for row in range(4):
        one = Case(case.projected[row : row + 1], case.gates[row : row + 1], case.rule, kept, case.ids[:1])
        own, kept = stepped(delta_step, SMALL, one, device)
        rows.append(own[0])

    assert torch.equal(torch.stack(rows), out) and torch.equal(kept, states)


@pytest.mark.parametrize("shape", (SHAPES[1], SMALL))
def test_drafts_leave_states_as_they_are(device, shape):
    check_drafts(delta_step, shape, device)


@pytest.mark.parametrize("gate", [-200.0, -30.0, -6.0, 0.0, 30.0, 200.0])
def test_gates_of_any_size(device, gate):
    """Softplus and sigmoid neither overflow nor lose what is left of them."""
    case = drawn(SMALL, [0])
    case.gates.fill_(gate)
    case = case._replace(rule=case.rule._replace(rates=torch.full_like(case.rule.rates, -1e-3)))
    found, expected = stepped(delta_step, SMALL, case, device), oracle(SMALL, case)

    assert all(nmse(*pair) <= EXACT for pair in zip(found, expected, strict=True))


@pytest.mark.usefixtures("only_interpreted")
@pytest.mark.parametrize("rate,gate", [(-16.0, -9.0), (-1.0, -12.0), (-2.0, 0.5), (-0.3, 3.0), (-1.0, -60.0)])
def test_decays_have_all_digits(rate, gate):
    """One that is off by 1e-6 would be off by 1e-3 where a thousand of them are multiplied."""
    case = drawn(Shape(1, 1, 1, 1, 2), [0])
    case.projected.zero_(), case.states.fill_(1.0), case.gates.fill_(gate)
    rule = case.rule._replace(rates=torch.full((1,), rate), dt_bias=torch.zeros(1), conv=torch.zeros(2, 3))
    _, states = stepped(delta_step, Shape(1, 1, 1, 1, 2), case._replace(rule=rule))
    expected = torch.exp(rate * torch.nn.functional.softplus(torch.tensor(gate).double()))

    assert abs(states[0, 0].double() / expected - 1) <= 4e-7


def test_no_rows_are_nothing(device):
    case = drawn(SMALL, [])._replace(ids=torch.zeros(0, dtype=torch.int64))
    _, states = stepped(delta_step, SMALL, case, device)

    assert torch.equal(states, case.states)


WRONG = {
    "rates has 5 value heads for 2 key heads": lambda case: case._replace(
        rule=case.rule._replace(rates=torch.zeros(5), dt_bias=torch.zeros(5))),
    "conv has 417 features": lambda case: case._replace(rule=case.rule._replace(conv=torch.zeros(4, 417))),
    "conv has 1 taps": lambda case: case._replace(rule=case.rule._replace(conv=case.rule.conv[:1])),
    "projected has 360 features a key head; it must have 368": lambda case: case._replace(
        projected=case.projected[..., :360]),
    r"gates is \(2, 15\)": lambda case: case._replace(gates=case.gates[:, :15]),
    "each must have 8928 numbers": lambda case: case._replace(states=case.states[:, :-1]),
    r"ids is torch.int32": lambda case: case._replace(ids=case.ids.int()),
    "rows have gaps": lambda case: case._replace(gates=case.gates.T.contiguous().T),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_wrong_shapes_are_named(device, words):
    case = WRONG[words](drawn(SMALL, [0, 1]))
    tensors = DeltaStates(case.states.to(device)), case.ids.to(device)
    out = torch.zeros(2, SMALL.value_heads * SMALL.value_dim, device=device)

    with pytest.raises(AssertionError, match=words):
        delta_step(case.projected.to(device), case.gates.to(device), case.rule, *tensors, out)
