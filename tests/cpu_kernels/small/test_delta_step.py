"""delta_step against the rule in float64, head by head; its bits, its memory, and errors that the comparison must see."""

import pytest
import torch

from cpu_kernels.contract import DeltaStates
from gpu_kernels import reference
from tests.support.kernels.cpu_oracles import ISAS, guarded, kernels, nmse, only_inside_written
from tests.support.kernels.delta_cases import EXACT, SHAPES, Case, check_drafts, drawn, oracle


def stepped(shape, case, isa=None, threads=2):
    """(out, states, the memory around out) of the kernel."""
    states = case.states.clone()
    out, memory = guarded(len(case.ids), shape.value_heads * shape.value_dim)
    kernels(isa, threads).delta_step(case.projected, case.gates, case.rule, DeltaStates(states), case.ids, out)
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_leave_states_as_they_are(shape, isa):
    check_drafts(kernels(isa, 2).delta_step, shape)


def test_drafts_of_the_reference():
    check_drafts(reference.delta_step, SHAPES[1])


def test_a_recorded_step_reads_ids_and_states_when_it_runs():
    shape = SHAPES[1]
    case, ops = drawn(shape, [3, 1]), kernels()
    states, ids = case.states.clone(), torch.tensor([0, 0])
    out = torch.zeros(2, shape.value_heads * shape.value_dim)
    program = ops.record(lambda: ops.delta_step(case.projected, case.gates, case.rule, DeltaStates(states), ids, out))
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
    """A draft's too, where no spare state is given."""
    case = drawn(SHAPES[1], ids)
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.3, the rows of states$"):
        stepped(SHAPES[1], case)


def test_a_draft_without_a_state_is_named():
    case = drawn(SHAPES[1], [0, ~4])
    with pytest.raises(ValueError, match=r"~id of a draft with an id in 0\.\.2"):
        kernels().delta_step(
            *case._replace(states=DeltaStates(case.states, case.states[:3].clone())), torch.zeros(2, 120)
        )


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
