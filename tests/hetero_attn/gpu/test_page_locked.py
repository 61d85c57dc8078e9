"""What is page-locked, in which order, what a refusal costs, and how it is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hetero_attn.cache.cache import KVCache
from hetero_attn.devices import Device
from hetero_attn.engine import build as builder
from hetero_attn.engine.engine import Engine
from placement.plan.plan import Plan
from tests.support.gpu.fake_driver import fake_driver
from tests.support.gpu.fake_engine import fake_engine
from tests.support.models.runtime import emulated_plan, nmse, run_logits, toy_workload, uniform_plan


def test_weights_that_cannot_be_page_locked_are_said_once(run, plan):
    with pytest.warns(UserWarning, match="refused to page-lock") as warned, fake_engine(run.path, plan, True):
        pass

    assert len([warning for warning in warned if "page-lock" in str(warning.message)]) == 1


def test_pages_that_move_are_page_locked_and_counted_as_planned(long_run, long_plan):
    """Pages of the GPU's heads, whole and nothing else of the cache; a copy of any of them is asynchronous."""
    with fake_engine(long_run.path, long_plan) as engine:
        device, groups = engine.lanes.device, engine.kv_cache.pools
        registered = device.driver._library._library.registered
        moving = [pages for group in groups for pages in (*group.spilled.k, *group.spilled.v)]
        staying = [pages for group in groups for pages in (*group.host.k, *group.host.v)]

        assert all(registered[pages.data_ptr()] >= pages.nbytes for pages in moving)
        assert not any(pages.data_ptr() in registered for pages in staying)
        assert sum(pages.nbytes for pages in moving) == long_plan.memory.pinned["kv"] == device.pinned.used_bytes["kv"]
        assert sum(pages.nbytes for pages in staying) == long_plan.memory.host["kv"]
        assert device.pinned.used_bytes["weights"] == long_plan.memory.pinned["weights"]
        assert not device.refused_pins
        actual = run_logits(engine, long_run.token_ids, long_run.prompt_tokens)
        assert engine.lanes.pages.copied_bytes > 0

    assert nmse(actual, long_run.logits) <= 1e-11
    assert device.pinned.total_bytes == 0
    assert registered == {}


def test_pages_that_cannot_be_page_locked_are_said_and_change_nothing_else(long_run, long_plan, monkeypatch):
    """The last bytes of the cache are over the budget; weights, which came first, go straight to the GPU."""

    def cache_over_budget(plan: Plan, device: Device, prefix_cache: bool) -> KVCache:
        device.pinned.budget_bytes = device.pinned.total_bytes + plan.memory.pinned["kv"] - 1
        return KVCache(plan, device, prefix_cache)

    def logits_of(engine: Engine) -> torch.Tensor:
        actual, device = run_logits(engine, long_run.token_ids, long_run.prompt_tokens), engine.lanes.device
        assert "kv" in device.refused_kinds and "weights" not in device.refused_kinds
        assert device.pinned.used_bytes["weights"] == long_plan.memory.pinned["weights"]
        assert device.pinned.used_bytes["kv"] < long_plan.memory.pinned["kv"]
        assert "staging" not in device.pinned.used_bytes and engine.lanes.ring.copied_bytes > 0
        return actual

    monkeypatch.setattr(builder, "KVCache", cache_over_budget)
    message = "page-locked memory: kv needs .* raise pinned_memory .* what is not page-locked is copied"
    with pytest.warns(UserWarning, match=message) as warned, fake_engine(long_run.path, long_plan) as engine:
        actual = logits_of(engine)

    assert len([warning for warning in warned if "page-locked" in str(warning.message)]) == 1
    assert nmse(actual, long_run.logits) <= 1e-11
    assert engine.lanes.device.pinned.total_bytes == 0


@pytest.mark.table
@pytest.mark.filterwarnings("ignore:the system refused")
@pytest.mark.parametrize("handover", ["events", "flags", "graph"])
@pytest.mark.parametrize(
    "kinds", [("weights", "staging"), ("activations", "resident"), ("kv",)], ids=lambda kinds: kinds[0]
)
def test_ordinary_memory_of_one_kind_changes_no_answer(long_run, long_plan, monkeypatch, kinds, handover):
    """What a copy reads when it is queued must be there: weights captured in a graph once were those of a buffer, and a
    copy of activations that was queued ahead by flags took them before the CPU lane had written them."""
    pin = Device._pin

    def pin_others(self: Device, tensor: torch.Tensor, kind: str) -> None:
        if kind in kinds:
            self._refuse(f"the system refused to page-lock {kind}", kind, tensor)
        else:
            pin(self, tensor, kind)

    monkeypatch.setattr(Device, "_pin", pin_others)
    with fake_engine(long_run.path, long_plan, handover=handover) as engine:
        actual = run_logits(engine, long_run.token_ids, long_run.prompt_tokens)
        assert engine.lanes.device.refused_kinds == set(kinds) and engine.lanes.handover.name == handover
        assert engine.forward.can_replay(0) == (handover == "graph" and kinds == ("kv",))

    assert nmse(actual, long_run.logits) <= 1e-11


