"""Prompts that begin alike, of models whose layers keep a state of fixed size: where it was kept they go on from."""

from itertools import pairwise

import pytest
import torch

from hetero_attn import LLM, Policy, SamplingParams
from hetero_attn.errors import HeteroError
from hetero_attn.models.delta import runs_of
from hetero_attn.ops import step as steps
from placement.solve.request import MOST_PREFIX_STATES
from tests.support.models.moe import make_moe
from tests.support.models.runtime import nmse

PAGE = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
DRAWN = torch.randint(307, (200,), generator=torch.Generator().manual_seed(4)).tolist()
SYSTEM, ASKED = DRAWN[:41], DRAWN[60:83]
LITTLE_MEMORY = Policy(prefill_chunk=16, host_memory="3 MiB")  # in which no more states are kept than two turns have
EXACT = 1e-9  # of sums that run over all tokens, in float32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_moe(tmp_path_factory.mktemp("states"), "qwen3_next")


def load(path, device="cpu", **options):
    budget = {} if device == "cpu" else {"gpu_memory": "1 MiB"}
    sizes = {"max_context": 160, "max_batch": 2, "page_size": PAGE, "policy": Policy(prefill_chunk=16)}
    return LLM(path, device=device, dtype="fp32", num_threads=2, progress=False, **(budget | sizes | options))


def reused(output):
    return output.metrics.cached_prompt_tokens


def continued(llm, prompt, following=()):
    """How many tokens of a prompt a sequence takes over from a shorter one, and the logits of the prompt's last token
    and of those that follow."""
    llm.generate([prompt[:-2]], GREEDY)
    engine = llm.engine
    sequence = engine.kv_cache.open(100)
    begun = engine.kv_cache.reuse(sequence, prompt[:-1])
    found = [engine.prefill(sequence, prompt[begun:])]
    found += [engine.decode_step([sequence], [token_id])[0] for token_id in following]
    engine.kv_cache.close(sequence)
    return begun, found


def turns():
    """Prompts of a conversation, as token ids: each goes on behind all but the last tokens of the one before."""
    prompts = [[*SYSTEM, *ASKED]]
    for first in (90, 120, 150):
        prompts.append([*prompts[-1][:-3], *DRAWN[first : first + 19]])
    return prompts


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_turns_of_a_conversation_go_on_from_the_prompt_before(path, device):
    """Although what follows parts from a prompt's last tokens, as where a thought is left out."""
    with load(path, device, prefix_cache=False) as llm:
        expected = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in turns()]
    with load(path, device) as llm:
        outputs = [llm.generate([prompt], GREEDY)[0] for prompt in turns()]

    assert [output.token_ids for output in outputs] == expected
    for (before, after), output in zip(pairwise(turns()), outputs[1:], strict=True):
        alike = next(place for place, both in enumerate(zip(before, after, strict=False)) if both[0] != both[1])
        assert alike - 2 * PAGE < reused(output) <= alike
    assert reused(outputs[0]) == 0


def test_logits_behind_a_kept_state(path):
    """Of the same numbers as from the first token on: cuts at other places round otherwise, no more."""
    prompt = [*SYSTEM, *ASKED]
    with load(path) as llm:
        begun, found = continued(llm, prompt, DRAWN[100:104])
        expected = llm.logits([*prompt, *DRAWN[100:104]])[len(prompt) - 1 :]

    assert begun == 56
    assert nmse(torch.stack([each.flatten() for each in found]), expected) <= EXACT


def test_prompts_that_part_from_others_leave_a_state_where_they_part(path):
    """The second one finds none there, as nobody knew of the place; the third one does."""
    asked = [[*SYSTEM, *DRAWN[start : start + 30]] for start in (70, 110, 140)]
    with load(path) as llm:
        found = [reused(llm.generate([prompt], GREEDY)[0]) for prompt in asked]

    assert found == [0, 0, 40]


def test_of_two_at_once_the_second_waits_for_what_both_begin_with(path):
    asked = [[*SYSTEM, *DRAWN[start : start + 30]] for start in (70, 110)]
    with load(path, prefix_cache=False) as llm:
        expected = [output.token_ids for output in llm.generate(asked, GREEDY)]
    with load(path) as llm:
        outputs = llm.generate(asked, GREEDY)

    assert [output.token_ids for output in outputs] == expected
    assert [reused(output) for output in outputs] == [0, 40]


def test_more_prompts_than_places(path):
    """The states that were of use longest ago make room, and what comes again is computed anew, or not, but right."""
    generator = torch.Generator().manual_seed(9)
    prompts = [torch.randint(307, (40,), generator=generator).tolist() for _ in range(6)]
    with load(path, policy=LITTLE_MEMORY) as llm:
        first = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
        places = llm.plan.workload.prefix_states
        again = [llm.generate([prompt], GREEDY)[0] for prompt in reversed(prompts)]
        states = llm.engine.kv_cache.prefix_states

        assert len(states._kept) + len(states._free) == places == 6
    assert [output.token_ids for output in again] == [output.token_ids for output in reversed(first)]
    assert reused(again[0]) == 32 and reused(again[-1]) == 0


def talked(llm, count):
    """(prompt, output) of so many conversations that take turns and begin like no other."""
    talks = [[[place, *prompt] for prompt in turns()] for place in range(count)]
    return [(prompt, llm.generate([prompt], GREEDY)[0]) for turn in zip(*talks, strict=True) for prompt in turn]


