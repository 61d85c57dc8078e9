"""Speculative decoding never changes an answer, and drafts what a slow search would draft."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn import LLM, Policy, SamplingParams
from hetero_attn.engine.lane_report import LaneReport
from hetero_attn.errors import ArgumentError
from hetero_attn.serving.scheduling import scheduler
from hetero_attn.serving.scheduling.scheduler import Scheduler
from hetero_attn.speculation.oracle import TwinDrafter
from hetero_attn.speculation.speculator import NgramDrafter, Speculator, make_speculator
from hetero_attn.speculation.suffix_automaton import SuffixAutomaton
from hetero_attn.speculation.width import Width
from tests.support.models.runtime import THREADS
from tests.support.models.schedules import Failing, scheduled, steps_through_failures
from tests.support.models.toy import make_checkpoint
from tests.support.planning.draft_costs import measured
from tests.support.suite.answers import same_answers
from tests.support.suite.few_examples import drawn

CONTEXT, CHUNK, PAGE = 64, 32, 4
SHAPES = {"cpu": {"device": "cpu"}, "spilling": {"device": "emulated", "gpu_memory": "700KiB"}}
PROMPTS = [[4 + (7 * place + 31 * seed) % 300 for place in range(length)] for seed, length in enumerate((5, 21, 12))]
PROMPTS.append(PROMPTS[1][:18] + [9, 8])
# Which prompt, how many steps later the next one comes, how long its answer may be.
ARRIVALS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([None, 5])), max_size=7)
PARAMS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    "penalties": {
        "temperature": 0.8,
        "seed": 7,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
    },
    "logprobs": {"temperature": 0.7, "seed": 2, "logprobs": 2, "min_tokens": 6, "logit_bias": {7: 2.0}},
    "stops": {"temperature": 1.0, "seed": 3, "stop": ["e", "a b"], "stop_token_ids": [17, 200], "ignore_eos": False},
}


def longest_before(tokens: list[int]) -> int:
    """The longest suffix that ends earlier too, by looking everywhere."""
    text = tuple(tokens)
    for length in range(len(text) - 1, 0, -1):
        if any(text[end - length : end] == text[-length:] for end in range(length, len(text))):
            return length
    return 0


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), max_size=60), count=st.integers(1, 12))
def test_the_automaton_finds_what_a_slow_search_finds(tokens, count):
    index = SuffixAutomaton()
    for place, token_id in enumerate(tokens):
        index.append(token_id)
        seen, (length, end) = tokens[: place + 1], index.match()
        assert length == longest_before(seen)
        assert length == 0 or (end < place and seen[end + 1 - length : end + 1] == seen[place + 1 - length :])
        drafted, continued = index.draft(count), list(seen)
        for _ in drafted:  # what came behind that occurrence, and what is drafted comes behind it in turn
            continued.append(continued[end + 1 + len(continued) - len(seen)])
        assert drafted == continued[len(seen) :]
        assert len(drafted) == (count if length >= 2 else 0)
    assert len(index._lengths) <= max(2, 2 * len(tokens)) and sum(map(len, index._nexts)) <= max(3, 3 * len(tokens))


def test_the_latest_occurrence_is_preferred():
    index = SuffixAutomaton()
    for token_id in [1, 2, 3, 9, 1, 2, 4, 8, 1, 2]:
        index.append(token_id)

    assert index.draft(2) == [4, 8]


@settings(max_examples=20, deadline=None)
@given(pieces=st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=8))
def test_a_drafter_reads_a_growing_text_once(pieces):
    drafter, whole, prompt, generated = NgramDrafter(), SuffixAutomaton(), [0, 1, 0, 1, 2], []
    for piece in pieces:
        generated += piece
        drafted = drafter.draft(prompt, generated, 4)
        for token_id in [*prompt, *generated][len(whole.tokens) :]:
            whole.append(token_id)
        assert drafted == whole.draft(4, least_match=1) and len(drafter._index.tokens) == len(prompt) + len(generated)


def test_a_twin_is_right_where_ngrams_are_right_about_the_other_text():
    draw = random.Random(0)
    prompt, twin = [1, 2, 3, 4] * 3, [draw.choice([1, 2, 3, 4]) for _ in range(60)]
    answer, ngrams = [draw.randrange(100) for _ in twin], NgramDrafter()
    drafter = TwinDrafter(prompt, twin, answer, vocab_size=100)
    for made in range(1, 56):
        guessed, drafts = ngrams.draft(prompt, twin[:made], 4), drafter.draft((), answer[:made], 4)
        right = [draft == own for draft, own in zip(drafts, answer[made:], strict=False)]

        assert right == [guess == other for guess, other in zip(guessed, twin[made:], strict=False)]
        assert drafter.kind((), answer[:made]) == ngrams.kind(prompt, twin[:made])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Some layers see everything, others 11 tokens."""
    shape = {"num_heads": 8, "num_kv_heads": 4, "max_position_embeddings": CONTEXT, "sliding_window": 11}
    return make_checkpoint(tmp_path_factory.mktemp("speculation"), "qwen3", **shape)


