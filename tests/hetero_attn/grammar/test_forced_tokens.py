"""Tokens that a grammar forces share passes and change nothing; masks are found out ahead, while a step is computed."""

import re
import threading
from collections import Counter

import pytest
import torch

from hetero_attn.serving.draws import token_mask
from hetero_attn.serving.draws.token_mask import TokenMask
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.speculation.speculator import make_speculator
from tests.support.server.http_server import load_tiny
from tests.support.server.schemas import PERSON
from tests.support.suite.answers import same_answers

pytest.importorskip("llguidance", reason="llguidance is not installed (extra grammar)")


KEYS = {
    "type": "object",
    "properties": {
        "a_long_name_of_a_key": {"enum": ["yes", "no"]},
        "another_name_that_is_long": {"type": "boolean"},
        "the_last_of_these_names": {"const": "a constant value that nobody chooses"},
    },
    "additionalProperties": False,
}


KEYS["required"] = [*KEYS["properties"]]


def passes_of(llm, prompts, params):
    llm.report().reset()
    outputs = llm.generate(prompts, params)
    return outputs, llm.report().phases["decode"].steps


@pytest.fixture(scope="module")
def exact():
    with load_tiny(dtype="fp32") as model:
        yield model


@pytest.mark.parametrize("speculate", ["off", "ngram"])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0, "logprobs": 2}, {"temperature": 1.2, "seed": 5}, {"max_tokens": 9}], ids=str
)
def test_forced_tokens_share_passes_and_change_nothing(exact, monkeypatch, sampling, speculate):
    """The oracle is the same model without them, token by token."""
    params = SamplingParams(**{"json_schema": KEYS, "max_tokens": 120, "temperature": 0.0} | sampling)
    plain, prompts = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True), ["A thing:", "Q", "A list is"]
    monkeypatch.setattr(exact._scheduler, "speculator", make_speculator(speculate, exact.report()))
    each = [params, params, plain]
    outputs, steps = passes_of(exact, prompts, each)
    forced, counted = exact.report().forced_tokens, exact.report().phases["decode"].tokens
    monkeypatch.setattr(TokenMask, "forced", lambda self, generated_ids: [])
    monkeypatch.setattr(exact._scheduler, "speculator", None)
    slow, slow_steps = passes_of(exact, prompts, each)

    same_answers(outputs, slow)
    assert counted == exact.report().phases["decode"].tokens == sum(len(each.token_ids) - 1 for each in outputs)
    assert sum(output.metrics.forced_tokens for output in outputs) == forced and forced > 0
    assert outputs[2].metrics.forced_tokens == slow[0].metrics.forced_tokens == 0


def test_a_schema_of_long_keys_takes_far_fewer_passes(exact, monkeypatch):
    params = SamplingParams(json_schema=KEYS, max_tokens=120, temperature=0.0)
    (output,), steps = passes_of(exact, ["A thing:"], params)
    monkeypatch.setattr(TokenMask, "forced", lambda self, generated_ids: [])
    _, slow_steps = passes_of(exact, ["A thing:"], params)

    assert steps <= 0.7 * slow_steps, (steps, slow_steps)
    assert slow_steps == len(output.token_ids) - 1


def test_what_is_forced_wrongly_is_not_said(exact, monkeypatch):
    """A grammar's library that errs: the sampler says what it would have said, and is not asked for ever."""
    params = SamplingParams(json_schema=KEYS, max_tokens=60, temperature=0.0)
    right, slow_steps = passes_of(exact, ["A thing:"], params)
    asked = []
    monkeypatch.setattr(TokenMask, "forced", lambda self, generated_ids: asked.append(1) or [4000, 4001, 4002])
    wrong, _ = passes_of(exact, ["A thing:"], params)

    same_answers(wrong, right)
    assert len(asked) <= 6 and wrong[0].metrics.forced_tokens == 0