def check_talks(path, count, **options):
    """Each goes on behind all but the last pages of what its prompt before has alike; returns the places for states."""
    with load(path, max_context=400, prefix_cache=False) as llm:
        expected = [output.token_ids for _, output in talked(llm, count)]
    with load(path, max_context=400, **options) as llm:
        found, places = talked(llm, count), llm.plan.workload.prefix_states

    assert [output.token_ids for _, output in found] == expected
    for before, (_, output) in zip([None] * count + [prompt for prompt, _ in found], found, strict=False):
        alike = 0 if before is None else len(before) - 3
        assert alike - 2 * PAGE < reused(output) <= alike
    return places


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_two_conversations_by_turns_each_go_on_from_their_own_prompt_before(path, device):
    """There were four places for one sequence, in which they pushed out each other's states."""
    assert check_talks(path, 2, device=device, max_batch=1, policy=LITTLE_MEMORY) == 5


def test_what_a_conversation_has_left_behind_goes_before_the_newest_of_another(path):
    """Of three that take turns in seven places, where the oldest always went first."""
    assert check_talks(path, 3, max_batch=3, policy=LITTLE_MEMORY) == 7


def test_more_states_are_kept_where_there_is_memory(path):
    """A share of what weights and cache would leave, though they were all in host memory."""
    assert check_talks(path, 3, max_batch=1) == MOST_PREFIX_STATES


def test_a_step_that_fails_keeps_nothing(path, monkeypatch):
    prompt = [*SYSTEM, *ASKED]
    with load(path) as llm:
        expected = llm.generate([prompt], GREEDY)[0].token_ids
        llm.engine.kv_cache.forget_prefixes()
        layers, failing = llm.engine.forward.layers, [True]

        def fails_in_the_fourth_chunk(step):
            layers(step)
            if failing and step.kept_states:
                failing.clear()
                raise HeteroError("planted")

        monkeypatch.setattr(llm.engine.forward, "layers", fails_in_the_fourth_chunk)
        with pytest.raises(HeteroError, match="planted"):
            llm.generate([prompt], GREEDY)
        found = llm.generate([prompt], GREEDY)[0].token_ids

    assert not failing and found == expected


def one_row_late(cache, work):
    for rows, place in kept_states(cache, work):
        yield rows + 1, place


kept_states = steps.kept_states


def test_planted_bug_a_state_of_one_token_more_is_caught(path, monkeypatch):
    monkeypatch.setattr(steps, "kept_states", one_row_late)
    prompt = [*SYSTEM, *ASKED]
    with load(path) as llm:
        begun, (found,) = continued(llm, prompt)
        expected = llm.logits(prompt)[-1]

    assert begun and nmse(found.flatten(), expected) > 100 * EXACT


def test_kept_states_are_in_the_plan(path):
    with load(path) as llm:
        workload, states = llm.plan.workload, llm.engine.kv_cache.prefix_states
        allocated = sum(memory.nbytes for memory in states._memory.values())

    assert llm.plan.memory.host["prefixes"] == workload.prefix_state_bytes == allocated > 0


def test_nothing_is_kept_where_nothing_is_looked_for(path):
    """The plan counted places that nobody could use."""
    prompt = [*SYSTEM, *ASKED]
    with load(path, prefix_cache=False) as llm:
        outputs = [llm.generate([prompt], GREEDY)[0] for _ in range(2)]
        allocated = sum(memory.nbytes for memory in llm.engine.kv_cache.prefix_states._memory.values())

    assert llm.plan.memory.host["prefixes"] == allocated == reused(outputs[1]) == 0


def test_layers_without_keys_and_values_alone(tmp_path):
    """No page leads to a state: the prompt is computed again. The tree asked the first pool for its page size."""
    prompt = [*SYSTEM, *ASKED]
    linear = make_moe(tmp_path, "qwen3_next", layer_types=["linear_attention"] * 3)
    with load(linear) as llm:
        outputs = [llm.generate([prompt], GREEDY)[0] for _ in range(2)]

    assert outputs[0].token_ids == outputs[1].token_ids
    assert llm.plan.memory.host["prefixes"] == reused(outputs[1]) == 0


def test_what_a_prompt_begins_with_stays_as_long_as_the_rest(path):
    """Where no state was kept it is computed a second time. The first pages were remembered, and went before their time:
    what was stored behind them was lost to the next turn."""
    first, second, other = ([*SYSTEM, *DRAWN[70:90]], [*SYSTEM, *DRAWN[100:123]], DRAWN[105:200])
    with load(path, max_batch=1) as llm:
        for prompt in (first, second, other):
            llm.generate([prompt], GREEDY)
        found = llm.generate([[*second, *DRAWN[50:60]]], GREEDY)[0]

    assert reused(found) == 56


def test_a_run_is_cut_where_its_state_is_kept():
    """Rows of one sequence on either side of a cut are never taken for tokens of two."""
    assert list(runs_of([2, 2, 2], [1, 2])) == [(slice(0, 1), 1), (slice(1, 2), 1), (slice(2, 3), 1)]
    assert list(runs_of([0, 1, 2, 2, 2], [2, 4])) == [(slice(0, 2), 2), (slice(2, 4), 1), (slice(4, 5), 1)]
    assert list(runs_of([3, 4], [1])) == [(slice(0, 2), 2)]
