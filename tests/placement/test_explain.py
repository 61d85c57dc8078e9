"""The explanation of a plan: bottleneck, value of more hardware, rejected alternatives, and the picture."""

import json
import re
from dataclasses import replace

import pytest

from hetero_attn.cli.plots import plot_plan
from placement import HardwareProfile, Policy
from placement.explain.comparisons import SHAPE_WORDS
from placement.explain.explain import budget_curve, explain
from placement.machine.rates import AttentionRate
from placement.solve.make_plan import plan_with_alternatives
from placement.solve.request import requested
from tests.support.planning.planning_models import llama_8b, tiny, with_row_cuts

EMULATED = HardwareProfile.named("emulated")


@pytest.fixture(scope="module")
def explanation():
    return explain(
        llama_8b(dtype="q4", context=4096),
        replace(HardwareProfile.named("rtx3060-ddr4"), gpu_int8_ops_per_s=0.0),  # whose GPU prompts keep busy
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

    assert "what more hardware would bring" in text and "rejected" in text and "whole layers on the GPU" in text
    assert {"bottleneck", "notes", "gains", "losses", "alternatives"} == set(values) - set(explanation.plan.to_dict())


def test_without_a_gpu_only_threads_are_weighed():
    found = explain(tiny(), HardwareProfile.named("generic-cpu"), Policy(), device="cpu")

    assert (["one more CPU thread"], ()) == ([gain.label for gain in found.gains], found.alternatives)


def test_without_a_gpu_nothing_is_said_of_lanes_and_hand_overs():
    found = explain(tiny(), HardwareProfile.named("generic-cpu"), Policy(), device="cpu")
    text = "\n".join([found.plan.table(), *found.lines()])

    for word in ("hand-over", "PCIe", "GPU", "g/s/c", "pinned", "wait"):
        assert word not in text, text


def test_invented_and_estimated_rates_are_called_that():
    notes = [
        explain(tiny(), HardwareProfile.named(name), Policy(), device=device).notes[0]
        for name, device in (("emulated", "emulated"), ("generic-cpu", "cpu"))
    ]

    assert "invented rates" in notes[0] and "predict no GPU" in notes[0]
    assert "`hetero-attn profile` measures" in notes[1]


def test_a_change_too_small_to_see_is_called_the_same(explanation):
    text = "\n".join(explanation.lines())

    assert "(-0%)" not in text and "(+0%)" not in text


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_both_shapes_are_weighed_and_the_faster_is_the_plan(objective):
    wish, machine = Policy(objective=objective), HardwareProfile.named("rtx4090-ddr5")
    asked = requested(
        replace(llama_8b(context=4096), max_batch=4), machine, wish, device="cuda", gpu_memory_bytes=4 * 2**30
    )
    plan, found = plan_with_alternatives(asked)

    assert {True, False} == {candidate.concentrated for candidate in found}
    assert [candidate.seconds for candidate in found] == sorted(candidate.seconds for candidate in found)
    assert plan.predicted.objective_s == pytest.approx(found[0].seconds, rel=1e-3)


def test_losing_shapes_and_the_cut_not_chosen_are_shown():
    machine, workload = HardwareProfile.named("rtx4090-ddr5"), with_row_cuts(llama_8b(context=4096))
    found = explain(workload, machine, Policy(), device="cuda", gpu_memory_bytes=4 * 2**30)
    labels = " ".join(other.label for other in found.alternatives)

    assert {"few whole layers", "spread over all layers"} & set(
        re.findall("few whole layers|spread over all layers", labels)
    )
    assert re.search(r"\d+ whole layers on the GPU, rest CPU", labels)
    assert {"column", "paired"} - {found.plan.shape} == {name for name in SHAPE_WORDS if SHAPE_WORDS[name] in labels}


def test_rates_of_a_busy_machine_are_noted():
    machine = replace(HardwareProfile.named("rtx3060-ddr4"), source="measured")
    quiet, busy = (
        explain(tiny(), replace(machine, busy_share=share), Policy(), device="cuda").notes for share in (0.09, 0.43)
    )

    assert len(busy) == len(quiet) + 1 and "used 43% of the CPUs" in busy[0] and "of the CPUs" not in "".join(quiet)


def test_a_model_larger_than_the_machine_is_noted():
    found = explain(llama_8b(), HardwareProfile.named("generic-cpu"), Policy(), device="cpu")

    assert "of host memory; generic-cpu has 7.45 GiB" in found.notes[1]


def test_budget_curve_spans_the_useful_budgets_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    seen = []

    def watched(budgets):
        seen.extend(budgets)
        return budgets

    curve = budget_curve(tiny(), EMULATED, Policy(), device="emulated", steps=3, watched=watched)

    assert seen == [plan.gpu_memory_bytes for plan in curve]
    seconds = [plan.predicted.objective_s for plan in curve]

    plot_plan(curve[1], curve, tmp_path / "speed.png")

    assert 4 == len(curve) and seconds == sorted(seconds, reverse=True)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_formats_that_the_profile_has_not_met_are_named_with_whose_rates_are_taken():
    workload = tiny()
    first = replace(workload.linears[0], weight_format="q4_k*12+q6_k*4")
    mixed = replace(workload, linears=(first, *workload.linears[1:]))
    words = "planned are q4_k by those of q4, q6_k by those of q8"

    for shown, expected in ((mixed, True), (workload, False)):
        notes = explain(shown, EMULATED, Policy(), device="emulated", gpu_memory_bytes=2**30).notes
        assert any(words in note for note in notes) is expected


def test_where_the_model_fits_the_baseline_has_its_head_on_the_gpu_too():
    """With the head on the CPU it was 28 tokens/s for 8B in bf16, where people measure 52.6."""
    machine, workload = HardwareProfile.named("rtx4090-ddr5"), llama_8b(context=4096)
    found = explain(workload, machine, Policy(), device="cuda")
    baseline = next(other for other in found.alternatives if "whole layers" in other.label)

    assert found.plan.is_all_on_gpu and baseline.label == "whole layers on the GPU, and the head"
    assert baseline.decode_tokens_per_s == pytest.approx(found.plan.predicted.decode.tokens_per_s, rel=0.01)


@pytest.mark.parametrize(("size", "is_said"), [(16, False), (64, True)])
def test_heads_that_were_not_measured_are_said_to_go_by_others(size, is_said):
    rates = (AttentionRate(16, 2, size, 30e9, 1e12), AttentionRate(8.25, 2, 128, 30e9, 1e12))

    assert (stand_ins(tiny(), rates) == f"heads of 16 by those of {size}") == is_said


@pytest.mark.parametrize(
    ("kv_dtype", "heads_per_group", "said"),
    [
        ("bf16", 4, None),
        ("bf16", 8, "2 query heads per KV head by 8"),
        ("fp32", 4, "a fp32 cache by one in bf16"),
        ("fp32", 8, "a fp32 cache by one in bf16, 2 query heads per KV head by 8"),
    ],
)
def test_a_cache_that_was_not_measured_is_said_to_go_by_another(kv_dtype, heads_per_group, said):
    """Of a dtype that no profile measures, and of heads that share K and V as none of it do."""
    workload = replace(tiny(), kv_dtype=kv_dtype)

    assert stand_ins(workload, (AttentionRate(16, heads_per_group, 16, 30e9, 1e12),)) == said
    assert workload.caches == ((kv_dtype, 2, 16),)


def test_heads_of_which_none_shares_keys_are_said_to_go_by_others():
    workload = tiny(heads=2, kv_heads=2)

    assert stand_ins(workload, (AttentionRate(16, 4, 16, 30e9, 1e12),)) == "1 query head per KV head by 4"


def stand_ins(workload, rates):
    """Whose rates the plan says that attention goes by on a machine with these; None where it says nothing."""
    found = explain(
        workload, replace(HardwareProfile.named("generic-cpu"), cpu_attention=rates), Policy(), device="cpu"
    )
    before = "There are no rates of some of this model's attention for generic-cpu; planned are "
    after = ". `hetero-attn profile"
    notes = [note for note in found.notes if note.startswith(before)]
    return notes[0].removeprefix(before).partition(after)[0] if notes else None
