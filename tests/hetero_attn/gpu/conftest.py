"""Toy models and plans of them that use all three lanes."""

from __future__ import annotations

import pytest

from placement.plan.plan import Plan
from tests.support.models.runtime import one_device_run, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("toy"), "mistral", layers=2, sliding_window=11)
    return one_device_run(path, "fp32", tokens=24, prompt_tokens=18)


@pytest.fixture
def plan(run) -> Plan:
    return uniform_plan(toy_workload(run.path, page_size=4, prefill_chunk=8), gpu=0.3, stream=0.4, gpu_kv_heads=1)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Without a window, so that older tokens move to DRAM and the prompt's later chunks read them on the GPU."""
    path = make_checkpoint(tmp_path_factory.mktemp("long"), "llama", layers=2)
    return one_device_run(path, "fp32", tokens=40, prompt_tokens=34)


@pytest.fixture
def long_plan(long_run) -> Plan:
    workload = toy_workload(long_run.path, page_size=4, prefill_chunk=8, max_batch=1)
    return uniform_plan(workload, gpu=0.3, stream=0.4, gpu_kv_heads=1)