@pytest.mark.filterwarnings("ignore:the system refused")
def test_weights_that_only_prompts_stream_may_be_refused_without_giving_up_captured_steps(long_run, monkeypatch):
    """One refused weight once turned every captured step off, whether or not the step streamed it."""
    workload = toy_workload(long_run.path, page_size=4, prefill_chunk=8, max_batch=1)
    plan = uniform_plan(workload, gpu=0.3, stream=0.4, gpu_kv_heads=1)
    linears = [replace(linear, stream_units=(0, *linear.stream_units[1:])) for linear in plan.linears]
    pin = Device._pin

    def pin_others(self: Device, tensor: torch.Tensor, kind: str) -> None:
        if kind == "weights":
            self._refuse("the system refused to page-lock weights", kind, tensor)
        else:
            pin(self, tensor, kind)

    monkeypatch.setattr(Device, "_pin", pin_others)
    with fake_engine(long_run.path, emulated_plan(workload, linears, plan.kv), handover="graph") as engine:
        actual = run_logits(engine, long_run.token_ids, long_run.prompt_tokens)
        assert engine.forward.replay._captured and [engine.forward.can_replay(tier) for tier in (0, 2)] == [True, False]

    assert nmse(actual, long_run.logits) <= 1e-11


def test_what_hands_over_is_page_locked_before_weights(long_run, long_plan, monkeypatch):
    """Under a small limit of the system weights are refused, not the flags and activations that every step needs."""
    kinds, pin = [], Device._pin

    def noted(self: Device, tensor: torch.Tensor, kind: str) -> None:
        kinds.append(kind)
        pin(self, tensor, kind)

    monkeypatch.setattr(Device, "_pin", noted)
    with fake_engine(long_run.path, long_plan, handover="graph") as engine:
        run_logits(engine, long_run.token_ids, long_run.prompt_tokens)
    first = kinds.index("weights")

    assert {"flags", "tables", "activations", "resident"} == set(kinds[:first]) - {"loading"}
    assert not {"flags", "tables", "activations", "resident"} & set(kinds[first:])


def test_memory_that_is_no_longer_page_locked_is_copied_by_the_engine():
    driver = fake_driver(1 << 16)
    device, ran = Device(driver, 1 << 16), []
    driver.ops = type("Ops", (), {"copy_rows": lambda target, source: ran.append(1)})
    host, on_device = device.host_empty((16,), torch.float32, "a"), device.empty((16,), torch.float32, "a")
    with device.current():
        device.copy(on_device, host, device.compute)
        device.host_release(host, "a")
        device.copy(on_device, host, device.compute)

    assert len(ran) == 1
    driver.close()
    driver.fake.stop()


def test_a_pin_budget_is_kept():
    driver = fake_driver(1 << 16)
    device = Device(driver, 1 << 16, pin_budget_bytes=8192)
    with pytest.warns(UserWarning, match="pinned_memory"):
        device.host_empty((10_000,), torch.uint8, "weights")

    assert (device.pinned.total_bytes, device.refused_pins) == (0, True)
    driver.close()
    driver.fake.stop()


@pytest.mark.parametrize("by_system", [True, False], ids=["system", "budget"])
def test_what_cannot_all_be_page_locked_is_page_locked_in_part_and_says_how_much(by_system):
    """Five eighths fit; a piece that reaches beyond them passes the small buffer, and all is counted and given back."""
    size, room = 8 << 20, (5 << 20) + 12_345
    driver = fake_driver(1 << 16)
    library = driver._library._library
    register = library._cuMemHostRegister
    library._cuMemHostRegister = lambda address, count, flags: (
        304 if by_system and sum(library.registered.values()) + count > room else register(address, count, flags)
    )
    device = Device(driver, 1 << 16, pin_budget_bytes=None if by_system else room)
    with pytest.warns(UserWarning, match=r"\(5.00 MiB of it are\); what is not page-locked is copied"):
        tensor = device.host_empty((size,), torch.uint8, "weights")

    assert [*library.registered.values()] == [5 << 20] and device.pinned.used_bytes == {"weights": 5 << 20}
    pieces = [device.is_refused(tensor[start : start + (1 << 20)]) for start in range(0, size, 1 << 19)]
    assert pieces == [start > 4 << 20 for start in range(0, size, 1 << 19)]
    device.host_release(tensor, "weights")
    assert (device.pinned.total_bytes, library.registered, device.is_refused(tensor)) == (0, {}, False)
    driver.close()
    driver.fake.stop()