def load(path, shape="cpu", **options):
    options = {"max_batch": 4, "policy": Policy(prefill_chunk=CHUNK), "dtype": "fp32"} | SHAPES[shape] | options
    return LLM(path, page_size=PAGE, num_threads=THREADS, progress=False, **options)


def params(kind, **more):
    return SamplingParams(**{"ignore_eos": True} | PARAMS[kind] | more)


def answers_of(llm):
    """What each prompt gives alone, for every kind of parameters."""
    return {kind: [llm.generate([prompt], params(kind))[0] for prompt in PROMPTS] for kind in PARAMS}


@pytest.fixture(scope="module")
def plain(path):
    """Answers without drafts."""
    with load(path) as llm:
        return answers_of(llm)


class Knowing:
    """Drafts what is right with a probability, and else another token."""

    def __init__(self, answers, share, seed):
        self.answers, self.share, self.draw = answers, share, random.Random(seed)

    def draft(self, prompt_ids, generated_ids, count):
        right = self.answers[tuple(prompt_ids)][len(generated_ids) : len(generated_ids) + count]
        return [token_id if self.draw.random() < self.share else 3 + (token_id + 5) % 290 for token_id in right]

    def close(self):
        pass


def speculate(llm, monkeypatch, answers, share, seed=0):
    """Let a model draft, with widths that follow no rule."""
    draw = random.Random(seed)
    answers = {output.prompt_token_ids: output.token_ids for output in answers}
    made = Speculator(llm.engine.report, lambda: Knowing(answers, share, draw.randrange(100)))
    llm._scheduler.speculator = made
    any_width = lambda self, costs, rows, most: min(most, draw.choice([1, 2, 3, 5, 8, 16]))  # noqa: E731
    monkeypatch.setattr(Width, "choose", any_width)


def same_on_schedule(llm, arrivals, answers):
    """Requests that come at any step give the answers, as far as each goes."""
    given = [(PROMPTS[which], steps, params("greedy", max_tokens=most)) for which, steps, most in arrivals]
    for (which, _, _), request in zip(arrivals, scheduled(llm, given), strict=True):
        assert tuple(request.token_ids) == answers["greedy"][which].token_ids[: request.max_tokens]


def same_through_failures(llm, monkeypatch, failing, answers):
    """Passes fail, before and after they have computed and between the tokens that they give, and the answers are the
    same; how many did."""
    llm.engine.run = failing(llm.engine.run)
    monkeypatch.setattr(scheduler, "_choose_while_right", failing(scheduler._choose_while_right))
    requests = [llm.add(prompt, params("greedy")) for prompt in PROMPTS]
    failures = steps_through_failures(llm, requests)
    same_answers([request.output() for request in requests], answers["greedy"])
    return failures


@pytest.mark.table
@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_drafts_change_no_answer(path, plain, monkeypatch, kind, share):
    """Seeds, penalties, stops within drafts, scores: alone and in a batch, with a prompt that is known already."""
    with load(path) as llm:
        speculate(llm, monkeypatch, plain[kind], share)
        same_answers([llm.generate([prompt], params(kind))[0] for prompt in PROMPTS], plain[kind])
        outputs = llm.generate(PROMPTS, params(kind))
        same_answers(outputs, plain[kind])
        drafts, decode = llm.report().drafts, llm.report().phases["decode"]

        assert decode.tokens == 2 * sum(len(output.token_ids) - 1 for output in outputs)
        assert drafts.passes > 0 and (drafts.accepted > 0) == (share > 0)
        assert sum(output.metrics.accepted_tokens for output in outputs) <= drafts.accepted <= drafts.drafted
        assert llm.engine.kv_cache.free_sequences == llm.plan.max_batch


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_drafts_end_where_the_answer_must(path, plain, monkeypatch, max_tokens):
    with load(path) as llm:
        speculate(llm, monkeypatch, plain["seeded"], 1.0)
        for output, right in zip(llm.generate(PROMPTS, params("seeded", max_tokens=max_tokens)), plain["seeded"]):
            assert output.token_ids == right.token_ids[:max_tokens] and output.finish_reason == "length"


