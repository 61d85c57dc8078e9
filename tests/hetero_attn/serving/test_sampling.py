"""The sampler against transformers' logits processors, against chance, and against bad input."""

import math
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hetero_attn.engine.greatest import LogitsRows, greatest_with_value
from hetero_attn.errors import NonFiniteLogitsError, SamplingError
from hetero_attn.serving.draws.likely import likely_tokens
from hetero_attn.serving.sampling import Sampler, score_token
from hetero_attn.serving.sampling_params import SamplingParams

VOCAB = 67
EOS = (3, 5)


def random_logits(seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def oracle_probabilities(
    logits: torch.Tensor, params: SamplingParams, prompt_ids: list[int], generated_ids: list[int]
) -> torch.Tensor:
    """Probabilities float64 [vocab] by transformers' processors, in vLLM's order; it has no presence and frequency
    penalties, so those two are written out."""
    ids = torch.tensor([prompt_ids + generated_ids])
    scores = logits.double()[None]
    if params.logit_bias:
        scores = SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias})(ids, scores)
    stops = sorted({*EOS, *params.stop_token_ids})
    scores = MinNewTokensLengthLogitsProcessor(len(prompt_ids), params.min_tokens, stops)(ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in Counter(generated_ids).items():
        scores[0, token] -= params.frequency_penalty * count + params.presence_penalty
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    scores = MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    return torch.softmax(TopPLogitsWarper(params.top_p)(ids, scores), dim=-1)[0]


def sampler_probabilities(
    logits: torch.Tensor, params: SamplingParams, prompt_ids: list[int], generated_ids: list[int]
) -> torch.Tensor:
    adjusted = Sampler(params, EOS, len(logits))._adjust(logits, prompt_ids, generated_ids)
    token_ids, weights = likely_tokens(adjusted, params)
    return torch.zeros(len(logits), dtype=torch.float64).index_put((token_ids,), weights / weights.sum())


some_params = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 4),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    top_k=st.sampled_from([-1, 0, 1, 2, 10, VOCAB, 1000]),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-10, 10), max_size=4),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
    min_tokens=st.integers(0, 3),
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    params=some_params,
    seed=st.integers(0, 10**6),
    prompt_ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    generated_ids=st.lists(st.integers(0, VOCAB - 1), max_size=6),
)
def test_probabilities_are_those_of_transformers(params, seed, prompt_ids, generated_ids):
    logits = random_logits(seed)

    expected = oracle_probabilities(logits, params, prompt_ids, generated_ids)
    actual = sampler_probabilities(logits, params, prompt_ids, generated_ids)

    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-9)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(params=some_params, seed=st.integers(0, 10**6), generated_ids=st.lists(st.integers(0, VOCAB - 1), max_size=6))
def test_greedy_takes_the_most_likely_token_of_transformers(params, seed, generated_ids):
    logits = random_logits(seed)
    expected = oracle_probabilities(logits, params, [1, 2], generated_ids)
    top_two = expected.topk(2).values
    assume(top_two[0] - top_two[1] > 1e-6)

    chosen = Sampler(replace(params, temperature=0.0), EOS, VOCAB).sample(logits, [1, 2], generated_ids)

    assert expected.argmax() == chosen.token_id


class Allowing:
    """A grammar that allows the same tokens throughout."""

    def __init__(self, token_ids: set[int]) -> None:
        self._mask = torch.tensor([token_id in token_ids for token_id in range(VOCAB)])

    def holds(self, generated_ids: list[int]) -> bool:
        return True

    def allowed(self, generated_ids: list[int]) -> torch.Tensor:
        return self._mask

    def which(self, generated_ids: list[int], token_ids: list[int]) -> list[bool]:
        return self._mask[token_ids].tolist()


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    params=st.one_of(some_params, some_params.map(lambda params: replace(params, temperature=0.0))),
    seed=st.integers(0, 99),
    allowed=st.one_of(st.just(set(range(VOCAB))), st.sets(st.integers(0, VOCAB - 1))),
    generated_ids=st.lists(st.integers(0, VOCAB - 1), max_size=6),
)
def test_a_grammar_leaves_the_draws_among_what_it_allows(params, seed, allowed, generated_ids):
    """The oracle makes every other logit -inf and knows no grammar: greedy the token is the same, and what is drawn
    has a probability there. How often each is drawn is for test_unmasked_draws.py."""
    logits = random_logits(seed)
    forbidden = [token_id for token_id in range(VOCAB) if token_id not in allowed]
    masked = logits.index_fill(0, torch.tensor(forbidden, dtype=torch.int64), -math.inf)
    held_back = {*EOS, *params.stop_token_ids} if len(generated_ids) < params.min_tokens else set()
    sampler, oracle = Sampler(params, EOS, VOCAB, seed, Allowing(allowed)), Sampler(params, EOS, VOCAB, seed)
    if not allowed - held_back:
        with pytest.raises(SamplingError, match="no token is allowed"):
            sampler.sample(logits, [1], generated_ids)
        return
    possible = {oracle.sample(masked, [1], generated_ids).token_id}
    if not params.greedy:
        possible = set(sampler_probabilities(masked, params, [1], generated_ids).nonzero().flatten().tolist())
    for _ in range(4):
        assert sampler.sample(logits, [1], generated_ids).token_id in possible


