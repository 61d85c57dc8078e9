"""Drafts of models whose layers keep states: wrong ones leave nothing behind, right ones all that their tokens would."""

from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from hetero_attn import LLM, Policy
from hetero_attn.cache.states import FixedStates
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.models.delta import DeltaNet
from hetero_attn.ops.step_rows import Rows
from hetero_attn.serving.draws.token_mask import TokenMask
from hetero_attn.serving.scheduling import scheduler
from hetero_attn.speculation.width import Width
from tests.hetero_attn.speculation.test_eagle_head import expect_the_slow_heads_drafts
from tests.hetero_attn.speculation.test_speculation import (
    ARRIVALS,
    PARAMS,
    PROMPTS,
    accept_one_too_many,
    answers_of,
    params,
    same_on_schedule,
    same_through_failures,
    speculate,
)
from tests.support.gpu.fake_engine import fake_engine
from tests.support.models.eagle import make_head
from tests.support.models.moe import make_moe
from tests.support.models.runtime import THREADS, cpu_plan, make_engine, nmse, toy_workload, uniform_plan
from tests.support.models.schedules import Failing
from tests.support.models.toy import make_checkpoint
from tests.support.suite.answers import same_answers
from tests.support.suite.few_examples import drawn

CONTEXT, PAGE = 64, 4
SHAPES = {"cpu": {"device": "cpu"}, "lanes": {"device": "emulated", "gpu_memory": "1 MiB"}}
FORM = {"regex": "(the first|a second) of [a-h]{3} words that nobody chooses, [a-h]{8}"}
TOKENS = torch.randint(307, (90,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    families = ("qwen3_next", "qwen3_5_text")
    return {family: make_moe(tmp_path_factory.mktemp(family), family) for family in families}


@pytest.fixture(scope="module")
def path(paths):
    return paths["qwen3_next"]


def load(path, shape="cpu", **options):
    options = {"max_batch": 4, "policy": Policy(prefill_chunk=32), "dtype": "fp32"} | SHAPES[shape] | options
    return LLM(path, page_size=PAGE, num_threads=THREADS, progress=False, max_context=CONTEXT, **options)


@pytest.fixture(scope="module")
def answers(path):
    """Answers without drafts."""
    with load(path) as llm:
        return answers_of(llm)


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_drafts_change_no_answer(path, answers, monkeypatch, kind, share):
    """Seeds, penalties, stops within drafts, scores: alone and in a batch, behind prompts that are known already."""
    with load(path) as llm:
        speculate(llm, monkeypatch, answers[kind], share)
        same_answers([llm.generate([prompt], params(kind))[0] for prompt in PROMPTS], answers[kind])
        same_answers(llm.generate(PROMPTS, params(kind)), answers[kind])
        drafts = llm.report().drafts

    assert drafts.passes > 0 and (drafts.accepted > 0) == (share > 0)


@pytest.mark.parametrize("shape", SHAPES)
@drawn(
    few=3,
    many=15,
    arrivals=ARRIVALS,
    contexts=st.sampled_from([1, 2]),
    aborted=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_no_schedule_with_drafts_changes_an_answer(path, answers, shape, arrivals, contexts, aborted, seed):
    """Arrivals at any step, prompts whose states are kept, growth and put-backs in a cache that is too small for all,
    and a request that ends in the middle."""
    with pytest.MonkeyPatch.context() as monkeypatch, load(path, shape, kv_tokens=CONTEXT * contexts) as llm:
        speculate(llm, monkeypatch, answers["greedy"], 0.6, seed)
        ended = llm.add(PROMPTS[1], params("greedy"))
        for _ in range(aborted):
            llm.step()
        llm.abort(ended)
        same_on_schedule(llm, arrivals, answers)
        cache = llm.engine.kv_cache

        assert cache.free_sequences == llm.plan.max_batch and not cache.states._drafted


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pass_that_fails_leaves_the_answer_as_it_was(path, answers, monkeypatch, shape):
    """Between layers that take drafts in, too."""
    failing = Failing(7, 4)
    monkeypatch.setattr(DeltaNet, "take_in", failing(DeltaNet.take_in))
    with load(path, shape) as llm:
        speculate(llm, monkeypatch, answers["greedy"], 0.8)

        assert same_through_failures(llm, monkeypatch, failing, answers) > 5


def test_a_resize_in_the_middle_changes_no_answer(path, answers, monkeypatch):
    """Between a pass with drafts and the one before which those that are right are taken in."""
    with load(path, "lanes", elastic=True) as llm:
        speculate(llm, monkeypatch, answers["greedy"], 1.0)
        request, budgets = llm.add(PROMPTS[1], params("greedy")), ["700 KiB", "1 MiB"] * 99
        resized = 0
        while request.finish_reason is None:
            llm.step()
            if any(count for _, count in llm.engine.kv_cache.states._drafted.values()):
                llm.resize(budgets[resized])
                resized += 1

    assert resized > 2 and tuple(request.token_ids) == answers["greedy"][1].token_ids


def opened(engine):
    """Two sequences behind prompts of other lengths, whose chunks are single tokens: torch computes longer ones, which
    takes memory that the stand-ins of a GPU have not."""
    sequences = [engine.kv_cache.open(60), engine.kv_cache.open(60)]
    for sequence, prompt in zip(sequences, (TOKENS[:3], TOKENS[4:9]), strict=True):
        for token in prompt:
            engine.prefill(sequence, [token])
    return sequences


def turns(accepted):
    """The tokens of each pass by sequence, of the first as many behind the newest as `accepted` says, of the other
    none."""
    place = 20
    for right in accepted:
        yield TOKENS[place : place + 1 + right], TOKENS[place + 30 : place + 31]
        place += 1 + right


def in_passes(engine, accepted, wrong=(3, 7)):
    """What passes with drafts give, of which the last ones of each sequence are wrong."""
    sequences, found = opened(engine), []
    for tokens in turns(accepted):
        pairs = [(sequence, [*own, *wrong]) for sequence, own in zip(sequences, tokens, strict=True)]
        work = [Rows(sequence, rows, len(rows)) for sequence, rows in pairs]
        for sequence, own, logits in zip(sequences, tokens, engine.run(work), strict=True):
            found += logits[: len(own)]
            assert engine.kv_cache.rewind(sequence, sequence.length - len(wrong))
    return torch.stack(found)


def one_by_one(engine, accepted):
    """What the same tokens give in passes of one row."""
    sequences, found = opened(engine), []
    for tokens in turns(accepted):
        for sequence, own in zip(sequences, tokens, strict=True):
            found += [engine.decode_step([sequence], [token])[0] for token in own]
    return torch.stack(found)


ACCEPTED = [0, 3, 1, 0, 2, 5]


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_logits_and_states_are_the_bits_of_passes_of_one_row(paths, family):
    """With q8 weights on the CPU, recorded; several rows of fp32 gates were summed in another order."""
    results = []
    for made in (in_passes, one_by_one):
        engine = make_engine(paths[family], cpu_plan(toy_workload(paths[family], "q8")))
        results.append([made(engine, ACCEPTED)])
        states = engine.kv_cache.states
        states.settle()
        results[-1] += [states[0], states[2]]
        engine.close()

    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("handover", ["flags", "graph"])
def test_captured_passes_on_the_stand_ins_of_a_gpu(path, handover):
    """Passes of four rows and of five, each kind captured at its second."""
    plan, results = uniform_plan(toy_workload(path), 0.5, 0.2, 1), []
    for made in (partial(in_passes, wrong=[7]), one_by_one):
        with fake_engine(path, plan, handover=handover, slack_bytes=1 << 18) as engine:
            results.append(made(engine, [0, 1, 0, 1, 1]))

    assert nmse(*results) <= 1e-11


def test_what_is_taken_back_and_what_cannot_be(path):
    """Drafts of the last pass, up to the first row of each sequence; a fork takes in those that are right."""
    engine = make_engine(path, cpu_plan(toy_workload(path)))
    cache, sequence = engine.kv_cache, engine.kv_cache.open(60)
    engine.prefill(sequence, TOKENS[:9])
    engine.run([Rows(sequence, TOKENS[9:14])])
    refused = cache.rewind(sequence, 9)
    taken = cache.rewind(sequence, 12) and cache.rewind(sequence, 11)
    twin = cache.fork(sequence, 60)
    late = cache.rewind(sequence, 10)
    found = [engine.decode_step([each], TOKENS[11:12])[0] for each in (sequence, twin)]
    cache.close(twin)
    expected = engine.prefill(cache.open(60), TOKENS[:12])
    engine.close()

    assert taken and not refused and not late
    assert torch.equal(*found) and nmse(found[0], expected) <= 1e-9


def test_the_plan_counts_what_drafts_leave(path):
    """As much as is allocated; without a GPU it lies beside the states."""
    with load(path) as llm:
        states, workload = llm.engine.kv_cache.states, llm.plan.workload
        held = [states.spare, states._first_id, *states._of_drafts.values()]

    assert sum(each.nbytes for each in held) == workload.draft_bytes > 0


def takes_all_in(self, sequence_id, count):
    pass


def takes_one_less_in(self, sequence_id, first, count):
    self._drafted[sequence_id] = first, max(0, count - 1)


def takes_the_next_row_in(self, sequence_id, first, count):
    self._drafted[sequence_id] = first - 1, count


PLANTED = {
    "wrong ones are taken in": (FixedStates, "take_back", takes_all_in),
    "the last is not taken in": (FixedStates, "drafted", takes_one_less_in),
    "the rows in front are": (FixedStates, "drafted", takes_the_next_row_in),
    "none is taken in": (DeltaNet, "take_in", lambda *given: None),
    "one too many is accepted": (scheduler, "_choose_while_right", accept_one_too_many),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_faults_are_caught(path, answers, monkeypatch, planted):
    monkeypatch.setattr(*PLANTED[planted])
    with load(path) as llm:
        speculate(llm, monkeypatch, answers["greedy"], 0.7)
        try:
            found = [output.token_ids for output in llm.generate(PROMPTS, params("greedy"))]
        except Exception as error:  # a fault may also be heard
            found = error

    assert found != [output.token_ids for output in answers["greedy"]]


@pytest.mark.parametrize("wish", ["ngram", "auto", "model"])
def test_all_that_drafts_may_draft(path, answers, tmp_path, wish):
    """A model without states too; one that has them itself would have to forget the drafts of several steps."""
    small = make_checkpoint(tmp_path, "llama", layers=1, num_heads=2, hidden=48, seed=3)
    with load(path, speculate=small if wish == "model" else wish) as llm:
        same_answers(llm.generate(PROMPTS, params("greedy")), answers["greedy"])
        assert llm._scheduler.speculator is not None and llm.report().drafts.reason
    with pytest.raises(UnsupportedModelError, match="cannot forget several steps"):
        load(path, speculate=path)


@pytest.fixture
def head(tmp_path):
    return make_head(tmp_path / "head")


@pytest.fixture
def three_drafts(monkeypatch):
    """In every pass that has room for them, whatever they gain."""
    monkeypatch.setattr(Width, "choose", lambda self, costs, rows, most: min(most, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_head_changes_no_answer(path, answers, head, three_drafts, shape):
    """It reads hidden states of passes whose rows were drafts, beside states that leave those out."""
    with load(path, shape, speculate=head) as llm:
        for kind in PARAMS if shape == "cpu" else ("seeded",):
            same_answers([llm.generate([prompt], params(kind))[0] for prompt in PROMPTS], answers[kind])
            same_answers(llm.generate(PROMPTS, params(kind)), answers[kind])

        assert llm.report().drafts.passes > 0


def test_a_head_drafts_what_it_would_of_the_text_alone(path, head, three_drafts):
    """Behind a prompt, and behind passes of which some drafts were wrong."""
    with load(path, speculate=head) as llm:
        request = llm.add(PROMPTS[1], params("seeded", top_p=1.0))
        for steps in (2, 3, 9):
            for _ in range(steps):
                llm.step()
            expect_the_slow_heads_drafts(llm, path, head, [request])

        assert llm.report().drafts.passes > 9


@pytest.fixture
def token_by_token(path):
    """What the form makes of every prompt without drafts, no token of it forced."""
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra grammar)")
    with pytest.MonkeyPatch.context() as monkeypatch, load(path) as llm:
        monkeypatch.setattr(TokenMask, "forced", lambda self, generated_ids: [])
        return {kind: [llm.generate([each], in_form(kind))[0] for each in PROMPTS] for kind in ("greedy", "seeded")}


def in_form(kind):
    return params(kind, **FORM, ignore_eos=False)


@pytest.mark.parametrize("wish", ["off", "ngram", "head"])
def test_answers_in_a_form_are_those_token_by_token(path, token_by_token, head, three_drafts, wish):
    """What a grammar forces shares passes with what is drafted."""
    with load(path, speculate=head if wish == "head" else wish) as llm:
        for kind, expected in token_by_token.items():
            same_answers([llm.generate([prompt], in_form(kind))[0] for prompt in PROMPTS], expected)
            same_answers(llm.generate(PROMPTS, in_form(kind)), expected)

        assert llm.report().forced_tokens > 300 and (llm.report().drafts.passes > 0) == (wish != "off")


def test_forced_tokens_that_a_state_leaves_out_are_missed(path, token_by_token, monkeypatch):
    monkeypatch.setattr(DeltaNet, "take_in", lambda *given: None)
    with load(path) as llm:
        found = [output.token_ids for output in llm.generate(PROMPTS, in_form("greedy"))]

    assert found != [output.token_ids for output in token_by_token["greedy"]]
