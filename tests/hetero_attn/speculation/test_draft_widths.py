"""How many drafts a pass gets: nearly the best number, none where they do not pay, and soon again where they do."""

import random
from types import SimpleNamespace

import pytest

from hetero_attn.engine.lane_report import LaneReport
from hetero_attn.speculation.speculator import Speculator
from hetero_attn.speculation.width import WIDTHS, PassCosts, Width, expected_tokens
from tests.support.planning.draft_costs import flat, measured


def simulated(right, tokens, seconds, seed=0, delayed=0.0):
    """(seconds that so many tokens take with a drafter that is right with a probability, seconds without).

    delayed: how often a pass is told to have taken up to three times as long, by other programs.
    """
    draw, width, costs, spent, made = random.Random(seed), Width(), PassCosts(), 0.0, 0
    while made < tokens:
        rows = width.choose(costs, 1)
        took = seconds(rows) * draw.uniform(0.98, 1.02)
        costs.observe(rows, took * (draw.uniform(1, 3) if draw.random() < delayed else 1))
        spent += took
        made += 1
        if rows > 1:
            accepted = 0
            while accepted < rows - 1 and draw.random() < right(made):
                accepted += 1
            width.judge(rows - 1, accepted)
            made += accepted
    return spent, made * seconds(1)


def test_one_token_that_came_before_is_a_kind_of_its_own():
    """Of an answer of a public checkpoint to prose a tenth of the tokens came behind such a match, drafted by nobody."""
    made = Speculator(LaneReport())
    measured(made.costs)
    request = a_request([1, 2, 3, 1])

    assert made.drafts([request], 16)[0][0] == 2 and "of 1 token" in request.speculation.reason


def with_catching_up(tokens, catching_up, acceptance, requests, step=0.6):
    """How fast requests are beside plain decoding, one after the other, with a drafter whose drafts take `step` of the
    time of a row, and which has to catch up with the text where it was not asked."""
    draw, costs, speeds = random.Random(0), PassCosts(step_share=0.3), []
    for _ in range(requests):
        width, made, spent, asked_at = Width(0.7), 0, 0.0, None
        while made < tokens:
            rows, drafts = width.choose(costs, 1), 0.0
            if rows > 1:
                drafts = step * (rows - 1) + (catching_up if asked_at != made else 0.0)
                costs.drafted(rows - 1, drafts)
            costs.observe(rows, flat(rows) + drafts)
            spent += flat(rows) + drafts
            accepted = 0
            while accepted < rows - 1 and draw.random() < acceptance:
                accepted += 1
            if rows > 1:
                width.judge(rows - 1, accepted)
            made += 1 + accepted
            asked_at = made if rows > 1 else None
        speeds.append(made / spent)
    return speeds


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8])
def test_a_drafter_that_has_to_catch_up_costs_little(acceptance):
    """A small model beside one as fast as it is was asked again every 8 passes, and read what it had missed: 0.83 of
    the plain speed over a first answer of 96 tokens, 0.90 over later ones."""
    first, *later = with_catching_up(96, 3.0, acceptance, requests=4, step=1.2)

    assert first >= 0.9 and min(later) >= 0.95


def test_ngrams_whose_first_passes_were_slow_are_tried_again_soon():
    """A clock that was wrong says nothing of a drafter that costs nothing: they were off for 67 passes."""
    width, costs = Width(0.8), PassCosts()
    measured(costs)
    for _ in range(3):
        costs.observe(2, 5.0)

    assert width.choose(costs, 1) == 1 and width.pause <= 8


@pytest.mark.parametrize(("dearer", "least", "most"), [(0.03, 4, 12), (0.5, 25, 60)])
def test_a_pause_is_as_long_as_trying_is_dear(dearer, least, most):
    """It was 32 passes, whatever a pass with drafts took: where four rows took 1.03 times one, 16 of 38 passes of a text
    that repeats itself had no drafts."""
    width, costs = Width(0.2), PassCosts()
    for rows in 3 * (1, *WIDTHS):
        costs.observe(rows, 1.0 if rows == 1 else 1 + dearer)
    while width.pause == 0:
        if (rows := width.choose(costs, 1)) > 1:
            width.judge(rows - 1, 0)

    assert least <= width.pause <= most


def test_what_drafts_cost_is_known_before_wide_passes_are_tried():
    costs = PassCosts(step_share=0.1)
    measured(costs)
    believed = costs.seconds(8)
    for seconds in (9.0, 2.0, 1.8):  # the first draft reads the prompt
        costs.drafted(2, seconds)

    assert believed < 2.3 and costs.seconds(8) == pytest.approx(flat(8) + 7 * 0.9)


def steep(rows):
    return 1 + 0.6 * (rows - 1)


@pytest.mark.parametrize("tokens", [96, 512])
@pytest.mark.parametrize("seconds", [flat, steep])
def test_a_drafter_that_is_always_wrong_costs_at_most_three_per_cent(seconds, tokens):
    spent, plain = simulated(lambda made: 0.0, tokens, seconds)

    assert spent <= 1.03 * plain