@pytest.mark.parametrize("shape", SHAPES)
@drawn(
    few=3,
    many=12,
    arrivals=ARRIVALS,
    contexts=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_no_schedule_with_drafts_changes_an_answer(path, plain, shape, arrivals, contexts, seed):
    """Arrivals at any step, growth and put-backs in a cache that is too small for all."""
    with pytest.MonkeyPatch.context() as monkeypatch, load(path, shape, kv_tokens=CONTEXT * contexts) as llm:
        speculate(llm, monkeypatch, plain["greedy"], 0.6, seed)
        same_on_schedule(llm, arrivals, plain)
        assert llm.engine.kv_cache.free_sequences == llm.plan.max_batch


@pytest.mark.parametrize("shape", ["cpu", pytest.param("spilling", marks=pytest.mark.matrix)])
def test_a_pass_that_fails_leaves_the_answer_as_it_was(path, plain, monkeypatch, shape):
    with load(path, shape) as llm:
        speculate(llm, monkeypatch, plain["seeded"], 0.8)

        assert same_through_failures(llm, monkeypatch, Failing(5, 3), plain) > 10


def accept_one_too_many(request, drafts, logits):
    for place, row in enumerate(logits):
        is_wrong = place > 0 and request.token_ids[-1] != drafts[place - 1]
        if request.finish_reason is not None or (is_wrong and place > 1):
            return place - 1
        request.choose(row)
    return len(drafts)


def rewind_one_too_few(self, request):
    sequence, stored = request.sequence, request.cached_tokens
    self._engine.kv_cache.rewind(sequence, min(sequence.length, stored + 1))


@pytest.mark.parametrize("planted", ["accept", "rewind"])
def test_planted_faults_are_caught(path, plain, monkeypatch, planted):
    if planted == "accept":
        monkeypatch.setattr(scheduler, "_choose_while_right", accept_one_too_many)
    else:
        monkeypatch.setattr(Scheduler, "_settle", rewind_one_too_few)
    with load(path) as llm:
        speculate(llm, monkeypatch, plain["greedy"], 0.5)
        try:
            found = [output.token_ids for output in llm.generate(PROMPTS, params("greedy"))]
        except Exception as error:  # a fault may also be heard
            found = error

    assert found != [output.token_ids for output in plain["greedy"]]


@pytest.mark.parametrize("wish", ["ngram", "auto"])
def test_the_ngram_drafter_is_right_where_text_repeats(path, plain, wish):
    """A greedy toy ends in a loop, which its own drafter sees."""
    with load(path, speculate=wish) as llm:
        costs = measured(llm._scheduler.speculator.costs)
        costs.observe = lambda rows, seconds: None  # so that widths follow no clock
        outputs = [llm.generate([prompt], params("greedy"))[0] for prompt in PROMPTS]
        same_answers(outputs, plain["greedy"])

        assert "drafts:" in llm.report().table() and llm.report().drafts.reason
        assert all("draft" in output.metrics.drafts_reason for output in outputs)
        for output in outputs:
            index, hits = SuffixAutomaton(), 0
            for token_id in (*output.prompt_token_ids, *output.token_ids):
                hits += index.draft(1) == [token_id]
                index.append(token_id)
            assert hits == 0 or output.metrics.drafted_tokens > 0


def test_off_is_off(path):
    with load(path) as llm:
        output = llm.generate([PROMPTS[0]], params("greedy"))[0]

        assert llm._scheduler.speculator is None and output.metrics.drafted_tokens == 0
        assert "drafts" not in llm.report().table()


def test_what_cannot_be_speculated_is_named(path):
    with pytest.raises(ArgumentError, match="speculate is 'banana'.*off, ngram, auto"):
        LLM(path, speculate="banana")
    report = LaneReport()
    assert make_speculator("off", report) is None and not report.drafts.reason
