"""Hand-overs between GPU and host worker: failures release the GPU, a stuck side is named, the choice says why."""

from __future__ import annotations

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import Pages, Partial, RowKeys
from hetero_attn.devices import Device, EmulatedDriver
from hetero_attn.errors import ArgumentError, EngineDeadError, UnsupportedModelError
from hetero_attn.lanes import handover_choice
from hetero_attn.lanes.flag_handover import FlagHandover
from hetero_attn.lanes.handover_choice import choose_handover
from hetero_attn.lanes.tables import StepTables
from tests.support.gpu.fake_driver import fake_driver
from tests.support.models.runtime import THREADS

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


def test_a_full_launch_queue_behind_a_parked_wait_does_not_stop_the_worker(device, flags):
    """A worker that waited in the driver for its next job's event stood behind the launching thread for ever."""
    cuda, ran = device.driver.fake, []

    def until_the_caller_is_parked() -> None:
        deadline = time.monotonic() + 10
        while not cuda.is_full and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)

    flags._watchdog_s = 20.0
    with device.current():
        for job in (until_the_caller_is_parked, lambda: ran.append("job")):
            flags.submit(job, True)
        flags.order_device()
        for _ in range(2 * cuda.queue_entries):
            cuda.current.add(lambda: None)
        cuda.current.add(lambda: ran.append("gpu"))
    flags.join()
    done(device)

    assert cuda.queue_entries == 1000
    assert ran == ["job", "gpu"]


def test_the_caller_runs_two_layers_ahead_of_the_worker_and_no_more(device, flags):
    """Layer n is begun once the jobs of layer n - 2 have ended; the queue holds two layers, however long the prompt."""
    gates, begun = [threading.Event() for _ in range(6)], []

    def queue_layers() -> None:
        for layer, gate in enumerate(gates):
            flags.begin_layer()
            begun.append(layer)
            flags.submit(lambda gate=gate: gate.wait(10) and None, False)
            flags.order_device()

    flags._watchdog_s = 20.0
    caller = threading.Thread(target=queue_layers)
    caller.start()
    for layer, gate in enumerate(gates):
        expected = min(layer + 2, len(gates))
        deadline = time.monotonic() + 10
        while len(begun) < expected and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(begun) == expected
        gate.set()
    caller.join()
    flags.join()
    done(device)


def test_a_step_that_is_given_up_before_its_graph_was_launched_ends_at_once(device, flags, kernels):
    """Out of memory at the launch: the worker once waited out its watchdog for a GPU that was never asked."""
    job, _, _ = attention(kernels)
    for ops_only in (True, False):
        flags._watchdog_s = 20.0
        graph, recorded = captured(device, flags, [job, job], ops_only)
        flags.replay(recorded)
        started = time.monotonic()
        flags.give_up()

        assert time.monotonic() - started < 10
        replay(device, flags, graph, recorded)  # and the next one is whole again
        assert device.driver.ran == ["gpu", "gpu"]


def test_a_gpu_that_answers_everything_with_a_fault_does_not_hold_up_who_gives_up(device, flags, monkeypatch):
    """No request comes any more; the jobs are let go instead of waiting for it."""
    flags._watchdog_s = 20.0
    blocker = threading.Event()
    with device.current():
        device.driver.fake.current.add(lambda: blocker.wait(15) and None)
        flags.submit(lambda: None, True)
        monkeypatch.setattr(device.driver, "record", lambda stream: (_ for _ in ()).throw(RuntimeError("fault")))
        started = time.monotonic()
        flags.give_up()

    assert time.monotonic() - started < 10
    blocker.set()
    monkeypatch.undo()
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


def captured(device: Device, flags: FlagHandover, jobs: list, ops_only: bool = False) -> tuple:
    """A graph of (job, hand back) for each of `jobs`; what it adds to `device.driver.ran` is an entry of the GPU."""
    device.driver.ran = []
    with device.current(), flags.record(ops_only) as recorded, device.capture() as graph:
        for job in jobs:
            flags.submit(job, True)
            flags.order_device()
            device.driver.fake.current.add(lambda: device.driver.ran.append("gpu"))
    return graph, recorded


def replay(device: Device, flags: FlagHandover, graph, recorded) -> None:
    """One step, to its end on both sides."""
    flags.replay(recorded)
    with device.current():
        graph.replay()
    try:
        flags.join()
    finally:
        done(device)


def test_a_captured_step_runs_its_jobs_in_order_every_time(device, flags):
    """The GPU goes on after each job, also where the step before has left flags behind."""

    def job(name: str) -> None:
        time.sleep(0.02)
        device.driver.ran.append(name)

    graph, recorded = captured(device, flags, [lambda: job("a"), lambda: job("b")])
    for _ in range(3):
        replay(device, flags, graph, recorded)

    assert device.driver.ran == ["a", "gpu", "b", "gpu"] * 3


def attention(kernels: CpuKernels) -> tuple:
    """A decode attention as a job, its range and its result."""
    pages, table = torch.randn(4, 16, 32), torch.arange(4, dtype=torch.int32).view(1, 1, 4)
    start, stop = torch.zeros(1, dtype=torch.int32), torch.full((1,), 40, dtype=torch.int32)
    q, out, lse = torch.randn(1, 2, 32), torch.zeros(1, 2, 32), torch.zeros(1, 2)
    return (
        lambda: kernels.decode_attention(q, Pages(pages, pages), RowKeys(table, start, stop), 0.2, Partial(out, lse)),
        stop,
        out,
    )