@pytest.mark.parametrize("acceptance", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_the_width_is_nearly_as_good_as_the_best_fixed_one(acceptance):
    spent, plain = simulated(lambda made: acceptance, 4096, flat)
    best = max(expected_tokens(acceptance, rows) / flat(rows) for rows in (1, *WIDTHS))

    assert plain / spent >= 0.9 * best


def test_a_clock_that_other_programs_disturb_turns_no_drafts_off():
    """One slow pass among quick ones once paused them for 32 passes, though four of five drafts were right."""
    best, gains = max(expected_tokens(0.8, rows) / flat(rows) for rows in WIDTHS), []
    for seed in range(12):
        spent, plain = simulated(lambda made: 0.8, 512, flat, seed, delayed=0.3)
        gains.append(plain / spent)

    assert sum(gains) / len(gains) >= 0.89 * best


def test_after_a_jump_of_acceptance_drafts_come_back():
    bad, plain = simulated(lambda made: 0.0, 2048, flat)
    better, all_plain = simulated(lambda made: 0.0 if made < 2048 else 0.9, 8192, flat)

    assert better - bad <= 0.6 * (all_plain - plain)


def test_a_time_that_was_measured_wrongly_is_measured_again():
    """A pass that another program delayed kept drafts off for ever."""
    width, costs, made = Width(), PassCosts(), []
    for rows in (1, 1, *(4 * WIDTHS)):
        costs.observe(rows, flat(rows) if rows == 1 else 10 * flat(rows))
    for _ in range(4000):
        made.append(width.choose(costs, 1))
        costs.observe(made[-1], flat(made[-1]))
        if made[-1] > 1:
            width.judge(made[-1] - 1, made[-1] - 1)

    assert made[0] == 1 and made[-1] > 1


def test_dear_rows_are_never_wide_and_cheap_ones_are():
    for seconds, widest in ((steep, 2), (flat, 16)):
        width, costs = Width(), PassCosts()
        for rows in 4 * (1, *WIDTHS):
            costs.observe(rows, seconds(rows))
        for _ in range(100):
            rows = width.choose(costs, 1)
            width.judge(rows - 1, rows - 1)

        assert (rows <= widest) if widest == 2 else rows == widest


def test_a_full_batch_gets_no_drafts():
    made = Speculator(LaneReport(), lambda: SimpleNamespace(draft=lambda prompt, generated, count: [1] * count))
    measured(made.costs)
    requests = [SimpleNamespace(prompt_token_ids=(), token_ids=[], max_tokens=9, speculation=None) for _ in range(4)]

    assert made.drafts(requests, 4) == [[]] * 4 and "full" in requests[0].speculation.reason
    assert sum(map(len, made.drafts(requests, 7))) <= 3


def a_request(prompt=(), max_tokens=1000):
    return SimpleNamespace(prompt_token_ids=tuple(prompt), token_ids=[], max_tokens=max_tokens, speculation=None)


def pass_by_pass(speculator, request, passes, right):
    """How many drafts each pass of a request has, all of them right or all wrong; a pass takes as long as `flat`."""
    counts = []
    for _ in range(passes):
        (drafts,) = speculator.drafts([request], 16)
        speculator.costs.observe(1 + len(drafts), flat(1 + len(drafts)))
        if drafts:
            speculator.judge(request, len(drafts), len(drafts) if right else 0)
        request.token_ids += [*drafts, 0] if right else [0]
        counts.append(len(drafts))
    return counts


def test_a_request_begins_with_what_those_before_it_taught():
    draft = SimpleNamespace(draft=lambda prompt, generated, count: [1] * count)
    wrong, right = (Speculator(LaneReport(), lambda: draft) for _ in range(2))
    first, second = (pass_by_pass(wrong, a_request(), 32, right=False) for _ in range(2))

    assert not any(second[:4]) and first.count(0) < second.count(0)
    first, second = (pass_by_pass(right, a_request(), 12, right=True) for _ in range(2))
    assert first[0] < first[-1] == second[0]


def test_kinds_of_matches_are_judged_apart():
    """Short matches that are never right leave the long ones as they are."""
    made = Speculator(LaneReport())
    measured(made.costs)
    text = [token for block in range(200) for token in (1, 2, 10 + block)]  # 1, 2 comes again and goes on otherwise
    for place in range(5, len(text), 3):
        request = a_request(text[:place])
        (drafts,) = made.drafts([request], 16)
        if drafts:
            made.judge(request, len(drafts), 0)
    assert made.drafts([a_request(text[:5])], 16) == [[]]

    (drafts,) = made.drafts([a_request([*range(20, 40), *range(20, 30)])], 16)
    assert drafts == list(range(30, 30 + len(drafts))) and drafts


def test_reasons_say_what_was_decided():
    report = LaneReport()
    made = Speculator(report)
    for prompt, left, why in [([1, 2, 3], 99, "did not occur"), ([1, 2, 1, 2], 1, "the last"), ([1, 2, 1, 2], 99, "%")]:
        request = a_request(prompt, left)
        made.drafts([request], 16)
        assert why in request.speculation.reason == report.drafts.reason


def test_a_drafter_that_has_none_is_no_decision_for_drafts():
    """A small model whose context is full makes none; a report said that it had drafted."""
    report = LaneReport()
    made = Speculator(report, lambda: SimpleNamespace(draft=lambda prompt, generated, count: []))
    measured(made.costs)
    request = a_request()

    assert made.drafts([request], 16) == [[]]
    assert "had none" in request.speculation.reason == report.drafts.reason
    assert report.drafts.decisions == {"none made": 1}
