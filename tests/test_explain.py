"""The explanation of a plan: bottleneck, value of more hardware, rejected alternatives, and the picture."""

import json

import pytest
from planning_models import llama_8b, tiny

from placement import HardwareProfile, Policy
from placement.explain import budget_curve, explain
from placement.plots import plot_predictions

EMULATED = HardwareProfile.named("emulated")


@pytest.fixture(scope="module")
def explanation():
    return explain(
        llama_8b(dtype="q4", context=4096),
        HardwareProfile.named("rtx3060-ddr4"),
        Policy(),
        device="cuda",
        gpu_memory_bytes=3 * 2**30,
    )


def test_the_bottleneck_is_one_sentence_with_shares(explanation):
    assert explanation.bottleneck.startswith("Decoding is bound by ") and explanation.bottleneck.endswith(").")
    assert "% busy" in explanation.bottleneck and "prefill is bound by" in explanation.bottleneck


def test_more_hardware_is_planned_again_and_never_hurts(explanation):
    labels = [gain.label for gain in explanation.gains]
    decode = explanation.plan.predicted.decode.tokens_per_s

    assert ["1 GiB more GPU memory", "PCIe twice as fast", "one more CPU thread"] == labels
    assert explanation.gains[0].decode_tokens_per_s > 1.1 * decode


def test_no_alternative_is_better_than_the_plan(explanation):
    predicted = explanation.plan.predicted
    others = {other.label: other for other in explanation.alternatives}

    assert {"policy cpu_only", "policy stream_only", "policy gpu_only", "policy host_attention"} <= set(others)
    assert "needs" in others["policy gpu_only"].note and others["policy gpu_only"].decode_tokens_per_s is None
    for other in explanation.alternatives:
        if other.decode_tokens_per_s is not None:
            worse_decode = other.decode_tokens_per_s <= predicted.decode.tokens_per_s * 1.001
            assert worse_decode or other.prefill_tokens_per_s < predicted.prefill.tokens_per_s, other


def test_text_and_json_carry_all_of_it(explanation):
    text = "\n".join(explanation.lines())
    values = json.loads(json.dumps(explanation.to_dict()))

    assert "what would help" in text and "alternatives rejected" in text and "whole layers on the GPU" in text
    assert {"plan", "bottleneck", "notes", "gains", "alternatives"} == set(values)


def test_without_a_gpu_only_threads_are_weighed():
    found = explain(tiny(), HardwareProfile.named("generic-cpu"), Policy(), device="cpu")

    assert (["one more CPU thread"], ()) == ([gain.label for gain in found.gains], found.alternatives)


def test_a_model_larger_than_the_machine_is_noted():
    found = explain(llama_8b(), HardwareProfile.named("generic-cpu"), Policy(), device="cpu")

    assert "of host memory; generic-cpu has 7.45 GiB" in found.notes[0]


def test_budget_curve_spans_the_useful_budgets_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    curve = budget_curve(tiny(), EMULATED, Policy(), device="emulated", steps=3)
    seconds = [plan.predicted.objective_s for plan in curve]

    plot_predictions(curve[1], curve, tmp_path / "speed.png")

    assert 4 == len(curve) and seconds == sorted(seconds, reverse=True)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