def test_top_k_keeps_all_that_tie_with_the_last():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])

    token_ids, weights = likely_tokens(logits, SamplingParams(top_k=2))

    assert token_ids.tolist() == [1, 2, 3] and weights.tolist() == pytest.approx([1 / 3] * 3)


def test_top_p_among_equals_keeps_the_lowest_ids():
    token_ids, _ = likely_tokens(torch.zeros(10), SamplingParams(top_p=0.25))

    assert token_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("top_p", [1e-300, 1e-9, 1 - 1e-12])
def test_top_p_at_its_ends_keeps_the_most_likely(top_p):
    logits = random_logits(0, vocab=5000)

    token_ids, _ = likely_tokens(logits, SamplingParams(top_p=top_p))

    assert logits.argmax() in token_ids and len(token_ids) == (1 if top_p < 0.5 else 5000)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy_without_overflow(temperature):
    logits = random_logits(1) * 1e30

    chosen = Sampler(SamplingParams(temperature=temperature, seed=0), EOS, VOCAB).sample(logits, [], [])

    assert logits.argmax() == chosen.token_id


def draw_counts(params: SamplingParams, logits: torch.Tensor, draws: int) -> list[int]:
    sampler = Sampler(params, (), len(logits))
    counts = Counter(sampler.sample(logits, [], []).token_id for _ in range(draws))
    return [counts[token_id] for token_id in range(len(logits))]


@pytest.mark.parametrize("temperature, plausible", [(0.8, True), (0.9, False)], ids=["right", "wrong_temperature"])
def test_draws_follow_the_probabilities(temperature, plausible):
    """Chi-square with a fixed seed; a temperature off by an eighth is told apart, so the test can fail."""
    logits = random_logits(2, vocab=9) / 2
    expected = torch.softmax(logits.double() / 0.8, dim=0)

    counts = draw_counts(SamplingParams(temperature=temperature, seed=11), logits, 8000)
    p_value = stats.chisquare(counts, (expected * sum(counts)).tolist()).pvalue

    assert (p_value > 1e-3) == plausible


def test_draws_never_leave_the_kept_tokens():
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0, 1.5])

    counts = draw_counts(SamplingParams(top_k=3, temperature=2.0, seed=0), logits, 500)

    assert counts[0] == counts[2] == 0 and min(counts[1], counts[3], counts[4]) > 0


def draw_sequence(params: SamplingParams, default_seed: int | None = None) -> list[int]:
    sampler = Sampler(params, EOS, VOCAB, default_seed)
    generated: list[int] = []
    for step in range(20):
        generated.append(sampler.sample(random_logits(step), [1], generated).token_id)
    return generated


def test_a_seed_repeats_its_draws():
    seeded = SamplingParams(seed=5)

    assert draw_sequence(seeded) == draw_sequence(seeded, default_seed=9) == draw_sequence(SamplingParams(), 5)
    assert draw_sequence(seeded) != draw_sequence(SamplingParams(seed=6))


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_draws_differ(seed):
    assert draw_sequence(SamplingParams(seed=seed)) != draw_sequence(SamplingParams(seed=seed))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draw_sequence(SamplingParams(seed=1))

    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 2.0}], ids=["fast_path", "penalised"])
def test_greedy_takes_the_lowest_id_on_ties(params):
    logits = torch.full((50_000,), 1.0)
    logits[[31_234, 49_999]] = 7.0

    chosen = Sampler(SamplingParams(temperature=0, **params), EOS, len(logits)).sample(logits, [1], [2])

    assert (31_234, None, ()) == chosen


def test_sampling_leaves_the_logits_as_they_are():
    logits = random_logits(3)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=1, logit_bias={1: 5}, min_tokens=9, top_k=3)

    Sampler(params, EOS, VOCAB).sample(logits, [1, 2], [3])

    assert torch.equal(before, logits)


def test_min_tokens_holds_back_end_and_stop_tokens_and_then_lets_go():
    logits = torch.zeros(VOCAB)
    logits[[3, 5, 8]] = torch.tensor([9.0, 8.0, 7.0])
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[8]), EOS, VOCAB)

    chosen = [sampler.sample(logits, [1], [0] * count).token_id for count in range(3)]

    assert chosen == [0, 0, 3]


@pytest.mark.parametrize("ignore_eos, expected", [(False, {3, 5, 8}), (True, {8})])
def test_stop_token_ids_of_a_sampler(ignore_eos, expected):
    sampler = Sampler(SamplingParams(stop_token_ids=[8], ignore_eos=ignore_eos), (*EOS, VOCAB, -1), VOCAB)

    assert expected == sampler.stop_token_ids


