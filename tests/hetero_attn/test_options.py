"""The wishes of a load: one list of them, settled in one place."""

import inspect
from dataclasses import fields

import pytest

from hetero_attn import LLM, Policy, plan_model
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from tests.support.toy import make_checkpoint

OF_THE_RUN = {
    "self",
    "seed",
    "max_waiting",
    "prefix_cache",
    "overlap",
    "handover",
    "progress",
    "needs_text",
    "speculate",
}  # they leave the plan as it is


def test_the_arguments_of_a_load_are_the_options_with_the_same_defaults():
    options = {field.name: field.default for field in fields(LoadOptions) if field.name != "model"}
    for function in (LLM.__init__, plan_model):
        given = {item.name: item.default for item in inspect.signature(function).parameters.values()}
        wishes = {name: default for name, default in given.items() if name not in OF_THE_RUN | {"model"}}

        assert wishes == {name: options[name] for name in wishes}
    assert set(inspect.signature(LLM).parameters) - OF_THE_RUN == {field.name for field in fields(LoadOptions)}


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
