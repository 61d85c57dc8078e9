"""Which GPU is taken, what of it CUDA itself takes, and the smallest budget that works."""

from __future__ import annotations

import pytest

from hetero_attn.devices import machine
from hetero_attn.errors import MemoryBudgetError, UnsupportedModelError
from hetero_attn.planning import choices as planning
from placement import BudgetError, Policy, make_plan
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import rounded_input_bytes
from tests.support.models.runtime import toy_workload
from tests.support.planning.recorded_runs import recorded_runs


class OneGpu:
    """What `machine` asks of `torch.cuda` where there is one GPU of a known name."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_device_name(index: int) -> str:
        return "NVIDIA H200"

    @staticmethod
    def get_device_properties(index: int):
        return type("Properties", (), {"total_memory": 123 << 30})


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(machine.torch, "cuda", OneGpu)
    monkeypatch.setattr(machine, "context_bytes", lambda index: 400 << 20)


@pytest.mark.parametrize("device,found", [("cuda:1", "1 GPU"), ("cuda:x", "1 GPU")])
def test_a_gpu_that_is_not_there_is_refused(one_gpu, device, found):
    with pytest.raises(UnsupportedModelError, match=found):
        machine.device_index(device)


def test_without_a_gpu_the_error_names_what_works(run):
    with pytest.raises(UnsupportedModelError, match="torch sees no CUDA GPU; use device='cpu' or 'emulated'"):
        machine.device_index("cuda")


def test_auto_takes_the_gpu_where_there_is_one(one_gpu):
    assert planning.choose_device("auto", None) == "cuda"
    assert planning.choose_device("cpu", None) == "cpu"
    assert planning.choose_device("auto", HardwareProfile.named("generic-cpu")) == "cpu"


def test_an_unmeasured_gpu_is_planned_with_its_catalogue_entry(one_gpu):
    with pytest.warns(UserWarning, match="run `hetero-attn profile`"):
        profile = machine.gpu_profile(0, stored=None)

    assert (profile.name, profile.gpu_memory_bytes) == ("h200-server", 123 << 30)


def test_what_cuda_takes_is_part_of_the_budget(run, one_gpu):
    """With the reserve in the plan, arena and reserve are the plan's bytes; without it the plan is refused."""
    workload = toy_workload(run.path)
    hardware = machine.with_own_bytes(HardwareProfile.named("rtx3060-ddr4"), "cuda")
    plan = make_plan(workload, hardware, Policy(), device="cuda", gpu_memory_bytes=1 << 30)
    arena = machine.arena_bytes(plan, 0)

    assert hardware.gpu_context_bytes > 400 << 20
    assert arena + hardware.gpu_context_bytes + rounded_input_bytes(workload) == plan.memory.gpu_bytes <= 1 << 30
    unaware = make_plan(
        workload, HardwareProfile.named("rtx3060-ddr4"), Policy(), device="cuda", gpu_memory_bytes=1 << 30
    )
    with pytest.raises(MemoryBudgetError, match="gpu_memory of at least"):
        machine.arena_bytes(unaware, 0)


def test_what_is_kept_for_cuda_and_torch_is_what_they_took_of_an_h100():
    """By the plan's own bytes: `context` was CUDA's at the load, 256 MiB, 1 of slack and a linear's rounded input."""
    for run in recorded_runs():
        memory, rounded = run.measured["memory"], rounded_input_bytes(run.plan.workload)
        by_torch = memory["reserved_bytes"] - memory["arena_peak_bytes"] - rounded
        at_load = memory["gpu_memory"] - memory["arena_peak_bytes"] - rounded - (257 << 20)
        by_cuda = memory["used_bytes"] - memory["reserved_bytes"] - at_load
        assert 300 << 20 < by_torch <= machine.TEMPORARY_BYTES, run.name
        assert 50 << 20 < by_cuda <= machine.LATE_CUDA_BYTES, run.name


def test_a_budget_below_cudas_own_says_the_smallest_that_works(run, one_gpu):
    workload = toy_workload(run.path)
    hardware = machine.with_own_bytes(HardwareProfile.named("rtx3060-ddr4"), "cuda")
    with pytest.raises(BudgetError, match="smallest|at least"):
        make_plan(workload, hardware, Policy(), device="cuda", gpu_memory_bytes=100 << 20)