@pytest.mark.parametrize("count, reported", [(0, 0), (4, 4), (-1, VOCAB), (1000, VOCAB)])
def test_logprobs_are_the_models_own(count, reported):
    logits = random_logits(4)
    expected = torch.log_softmax(logits.double(), dim=0)
    params = SamplingParams(temperature=0, logprobs=count, logit_bias={7: 100}, repetition_penalty=1.3)

    chosen = Sampler(params, EOS, VOCAB).sample(logits, [1, 2], [3])

    assert chosen.token_id == 7 and chosen.logprob == pytest.approx(float(expected[7]), abs=1e-6)
    assert [token for token, _ in chosen.top_logprobs] == expected.argsort(descending=True)[:reported].tolist()
    assert chosen == score_token(logits, 7, count)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.nan])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_inf_logits_are_named(value, temperature):
    logits = random_logits(5)
    logits[40] = value

    with pytest.raises(NonFiniteLogitsError, match="output position 2"):
        Sampler(SamplingParams(temperature=temperature), EOS, VOCAB).sample(logits, [1], [2, 3])


def test_logits_without_any_finite_value_are_named():
    with pytest.raises(NonFiniteLogitsError, match="-inf"):
        Sampler(SamplingParams(), EOS, VOCAB).sample(torch.full((VOCAB,), -math.inf), [1], [])


def test_no_token_allowed_is_an_error():
    logits = torch.full((VOCAB,), -math.inf)
    logits[EOS[0]] = 1.0

    with pytest.raises(SamplingError, match="no token is allowed.*min_tokens=4"):
        Sampler(SamplingParams(min_tokens=4), EOS, VOCAB).sample(logits, [1], [])


def test_a_penalty_beyond_float32_is_an_error():
    with pytest.raises(SamplingError, match="repetition_penalty=1e-300"):
        Sampler(SamplingParams(repetition_penalty=1e-300), EOS, VOCAB).sample(torch.ones(VOCAB), [1], [])


@pytest.mark.parametrize("params", [{"stop_token_ids": [VOCAB]}, {"logit_bias": {VOCAB: 1.0}}], ids=str)
def test_token_ids_outside_the_vocabulary(params):
    with pytest.raises(SamplingError, match=f"{next(iter(params))} names token {VOCAB}"):
        Sampler(SamplingParams(**params), EOS, VOCAB)


def test_defaults_are_those_of_vllm_but_for_max_tokens():
    params = SamplingParams()

    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), ())
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (None, 0, None, None)
    assert (params.ignore_eos, params.skip_special_tokens) == (False, True)


def test_lists_are_kept_as_tuples():
    params = SamplingParams(stop="end", stop_token_ids=[4, 2], logit_bias={9: 1, 2: -1})

    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (4, 2), ((2, -1.0), (9, 1.0)))
    assert replace(params, top_k=3).logit_bias == params.logit_bias and hash(params)


def test_params_are_frozen():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.5


def bad_values():
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        yield from ((name, value) for value in (math.nan, math.inf, -math.inf, "1", None, True))
    yield from (("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1))
    yield from (("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("temperature", 10**400))
    yield from ((f"{kind}_penalty", value) for kind in ("presence", "frequency") for value in (-2.1, 2.1))
    for name, low in (("top_k", -2), ("seed", -2), ("logprobs", -2), ("max_tokens", 0), ("min_tokens", -1)):
        yield from ((name, value) for value in (low, 1.5, math.nan, "3", False))
    yield from (("top_k", None), ("min_tokens", None), ("seed", 2**63))
    yield from (("ignore_eos", 1), ("skip_special_tokens", None))
    yield from (("stop", [""]), ("stop", ["x" * 257]), ("stop", ["x"] * 17), ("stop", [1]), ("stop", 5), ("stop", ""))
    yield from (("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("stop_token_ids", 3))
    yield from (("stop_token_ids", range(1025)), ("logit_bias", {1: math.nan}), ("logit_bias", {1: 100.5}))
    yield from (("logit_bias", {-1: 0.0}), ("logit_bias", {"a": 0.0}), ("logit_bias", 7), ("logit_bias", [1]))
    yield ("logit_bias", dict.fromkeys(range(1025), 0.0))


@pytest.mark.parametrize("name, value", list(bad_values()), ids=lambda part: f"{part!r:.20}")
def test_a_bad_value_is_named(name, value):
    with pytest.raises(SamplingError, match=f"^{name}"):
        SamplingParams(**{name: value})


def test_min_tokens_above_max_tokens():
    with pytest.raises(SamplingError, match="min_tokens must be at most max_tokens, got 5 > 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize("name", ["n", "best_of", "temprature"])
def test_unknown_parameters_are_refused(name):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: 1})


def test_rows_of_memory_that_is_written_again_are_what_it_holds_now():
    """Views are kept for the tensor that a step gives again, not for another one of its size."""
    rows, buffer = LogitsRows(), torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.0, float("nan")]])
    first = rows.of(buffer)

    assert [greatest_with_value(row)[0] for row in first] == [1, 2]

    buffer.copy_(torch.tensor([[7.0, 2.0, 1.0], [5.0, 6.0, 6.0]]))

    assert rows.of(buffer) is first
    assert [greatest_with_value(row) for row in first] == [(0, 7.0), (1, 6.0)]
    assert greatest_with_value(rows.of(torch.tensor([[0.0, 1.0, 9.0]]))[0]) == (2, 9.0)
