"""Hand-overs between GPU and host worker: failures release the GPU, a stuck side is named, the choice says why."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_cuda import fake_driver
from runtime import THREADS

from cpu_kernels import CpuKernels
from hetero_attn.devices import Device, EmulatedDriver
from hetero_attn.errors import EngineDeadError, UnsupportedModelError
from hetero_attn.flag_handover import FlagHandover
from hetero_attn.handover_choice import choose_handover
from hetero_attn.step_tables import StepTables

WATCHDOG_S = 0.2


@pytest.fixture(scope="module")
def kernels():
    with CpuKernels(THREADS) as kernels:
        yield kernels


@pytest.fixture
def device():
    driver = fake_driver(1 << 16)
    yield Device(driver, 1 << 16)
    driver.close()
    driver.fake.stop()


@pytest.fixture
def worker():
    with ThreadPoolExecutor(1) as worker:
        yield worker


def done(device: Device) -> None:
    """Wait until the GPU has run everything; raises within 20 s if it cannot."""
    device.synchronize(device.record(device.compute))


@pytest.fixture
def flags(device, worker, kernels):
    return FlagHandover(device, worker, kernels, captures=True, watchdog_s=WATCHDOG_S)


def fail() -> None:
    raise ZeroDivisionError("planted")


def test_a_flag_carries_what_was_written_before(kernels):
    flag, seen = torch.zeros(1, dtype=torch.int64), []
    waiter = threading.Thread(target=lambda: seen.append(kernels.await_flag(flag, 5, 20.0)))
    waiter.start()
    kernels.set_flag(flag, 4)
    kernels.set_flag(flag, 5)
    waiter.join()

    assert seen == [True]
    assert not kernels.await_flag(flag, 6, 0.001)


def test_a_failed_job_does_not_leave_the_gpu_waiting(device, flags):
    flags.submit(fail, True)
    flags.order_device()
    with pytest.raises(ZeroDivisionError, match="planted"):
        flags.join()

    done(device)


def test_the_counter_may_wrap(device, flags):
    flags._given = flags._ordered = 0xFFFFFFFE
    for _ in range(4):
        flags.submit(lambda: None, False)
        flags.order_device()
    flags.join()

    done(device)


def test_a_job_that_does_not_end_is_named_and_the_gpu_released(device, flags):
    never = threading.Event()
    flags.submit(lambda: never.wait(20), False)
    flags.order_device()
    with pytest.raises(EngineDeadError, match="did not end within 0.2 s"):
        flags.join()

    done(device)
    never.set()


def captured(device: Device, flags: FlagHandover, jobs: list) -> tuple:
    """A graph of (job, hand back) for each of `jobs`."""
    with device.current(), flags.record() as recorded, device.capture() as graph:
        for job in jobs:
            flags.submit(job, True)
            flags.order_device()
    return graph, recorded


def test_a_captured_step_runs_its_jobs_in_order_every_time(device, flags):
    ran = []
    graph, recorded = captured(device, flags, [lambda: ran.append("a"), lambda: ran.append("b")])
    for _ in range(3):
        flags.replay(recorded)
        with device.current():
            graph.replay()
        flags.join()
        done(device)

    assert ran == ["a", "b"] * 3


def test_a_captured_step_whose_job_fails_runs_to_its_end_and_can_run_again(device, flags):
    works = [False]
    graph, recorded = captured(device, flags, [lambda: works[0] or fail(), lambda: None])
    for works[0] in (False, True):
        flags.replay(recorded)
        with device.current():
            graph.replay()
        if works[0]:
            flags.join()
        else:
            with pytest.raises(ZeroDivisionError):
                flags.join()
        done(device)


def test_a_gpu_that_never_asks_is_named(device, flags):
    _, recorded = captured(device, flags, [lambda: None])
    flags.replay(recorded)
    with pytest.raises((EngineDeadError), match="GPU did not ask|did not end"):
        flags.join()


def choose(wish: str, device: Device, worker: ThreadPoolExecutor, kernels: CpuKernels) -> str:
    return choose_handover(wish, device, worker, kernels, StepTables(device, 1024)).name


@pytest.mark.parametrize(
    "wish,chosen", [("auto", "graph"), ("graph", "graph"), ("flags", "flags"), ("events", "events")]
)
def test_the_fastest_that_works_is_chosen(device, worker, kernels, wish, chosen):
    assert choose(wish, device, worker, kernels) == chosen


def test_auto_leaves_out_what_fails_and_says_so(device, worker, kernels, monkeypatch):
    def no_capture(stream):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device.driver, "capture", no_capture)
    with pytest.warns(UserWarning, match=r"graph does not work on this device \(operation not permitted"):
        assert choose("auto", device, worker, kernels) == "flags"
    with pytest.raises(UnsupportedModelError, match="use 'auto'"):
        choose("graph", device, worker, kernels)


def test_an_emulated_gpu_uses_events_and_an_unknown_wish_is_refused(worker, kernels):
    emulated = Device(EmulatedDriver())

    assert choose("auto", emulated, worker, kernels) == "events"
    assert choose("flags", emulated, worker, kernels) == "flags"
    with pytest.raises(UnsupportedModelError, match="did you mean 'graph'"):
        choose("graphs", emulated, worker, kernels)


def test_the_gpu_waits_for_every_replays_own_job(device, flags):
    """The flags of the replay before are gone when a step runs again: what they said is over."""
    seen = []
    graph, recorded = captured(
        device, flags, [lambda: seen.append((recorded[0].request.item(), recorded[0].done.item()))]
    )
    for _ in range(2):
        flags.replay(recorded)
        with device.current():
            graph.replay()
        flags.join()
        done(device)

    assert seen == [(1, 0), (1, 0)]