def test_a_program_computes_what_the_jobs_compute_every_time(device, flags, kernels):
    """Also after what the jobs read has changed, and the GPU does not go on before."""
    job, stop, out = attention(kernels)
    job()
    seen, expected = [], []
    with device.current(), flags.record(ops_only=True) as recorded, device.capture() as graph:
        for _ in range(2):
            flags.submit(job, True)
            flags.order_device()
            device.driver.fake.current.add(lambda: (seen.append(out.clone()), out.zero_()))
    assert recorded.program is not None
    for stop[0] in (40, 17, 3):
        replay(device, flags, graph, recorded)
        job()
        expected += [out.clone()] * 2

    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))


def test_only_the_work_of_a_program_counts_as_work(device, flags, kernels):
    job, _, _ = attention(kernels)
    graph, recorded = captured(device, flags, [job], ops_only=True)
    flags.replay(recorded)
    time.sleep(0.1)
    with device.current():
        graph.replay()
    flags.join()
    done(device)

    assert 0 < flags.worked_s < 0.09 < flags.parked_s


def test_a_program_whose_op_fails_lets_the_gpu_run_to_its_end_and_can_run_again(device, flags, kernels):
    job, stop, _ = attention(kernels)
    graph, recorded = captured(device, flags, [job, job, job], ops_only=True)
    for length in (65, 64, 70, 1):
        stop.fill_(length)
        if length > 64:
            with pytest.raises(RuntimeError, match="op 1 .decode. of a recorded program"):
                replay(device, flags, graph, recorded)
        else:
            replay(device, flags, graph, recorded)

    assert device.driver.ran == ["gpu"] * 12


def test_a_captured_step_whose_job_fails_runs_to_its_end_and_can_run_again(device, flags):
    works = [False]
    graph, recorded = captured(device, flags, [lambda: works[0] or fail(), lambda: None])
    for works[0] in (False, True):
        if works[0]:
            replay(device, flags, graph, recorded)
        else:
            with pytest.raises(ZeroDivisionError):
                replay(device, flags, graph, recorded)


@pytest.mark.parametrize("ops_only", [False, True])
def test_a_gpu_that_never_asks_is_named_and_is_released_if_it_asks_later(device, flags, kernels, ops_only):
    job, _, _ = attention(kernels)
    graph, recorded = captured(device, flags, [job, job], ops_only)
    flags.replay(recorded)
    with pytest.raises(EngineDeadError, match="GPU did not ask|did not end"):
        flags.join()
    flags.close()
    with device.current():
        graph.replay()

    done(device)


def test_flags_of_a_forgotten_step_serve_another(device, flags):
    _, recorded = captured(device, flags, [lambda: None])
    flags.forget(recorded)
    _, other = captured(device, flags, [lambda: None])

    assert other.flags.data_ptr() == recorded.flags.data_ptr()


def choose(wish: str, device: Device, worker: ThreadPoolExecutor, kernels: CpuKernels) -> str:
    return choose_handover(wish, device, worker, kernels, StepTables(device, 1024)).name


@pytest.mark.parametrize(
    "wish,chosen", [("auto", "graph"), ("graph", "graph"), ("flags", "flags"), ("events", "events")]
)
def test_the_fastest_that_works_is_chosen(device, worker, kernels, wish, chosen, monkeypatch):
    monkeypatch.setattr(handover_choice, "PROMPT_S", 60.0)  # threads stand in for the GPU here
    assert choose(wish, device, worker, kernels) == chosen


@pytest.mark.parametrize(
    "p95,chosen",
    [
        ({"graph": 15e-6}, "graph"),
        ({"graph": 5e-3, "flags": 90e-6}, "flags"),
        ({"graph": 5e-3, "flags": 9e-3, "events": 6e-3}, "graph"),
        pytest.param({"graph": 5e-3, "flags": 9e-3, "events": 100e-6}, "events", marks=pytest.mark.matrix),
    ],
)
def test_auto_takes_the_first_prompt_handover_else_the_least_slow(device, worker, kernels, monkeypatch, p95, chosen):
    """A stream that waits on a card with a display may be looked at only every few milliseconds."""
    tried, times = handover_choice._tried, []

    def timed(handover, *rest):
        failure, seconds = tried(handover, *rest)
        times.append(len(seconds))
        return failure, [10e-6] * 180 + [p95[handover.name]] * 20

    monkeypatch.setattr(handover_choice, "_tried", timed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert choose("auto", device, worker, kernels) == chosen

    assert times == [200] * len(p95)
    assert sum("slow on this device" in str(each.message) for each in said) == sum(each > 1e-3 for each in p95.values())


def test_auto_leaves_out_what_fails_and_says_so(device, worker, kernels, monkeypatch):
    monkeypatch.setattr(handover_choice, "PROMPT_S", 60.0)

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
    with pytest.raises(ArgumentError, match="did you mean 'graph'"):
        choose("graphs", emulated, worker, kernels)