def test_a_mask_that_takes_long_is_found_out_while_the_step_is_computed(exact, monkeypatch):
    """Where every draw is refused each but the first is found out on another thread, and once; the answer is as
    without. Where none is, none is found out."""
    params = SamplingParams(regex="[a-z ]{200}", max_tokens=12, temperature=1.2, seed=3)
    bits, step, which, log = TokenMask._bits, exact.engine.decode_step, TokenMask.which, []

    def logged(self):
        log.append("mask" if threading.current_thread().name.startswith("hetero-attn-mask") else "late")
        return bits(self)

    def generated(answer, ahead_s):
        log.clear()
        monkeypatch.setattr(TokenMask, "which", answer)
        monkeypatch.setattr(token_mask, "AHEAD_S", ahead_s)
        outputs = exact.generate(["A thing:"] * 2, params)
        return outputs, Counter(log)

    def refusing(self, ids, token_ids):
        return [False] * len(token_ids)

    monkeypatch.setattr(TokenMask, "_bits", logged)
    monkeypatch.setattr(exact.engine, "decode_step", lambda *args, **more: log.append("step") or step(*args, **more))
    (ahead, counts), (alone, late) = generated(refusing, 0.0), generated(refusing, 600.0)
    anything = re.compile("(?s).{12,}")
    params = SamplingParams(regex="(?s:.{900,})", max_tokens=12, temperature=1.2, seed=3)
    (free, none) = generated(which, 0.0)

    same_answers(ahead, alone)
    assert counts == {"mask": 22, "late": 2, "step": 11} and late == {"late": 24, "step": 11}
    assert none == {"step": 11} and all(anything.fullmatch(output.text) for output in free)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"temperature": 1.2}, marks=pytest.mark.matrix),
        {"temperature": 1.5, "top_p": 0.9, "top_k": 20},
        pytest.param({"min_p": 0.05, "top_k": 30}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_a_seed_gives_the_same_answer_however_it_is_computed(exact, monkeypatch, more):
    """Alone, beside others, out of a cache that knows the prompt, put back when pages run out, token by token and with
    forced tokens and drafts in rows of one pass."""
    kinds = [{"regex": "[a-z ,.]{300}"}, {"regex": "([a-z]{1,6}-){30}"}, {"json_schema": KEYS}]
    params = [SamplingParams(**kind, **more, seed=4 + n) for n, kind in enumerate(kinds)]
    prompts = ["A list is", "A list is not", "A thing:"]
    alone = [exact.generate(prompt, wish)[0] for prompt, wish in zip(prompts, params, strict=True)]
    monkeypatch.setattr(exact._scheduler, "speculator", make_speculator("ngram", exact.report()))
    same_answers(exact.generate(prompts, params), alone)
    with load_tiny(dtype="fp32", batch=3, context=192, kv_tokens=192) as small:
        requests = [small.add(prompt, wish) for prompt, wish in zip(prompts, params, strict=True)]
        while small.step():
            pass
    same_answers([request.output() for request in requests], alone)
    assert any(request.replayed for request in requests)


def test_what_was_found_out_ahead_is_left_where_the_answer_goes_elsewhere(grammars, tokenizer, monkeypatch):
    monkeypatch.setattr(token_mask, "AHEAD_S", 0.0)
    params, ids = (
        SamplingParams(json_schema=PERSON),
        tokenizer.encode('{"name": "Ada", "age": 36', add_special_tokens=False),
    )
    mask = grammars.mask(params)
    for tokens in (ids[:2], ids[:5], ids[:1], ids[:4], ids):
        mask.prepare(ids[:3])
        assert torch.equal(mask.allowed(tokens), grammars.mask(params).allowed(tokens)), tokens
        mask.prepare(tokens)
        assert mask.which(tokens, range(0, 4096, 97)) == grammars.mask(params).which(tokens, range(0, 4096, 97))
        assert mask.forced(tokens) == grammars.mask(params).forced(tokens)
        assert torch.equal(mask.allowed(tokens), grammars.mask(params).allowed(tokens))


def test_only_an_answer_that_errs_has_its_mask_found_out(exact, monkeypatch):
    """Where the likeliest token is taken and the grammar allows it, nothing else is asked; the oracle asks every time."""
    params, asked, allowed = SamplingParams(json_schema=PERSON, max_tokens=60, temperature=0.0), [], TokenMask.allowed
    monkeypatch.setattr(TokenMask, "allowed", lambda self, ids: asked.append(1) or allowed(self, ids))
    (output,) = exact.generate(["A thing:"], params)
    seldom = len(asked)
    monkeypatch.setattr(TokenMask, "which", lambda self, ids, token_ids: [False] * len(token_ids))
    (slow,) = exact.generate(["A thing:"], params)

    assert output.token_ids == slow.token_ids
    assert seldom < len(output.token_ids) == len(asked) - seldom
