"""Draws that ask a grammar about few tokens: each token comes up with exactly the probability that it has among what is
allowed, found by following every number that may be drawn."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.serving.draws import unmasked
from hetero_attn.serving.draws.likely import likely_tokens
from hetero_attn.serving.draws.unmasked import first_draw, second_draw
from hetero_attn.serving.sampling_params import SamplingParams

VOCAB = 8
NARROW = 1e-7  # steps of the outcome are found as closely as this


def wanted(logits: list[float], allowed: set[int], params: SamplingParams) -> dict[int, float]:
    """Written down as it is defined: mask, temperature, min_p, top_k (of equals the lowest ids), top_p."""
    weights = {t: math.exp(logits[t] / params.temperature) for t in sorted(allowed)}
    least = params.min_p * max(weights.values())
    order = sorted((t for t in weights if weights[t] >= least), key=lambda t: (-weights[t], t))
    order = order[: params.top_k] if params.top_k > 0 else order
    total, kept, before = sum(weights[t] for t in order), [], 0.0
    for token_id in order:
        if before < params.top_p * total:
            kept.append(token_id)
        before += weights[token_id]
    return {t: weights[t] / sum(weights[k] for k in kept) for t in kept}


class Numbers:
    """The numbers of one draw, the last of which may be missing."""

    def __init__(self, *numbers: float) -> None:
        self._left = list(numbers)

    def __call__(self) -> float:
        if not self._left:
            raise LookupError
        return self._left.pop(0)


def outcome(logits: list[float], allowed: set[int], params: SamplingParams, *numbers: float) -> tuple:
    """The token that these numbers come to, and what was asked; or that a further number is needed."""
    values, asked = torch.tensor(logits), []
    number = Numbers(*numbers)

    def asking(token_ids):
        asked.extend(token_ids)
        return [token_id in allowed for token_id in token_ids]

    try:
        first = first_draw(values, int(values.argmax()), params, asking, number)
        if first.token_id is not None:
            return first.token_id, tuple(asked)
        masked = torch.tensor([value if t in allowed else -math.inf for t, value in enumerate(logits)])
        token_ids, weights = likely_tokens(masked, params, breaks_ties=True)
        return second_draw(token_ids, weights, first, number), tuple(asked)
    except LookupError:
        return None, tuple(asked)


def shares(look, low: float = 0.0, high: float = 1.0, at_low=None, at_high=None) -> dict[tuple, float]:
    """What part of (0, 1] leads to each outcome, and a number that does; each outcome has one interval."""
    at_low, at_high = at_low or look(low or NARROW), at_high or look(high)
    if at_low == at_high:
        return {at_low: (high - low, high)}
    if high - low < NARROW:
        return {at_low: (high - low, low or NARROW)}
    middle = (low + high) / 2
    at_middle = look(middle)
    found = shares(look, low, middle, at_low, at_middle)
    for key, (share, number) in shares(look, middle, high, at_middle, at_high).items():
        found[key] = found.get(key, (0.0, 0.0))[0] + share, number
    return found


def drawn(logits: list[float], allowed: set[int], params: SamplingParams) -> tuple[dict[int, float], float]:
    """The probability of each token over all numbers, and that of a second draw."""

    def look(*numbers: float) -> tuple:
        return outcome(logits, allowed, params, *numbers)

    found: dict[int, float] = {}
    firsts = shares(look)
    for (token_id, _), (share, _) in firsts.items():
        if token_id is not None:
            found[token_id] = found.get(token_id, 0.0) + share
    again = [(share, number) for (token_id, _), (share, number) in firsts.items() if token_id is None]
    if again:
        second = shares(lambda number: look(again[0][1], number))
        for (token_id, _), (share, _) in second.items():
            found[token_id] = found.get(token_id, 0.0) + share * sum(each for each, _ in again)
    return found, sum(each for each, _ in again)


def far_from(logits: list[float], allowed: set[int], params: SamplingParams) -> float:
    found, right = drawn(logits, allowed, params)[0], wanted(logits, allowed, params)
    return max(abs(found.get(t, 0.0) - right.get(t, 0.0)) for t in found.keys() | right.keys())


some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.43, 1.0, 2.1]),
    min_p=st.sampled_from([0.0, 0.07, 0.51]),
    top_k=st.sampled_from([0, 0, 1, 2, 4, 7]),
    top_p=st.sampled_from([1.0, 1.0, 0.9137, 0.613, 0.287]),
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    logits=st.lists(st.sampled_from([-2.0, -1.0, -0.3, 0.4, 1.7, 2.9]), min_size=VOCAB, max_size=VOCAB),
    allowed=st.sets(st.integers(0, VOCAB - 1), min_size=1),
    params=some_params,
    asked_from=st.sampled_from([unmasked.ASKED_FROM, 0.1, 0.3]),
    most=st.sampled_from([unmasked.MOST_ASKED, 2]),
)
def test_each_token_has_the_probability_that_it_has_among_what_is_allowed(logits, allowed, params, asked_from, most):
    """With many ties among few values, and with so few asked that much is left to the second draw."""
    with patch.object(unmasked, "ASKED_FROM", asked_from), patch.object(unmasked, "MOST_ASKED", most):
        assert far_from(logits, allowed, params) < 1e-5


LOGITS, ALLOWED = [2.9, 1.7, 1.5, 0.4, -0.3, -1.0, -1.5, -2.0], {0, 2, 3, 5, 6}
KINDS = [{}, {"min_p": 0.05}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 6, "top_p": 0.8}]


@pytest.mark.parametrize("more", KINDS, ids=str)
def test_a_second_draw_is_as_seldom_as_a_refusal(more):
    params = SamplingParams(**more)
    kept = wanted(LOGITS, set(range(VOCAB)), params)
    refused = sum(share for token_id, share in kept.items() if token_id not in ALLOWED)

    assert drawn(LOGITS, ALLOWED, params)[1] <= refused + 1e-5


@pytest.mark.parametrize("more", KINDS, ids=str)
def test_what_the_first_draw_gave_is_not_given_again(more, monkeypatch):
    """With a second draw that gives all that is wanted once more the probabilities are others, where it matters."""
    monkeypatch.setattr(unmasked, "ASKED_FROM", 0.3)
    right = far_from(LOGITS, ALLOWED, SamplingParams(**more))
    draw = second_draw
    monkeypatch.setitem(globals(), "second_draw", lambda *args: draw(*args[:2], unmasked.FirstDraw(None), args[3]))

    assert right < 1e-5
    assert (far_from(LOGITS, ALLOWED, SamplingParams(**more)) > 1e-3) == ("top_k" in more or "top_p" in more)


@pytest.mark.parametrize(
    ("more", "most"), [({}, 1), ({"min_p": 0.05}, 2), ({"top_k": 5}, 1), ({"temperature": 0.0}, 1)], ids=str
)
def test_few_are_asked_about(more, most):
    asked = []
    first_draw(
        torch.tensor(LOGITS), 0, SamplingParams(**more), lambda ids: asked.extend(ids) or [True] * len(ids), lambda: 0.5
    )

    assert len(asked) == most
