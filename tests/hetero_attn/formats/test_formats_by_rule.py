"""Weight formats that a policy asks for by shard: planned, shown, written down again, and run on every lane."""

import pytest
import torch

from hetero_attn import LLM, Policy
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from placement import PolicyError
from tests.support.models.runtime import nmse
from tests.support.models.toy import make_checkpoint

TOKENS = torch.randint(260, (24,), generator=torch.Generator().manual_seed(5)).tolist()
DOWN_IN_Q8 = "version: 1\nrules:\n  - {match: layers.*.down, dtype: q8}\n"
CUT = "version: 1\nrules:\n  - {match: layers.1.down, dtype: q8}\n  - {match: layers.*, gpu: 0.5, stream: 0.25, cpu: 0.25}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("toy"), layers=2)


def settled(model, text, dtype="bf16", **options):
    policy = Policy.parse(text)
    return settle(LoadOptions(model=model, policy=policy, dtype=dtype, max_context=64, num_threads=2, **options))


def logits(model, text, dtype="bf16", **options):
    policy = Policy.parse(text)
    with LLM(model, policy=policy, dtype=dtype, max_context=64, num_threads=2, progress=False, **options) as llm:
        return llm.logits(TOKENS)


def formats(planned):
    workload = planned.plan.workload
    return {shard.name: workload.format_of(shard) for shard in workload.linears}


def test_a_rule_changes_the_linears_that_it_matches_and_no_other(model):
    found = formats(settled(model, DOWN_IN_Q8, device="cpu"))

    assert {name: dtype for name, dtype in found.items() if dtype != "bf16"} == {
        "layers.0.down": "q8",
        "layers.1.down": "q8",
    }


def test_the_first_rule_that_says_a_dtype_decides_and_shares_are_another_matter(model):
    text = (
        "version: 1\nrules:\n  - {match: layers.0.*, gpu: 1.0}\n  - {match: layers.0.down, dtype: q4}\n"
        "  - {match: '*.down', dtype: q8}\n"
    )
    planned = settled(model, text, device="emulated")

    assert (formats(planned)["layers.0.down"], formats(planned)["layers.1.down"]) == ("q4", "q8")
    down = planned.plan.linear("layers.0.down")
    assert down.gpu_units == down.units


def test_table_json_and_policy_of_a_plan_say_the_format(model):
    plan = settled(model, DOWN_IN_Q8, device="cpu").plan

    rows = {line.split()[0]: line.split()[-1] for line in plan.table(100).splitlines() if line.startswith("layers.")}
    assert rows["layers.0-1.down"] == "q8" and rows["layers.0-1.qkv"] == "bf16"
    assert {entry["weight_format"] for entry in plan.to_dict()["linears"]} == {"bf16", "q8"}
    assert formats(settled(model, plan.to_yaml(), device="cpu")) == formats(settled(model, DOWN_IN_Q8, device="cpu"))


def test_a_narrow_table_names_the_formats_below(model):
    plan = settled(model, CUT, device="emulated").plan

    assert "layers.1.down q8" in plan.table(80)


def test_without_a_mixture_the_table_has_no_such_column(model):
    assert "weights  " not in settled(model, "version: 1\n", device="cpu").plan.table(120).splitlines()[1]


def test_rules_for_every_linear_are_the_same_as_the_dtype(model):
    everything = "version: 1\nrules:\n  - {match: '*', dtype: q8}\n"

    assert torch.equal(logits(model, everything, device="cpu"), logits(model, "version: 1\n", device="cpu", dtype="q8"))


def test_a_rule_outranks_the_option_and_shows_in_the_answer(model):
    mixed, plain = logits(model, DOWN_IN_Q8, device="cpu"), logits(model, "version: 1\n", device="cpu")

    assert 0 < nmse(mixed, plain) < 1e-3
    assert formats(settled(model, DOWN_IN_Q8, device="cpu", dtype="fp32"))["layers.0.down"] == "q8"


def test_lanes_agree_on_a_mixture(model):
    expected = logits(model, "version: 1\nrules:\n  - {match: layers.1.down, dtype: q8}\n", device="cpu")

    assert nmse(logits(model, CUT, device="emulated"), expected) <= 1e-4


def test_what_no_rule_can_ask_for_is_refused_with_its_place(model):
    with pytest.raises(PolicyError, match=r"3:23: rules\[0\]\.dtype: 'q5': must be one of fp32, bf16, q8, q4 or auto"):
        Policy.parse("version: 1\nrules:\n  - {match: '*.down', dtype: q5}\n")
    with pytest.raises(PolicyError, match="the embedding is always in host memory"):
        settled(model, "version: 1\nrules:\n  - {match: embed, dtype: q8}\n", device="cpu")
    with pytest.raises(PolicyError, match="rules.*decides nothing"):
        settled(model, DOWN_IN_Q8 + "  - {match: layers.0.down, dtype: q4}\n", device="cpu")
