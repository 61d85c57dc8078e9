"""The wishes of a load: one list of them, settled in one place."""

import inspect
from dataclasses import fields

import pytest

from hetero_attn import LLM, Policy, plan_model
from hetero_attn.planning.draft import settle_drafted
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from placement.solve.make_plan import plan_requested
from placement.solve.request import requested
from tests.support.models.toy import make_checkpoint


def test_the_arguments_of_a_load_are_the_options_with_the_same_defaults():
    options = {field.name: field.default for field in fields(LoadOptions) if field.name != "model"}
    for function in (LLM, plan_model):
        given = {item.name: item.default for item in inspect.signature(function).parameters.values()}
        wishes = {name: default for name, default in given.items() if name != "model"}

        assert wishes == {name: options[name] for name in wishes}
    assert set(inspect.signature(LLM).parameters) == {field.name for field in fields(LoadOptions)}


@pytest.mark.parametrize("option", ["option", "policy"])
def test_every_size_arrives_in_the_plan_and_nowhere_else(tmp_path, option):
    path, sizes = make_checkpoint(tmp_path, "llama"), {"context": 48, "batch": 3, "kv_tokens": 96, "kv_dtype": "q8"}
    if option == "policy":
        wishes = LoadOptions(model=path, device="cpu", policy=Policy(prefill_chunk=16, **sizes))
    else:
        names = {"context": "max_context", "batch": "max_batch"}
        said = {names.get(key, key): value for key, value in sizes.items()}
        wishes = LoadOptions(model=path, device="cpu", policy=Policy(prefill_chunk=16, context=17), **said)
    planned = settle(wishes)
    workload = planned.plan.workload

    assert (workload.max_context, workload.max_batch, workload.kv_tokens) == (48, 3, 96)
    assert (workload.kv_dtype, workload.prefill_chunk) == ("q8", 16)
    assert planned.policy == planned.policy.without_sizes()


@pytest.mark.parametrize(
    ("option", "key", "value", "other"),
    [
        ("num_threads", "threads", 1, 2),
        ("elastic", "elastic", True, False),
        ("gpu_memory", "gpu_memory", 1 << 20, 1 << 22),
    ],
)
def test_an_option_is_a_key_of_the_policy_and_goes_before_it(tmp_path, option, key, value, other):
    path = make_checkpoint(tmp_path, "llama")

    def planned(policy, **options):
        return settle(LoadOptions(model=path, device="emulated", max_context=64, policy=policy, **options)).plan

    said, written = planned(Policy(**{key: other}), **{option: value}), planned(Policy(**{key: value}))

    assert said == written != planned(Policy(**{key: other}))


@pytest.mark.parametrize(
    ("option", "key", "wish"), [(None, "ngram", "ngram"), ("off", "ngram", "off"), ("auto", "off", "auto")]
)
def test_who_drafts_is_settled_with_the_plan(tmp_path, option, key, wish):
    path = make_checkpoint(tmp_path, "llama")
    wishes = LoadOptions(model=path, device="cpu", max_context=64, policy=Policy(speculate=key), speculate=option)
    drafted = settle_drafted(wishes)

    assert drafted.wish == wish and bool(drafted.why_off) == (wish == "off") == (drafted.rates is None)
    with LLM(path, device="cpu", max_context=64, policy=Policy(speculate=key), speculate=option, progress=False) as llm:
        assert (llm._scheduler.speculator is None) == (wish == "off")


def test_a_plan_is_written_with_who_drafts(tmp_path):
    """A model's path needs quotes; both models' budget is one."""
    path, small = (make_checkpoint(tmp_path / name, "llama") for name in ("large", "a: small#1"))
    wishes = LoadOptions(model=path, device="emulated", gpu_memory="2MiB", max_context=64, speculate=small)
    drafted = settle_drafted(wishes)
    policy = Policy.parse(drafted.planned.plan.to_yaml())

    assert policy.speculate == str(small) and policy.gpu_memory == 2 << 20
    again = settle_drafted(LoadOptions(model=path, device="emulated", policy=policy))
    assert again.wish == drafted.wish and again.draft is not None
    assert again.planned.plan == drafted.planned.plan


def test_a_request_to_the_planner_leaves_nothing_open(tmp_path):
    path = make_checkpoint(tmp_path, "llama")
    planned = settle(LoadOptions(model=path, device="emulated", max_context=64))
    asked = requested(planned.workload, planned.hardware, planned.policy, device="emulated")
    again = requested(asked.workload, asked.hardware, asked.policy, device="emulated")

    assert None not in (asked.gpu_memory_bytes, asked.staging_slots, asked.workload.elastic)
    assert (again.workload, again.limits, again.staging_slots) == (asked.workload, asked.limits, asked.staging_slots)
    assert plan_requested(asked) == planned.plan
