"""The CUDA driver's own code on a `torch.cuda` and a libcuda of Python threads: toy models, memory, refusals."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpu_kernels import CpuKernels
from hetero_attn.cache.cache import KVCache
from hetero_attn.devices import Device, machine
from hetero_attn.devices.copy_ahead import CopyAhead
from hetero_attn.devices.cuda import CudaDriver
from hetero_attn.devices.libcuda import CudaError, LibCuda
from hetero_attn.devices.slab import ALIGN_BYTES, Slab
from hetero_attn.engine import build as builder
from hetero_attn.engine.build import assemble, connect
from hetero_attn.engine.engine import Engine
from hetero_attn.errors import EngineDeadError, MemoryBudgetError, UnsupportedModelError
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.planning import settle as planning
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from placement import BudgetError, Policy, make_plan
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import rounded_input_bytes
from placement.plan.plan import Plan
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.fake_cuda import QUEUE_ENTRIES, fake_driver
from tests.support.recorded_runs import recorded_runs
from tests.support.runtime import THREADS, emulated_plan, nmse, one_device_run, run_logits, toy_workload, uniform_plan
from tests.support.simulated_gpu import TorchCalls
from tests.support.toy import make_checkpoint

SLACK_BYTES = 1 << 16


class QueuedTorchCalls:
    """What `TorchCalls` asks of a driver: plain torch calls on GPU memory become entries of the current stream."""

    def __init__(self, driver) -> None:
        self._driver = driver
        self.checker = self

    def on_device(self, tensor: torch.Tensor) -> bool:
        start = self._driver._memory.data_ptr()
        return start <= tensor.data_ptr() < start + self._driver._slab.size_bytes

    def launch(self, stream, name, work, reads, writes) -> None:
        self._driver.fake.current.add(work, name)

    def run_host(self, name, reads, writes) -> None:
        pass


@contextmanager
def fake_engine(
    path: Path,
    plan: Plan,
    refuse_pins: bool = False,
    handover: str = "events",
    slack_bytes: int = SLACK_BYTES,
    queue_entries: int = QUEUE_ENTRIES,
) -> Iterator[Engine]:
    """A toy model on the CUDA driver over the fakes."""
    driver = fake_driver(plan.gpu_memory_bytes + slack_bytes, refuse_pins, queue_entries)
    device = Device(driver, plan.gpu_memory_bytes)
    lanes = connect(plan, CpuKernels(THREADS), device, ThreadPoolExecutor(1), handover)
    config, weight_dtype = ModelConfig.from_dir(path), plan.workload.weight_dtype
    planned = PlannedModel(path, config, weight_dtype, "cuda", HardwareProfile.named("emulated"), plan)
    engine = assemble(planned, lanes)
    with TorchCalls(QueuedTorchCalls(driver), None):
        yield engine
    engine.close()
    driver.fake.stop()


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


@pytest.mark.filterwarnings("ignore:the system refused")
@pytest.mark.parametrize(
    "handover,refuse_pins", [("events", False), ("events", True), ("flags", False), ("graph", False)]
)
def test_a_toy_model_on_three_lanes_is_right(run, plan, handover, refuse_pins):
    with fake_engine(run.path, plan, refuse_pins, handover) as engine:
        actual = run_logits(engine, run.token_ids, run.prompt_tokens)
        device = engine.lanes.device
        assert engine.lanes.handover.name == handover

    assert nmse(actual, run.logits) <= 1e-11
    assert device.arena.peak_bytes <= plan.gpu_memory_bytes
    assert device.arena.total_bytes == device.pinned.total_bytes == 0
    assert device.driver._library._library.registered == {}


@pytest.mark.parametrize("handover", ["events", "flags", "graph"])
def test_a_launch_queue_of_six_entries_changes_no_answer_and_stops_nobody(long_run, long_plan, handover):
    """Every layer fills it several times over, mostly behind a wait for the CPU lane."""
    with fake_engine(long_run.path, long_plan, handover=handover, queue_entries=6) as engine:
        actual = run_logits(engine, long_run.token_ids, long_run.prompt_tokens)

    assert nmse(actual, long_run.logits) <= 1e-11


def test_a_captured_step_is_a_program_and_follows_a_moved_boundary(run, plan):
    """A step that was captured before the move would go on with the old boundary."""
    moved = uniform_plan(toy_workload(run.path, page_size=4, prefill_chunk=8), gpu=0.3, stream=0.2, gpu_kv_heads=1)
    assert moved.linears != plan.linears
    with fake_engine(run.path, plan, handover="graph") as engine:
        sequence = engine.kv_cache.open()
        for start in range(0, 16, 8):
            engine.prefill(sequence, run.token_ids[start : start + 8])
        rows = []
        for index, token_id in enumerate(run.token_ids[16:24]):
            if index == 4:
                assert engine.replay._captured
                engine.recut(moved)
                assert not engine.replay._captured
            rows.append(engine.decode_step([sequence], [token_id]))
        steps = [captured for captured in engine.replay._captured.values() if captured is not None]
        assert steps and all(len(captured.jobs.program) > len(captured.jobs.jobs) for captured in steps)

    assert nmse(torch.cat(rows), run.logits[16:24]) <= 1e-11


def test_the_border_between_two_chunks_does_not_wait_for_the_gpu(long_run):
    """The first chunk's call comes back, and the second is embedded, while the GPU has not begun; the answer is
    right."""
    workload = toy_workload(long_run.path, page_size=4, prefill_chunk=8, max_batch=1)
    plan = uniform_plan(workload, gpu=0.5, stream=0.5, gpu_kv_heads=2, gpu_tokens=workload.full_tokens)
    with fake_engine(long_run.path, plan, handover="flags") as engine:
        sequence, gate = engine.kv_cache.open(), threading.Event()
        engine.lanes.device.compute.add(lambda: gate.wait(15) and None)
        engine.prefill(sequence, long_run.token_ids[:8], logits=False)
        returned_first = not gate.is_set()
        gate.set()
        for start in (8, 16):
            engine.prefill(sequence, long_run.token_ids[start : start + 8], logits=False)
        last = engine.prefill(sequence, long_run.token_ids[24:32])
        following = engine.decode_step([sequence], long_run.token_ids[32:33])

    assert returned_first
    assert nmse(torch.stack([last, following[0]]), long_run.logits[31:33]) <= 1e-11


def captured_names(path: Path, plan: Plan, token_ids: list[int], prompt_tokens: int) -> list[str]:
    """The entries of the compute stream in a captured decode step."""
    with fake_engine(path, plan, handover="graph") as engine:
        run_logits(engine, token_ids, prompt_tokens)
        (step,) = [captured for captured in engine.replay._captured.values() if captured is not None]
        return step.graph.names[0]


def crossing(plan: Plan) -> Plan:
    """The CPU computes every q, k and v of a cache that is partly the GPU's."""
    linears = [replace(linear, gpu_units=0, stream_units=(0,) * 5) if "qkv" in linear.name else linear
               for linear in plan.linears]  # fmt: skip
    return emulated_plan(plan.workload, linears, plan.kv)


@pytest.mark.parametrize("shape", ["spills", "crosses", "recent only"])
def test_no_request_of_a_captured_step_stands_behind_a_wait_that_its_job_does_not_need(long_run, long_plan, shape):
    """The CPU lane is asked right behind the copy that feeds it, and what the GPU waits for it fetches next."""
    plan = {"spills": long_plan, "crosses": crossing(long_plan), "recent only": long_plan}[shape]
    tokens = 40 if shape != "recent only" else 12
    names = captured_names(long_run.path, plan, long_run.token_ids[:tokens], tokens - 6)
    requests = [index for index, name in enumerate(names) if name == "request"]
    waits = [index for index, name in enumerate(names) if name == "wait"]

    assert {names[index - 1] for index in requests} == {"push"}
    assert {names[index + 1] for index in waits} == {"pull", "add_rows"}
    assert len(requests) >= 8 and len(waits) >= 6


def in_small_pieces(plan: Plan) -> Plan:
    """The plan with staging slots that hold two kilobytes or one unit, so that every linear streams in several
    pieces."""
    workload = replace(plan.workload, staging_piece_bytes=2048)
    return emulated_plan(workload, plan.linears, plan.kv)


def test_as_many_pieces_are_taken_as_are_announced(long_run, long_plan):
    plan = in_small_pieces(long_plan)
    with fake_engine(long_run.path, plan) as engine:
        pieces = {
            (linear.spec.name, tier): ([*linear.pieces(tier)], linear.piece_count(tier))
            for linear in engine.weights.linears
            for tier in range(NUM_ROW_TIERS)
        }

    assert all(len(cut) == count for cut, count in pieces.values())
    assert max(count for _, count in pieces.values()) > 2


def test_a_linear_passes_the_ring_in_as_many_pieces_as_it_needs(long_run, long_plan):
    plan = in_small_pieces(long_plan)
    with fake_engine(long_run.path, plan, handover="graph") as engine:
        actual = run_logits(engine, long_run.token_ids, long_run.prompt_tokens)
        pieces = [list(weights.pieces(0)) for weights in engine.weights.linears]
        slot_bytes = engine.lanes.ring._buffers[0].numel()

    assert plan.staging_slot_bytes == slot_bytes < long_plan.staging_slot_bytes
    assert max(len(each) for each in pieces) > 3
    assert max(piece.nbytes for each in pieces for piece in each) <= slot_bytes
    assert nmse(actual, long_run.logits) <= 1e-11


def test_a_wrong_boundary_between_pieces_is_seen(long_run, long_plan, monkeypatch):
    """Planted: every piece but the first begins a block too early, so some columns are another's."""
    pieces = LinearWeights.pieces

    def shifted(self: LinearWeights, tier: int) -> Iterator[torch.Tensor]:
        whole = self.dram
        for index, piece in enumerate(pieces(self, tier)):
            start = (piece.data_ptr() - whole.data_ptr()) // whole.stride(0) - (index > 0)
            yield whole[start : start + piece.shape[0]]

    monkeypatch.setattr(LinearWeights, "pieces", shifted)
    with fake_engine(long_run.path, in_small_pieces(long_plan)) as engine:
        actual = run_logits(engine, long_run.token_ids, long_run.prompt_tokens)

    assert nmse(actual, long_run.logits) > 1e-3


def test_what_a_layer_adds_to_a_captured_step_is_counted(tmp_path):
    """Two streamed pieces among the linears, and two hand-overs, of the MLP's CPU columns; attention is all the
    GPU's."""
    entries = []
    for layers in (2, 3):
        path = make_checkpoint(tmp_path / str(layers), "llama", layers=layers)
        workload = toy_workload(path, page_size=4, prefill_chunk=8, max_batch=1)
        plan = uniform_plan(workload, 0.5, 0.25, 2, gpu_tokens=workload.full_tokens)
        linears = [
            linear if linear.name.endswith(("gate_up", "down")) else replace(linear, gpu_units=linear.units,
                                                                             stream_units=(0,) * 5)
            for linear in plan.linears
        ]  # fmt: skip
        names = captured_names(path, emulated_plan(workload, linears, plan.kv), list(range(3, 20)), 12)
        entries.append(Counter(names))

    assert entries[1] - entries[0] == Counter(
        {"rounded_norm": 2, "linear": 6, "rope_append": 1, "decode_attention": 1, "silu_mul": 1, "push": 2, "request": 2,
         "wait": 2, "pull": 1, "add_rows": 1, "wait event": 2, "event": 2}  # the last two of the staging ring
    )  # fmt: skip


def test_a_replayed_step_counts_the_bytes_of_a_plain_one(long_run, long_plan):
    """Capturing once made the older tokens of the prompt count twice."""

    def streamed_bytes(handover: str) -> int:
        with fake_engine(long_run.path, long_plan, handover=handover) as engine:
            run_logits(engine, long_run.token_ids, long_run.prompt_tokens)
            assert engine.lanes.pages.copied_bytes > 0
            return engine.lanes.streamed_bytes

    assert streamed_bytes("events") == streamed_bytes("graph")


@pytest.mark.parametrize("handover", ["events", "flags", "graph"])
@pytest.mark.parametrize("copies", [0, 3, 9, 16])
def test_a_step_whose_copy_fails_can_be_taken_again(run, plan, handover, copies):
    """A prompt's second chunk and then two tokens, each with a failure somewhere inside; nothing is left behind."""
    with fake_engine(run.path, plan, handover=handover) as engine:
        library, sequence = engine.lanes.device.driver._library._library, engine.kv_cache.open()
        engine.prefill(sequence, run.token_ids[:8])
        rows = []
        for step in (
            lambda: engine.prefill(sequence, run.token_ids[8:16])[None],
            *(
                lambda token_id=token_id: engine.decode_step([sequence], [token_id])
                for token_id in run.token_ids[16:20]
            ),
        ):
            library.copies_before_failure = copies
            try:
                rows.append(step())
                library.copies_before_failure = None
            except CudaError:
                rows.append(step())

    assert nmse(torch.cat(rows), run.logits[15:20]) <= 1e-11


def test_an_engine_whose_cpu_lane_is_stuck_says_that_it_is_dead(run, plan):
    never = threading.Event()
    with fake_engine(run.path, plan, handover="flags") as engine:
        engine.lanes.handover._watchdog_s = 0.2
        sequence = engine.kv_cache.open()
        engine.lanes.on_host(lambda: never.wait(20))
        with pytest.raises(EngineDeadError, match="did not end within 0.2 s"):
            engine.prefill(sequence, run.token_ids[:8])
        with pytest.raises(EngineDeadError, match="unusable after EngineDeadError"):
            engine.check_alive()
        never.set()


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
        assert engine._can_replay(0) == (handover == "graph" and kinds == ("kv",))

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
        assert engine.replay._captured and [engine._can_replay(tier) for tier in (0, 2)] == [True, False]

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


def test_a_step_that_is_given_up_leaves_no_counter_behind(run, plan):
    with fake_engine(run.path, plan, handover="flags") as engine:
        library, sequence = engine.lanes.device.driver._library._library, engine.kv_cache.open()
        library.copies_before_failure = 3
        with pytest.raises(CudaError):
            engine.prefill(sequence, run.token_ids[:8])

        assert engine.lanes.device.driver.ops.cleared == 1


def test_host_memory_is_aligned_and_alone_on_its_pages():
    driver = fake_driver(1 << 16)
    device = Device(driver, 1 << 16, pin_budget_bytes=1 << 24)
    tensors = [device.host_empty((size,), torch.uint8, "weights") for size in (1, 4097, 1 << 22, 100)]

    assert [tensor.data_ptr() % 4096 for tensor in tensors] == [0] * 4
    assert tensors[2].data_ptr() % (2 << 20) == 0
    assert device.pinned.used_bytes == {"weights": 1 + 4097 + (1 << 22) + 100}
    for tensor in tensors:
        device.host_release(tensor, "weights")
    assert (device.pinned.total_bytes, driver._library._library.registered) == (0, {})
    driver.close()
    driver.fake.stop()


@pytest.mark.parametrize(
    "columns,stream,locked,inside,by_kernel",
    [
        (4096, "compute", True, True, True),
        (4097, "compute", True, True, False),  # four rows: too large
        (4096, "copies", True, True, False),
        (4096, "compute", False, True, False),
        (4096, "compute", True, False, False),  # kernels of this thread would go to another stream
    ],
)
def test_a_small_copy_among_kernels_is_a_kernel(columns, stream, locked, inside, by_kernel):
    driver = fake_driver(1 << 20)
    device, ran = Device(driver, 1 << 20), []
    driver.ops = type("Ops", (), {"copy_rows": lambda target, source: (ran.append(1), target.copy_(source))})
    host = device.host_empty((4, 5000), torch.float32, "activations") if locked else torch.empty(4, 5000)
    on_device, host = device.empty((4, columns), torch.float32, "activations"), host[:, :columns].uniform_()
    queue = getattr(device, stream)
    with device.current() if inside else nullcontext():
        device.copy(on_device, host, queue)
        expected = host.clone()
        device.synchronize(device.record(queue))
        host.zero_()
        device.copy(host, on_device, queue)
        device.synchronize(device.record(queue))

    assert torch.equal(host, expected)
    assert len(ran) == 2 * by_kernel
    driver.close()
    driver.fake.stop()


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


def test_torch_is_kept_under_the_budget_while_the_device_is_open():
    driver = fake_driver(1 << 20)
    fraction = driver.fake.fraction
    driver.close()
    driver.close()

    assert 1 << 20 < fraction * driver.fake.total_bytes < 3 << 20
    assert driver.fake.fraction == 1.0
    driver.fake.stop()


def test_slab_reuses_and_joins_what_is_given_back():
    slab = Slab(10 * ALIGN_BYTES)
    first, second, third = slab.take(1), slab.take(3 * ALIGN_BYTES), slab.take(6 * ALIGN_BYTES)
    with pytest.raises(MemoryBudgetError, match="no gap"):
        slab.take(1)
    slab.give(second)
    slab.give(first)

    assert slab.take(4 * ALIGN_BYTES) == 0
    slab.give(third)
    slab.give(0)
    assert slab.take(10 * ALIGN_BYTES) == 0


def test_what_stays_lies_at_the_end_of_the_slab():
    """Small tensors that live as long as the model leave one gap, not one beside each of them."""
    slab = Slab(10 * ALIGN_BYTES)
    places = [slab.take(ALIGN_BYTES, at_end=index % 2 == 0) for index in range(6)]

    assert [place // ALIGN_BYTES for place in places] == [9, 0, 8, 1, 7, 2]
    assert slab.take(4 * ALIGN_BYTES) == 3 * ALIGN_BYTES


def test_a_failed_call_is_named():
    driver = fake_driver(1 << 16)
    with pytest.raises(CudaError, match=r"cuCtxSetCurrent failed: CUDA_ERROR_FAKE \(201\)"):
        driver._library.set_context(3)
    driver.close()
    driver.fake.stop()


def test_without_a_driver_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError("not found")))

    with pytest.raises(CudaError, match="install the NVIDIA driver"):
        LibCuda()


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


def test_weights_that_leave_no_gap_for_a_larger_one_make_room(long_run):
    """Every other linear gives its memory back, and the head wants more than any of those gaps: all are placed anew."""
    workload = replace(toy_workload(long_run.path, page_size=4, prefill_chunk=8, max_batch=1), elastic=True)
    before = uniform_plan(workload, gpu=0.5, stream=0.0, gpu_kv_heads=1)
    large_head = [
        replace(linear, gpu_units=linear.units if linear.name == "head" else linear.gpu_units * (index % 2))
        for index, linear in enumerate(before.linears)
    ]
    before_head = [replace(linear, gpu_units=0) if linear.name == "head" else linear for linear in before.linears]
    plans = [emulated_plan(workload, linears, before.kv) for linears in (before_head, large_head)]
    budget = max(plan.gpu_memory_bytes for plan in plans)
    before, after = (replace(plan, gpu_memory_bytes=budget) for plan in plans)
    with fake_engine(long_run.path, before, slack_bytes=8192) as engine:
        sequence = engine.kv_cache.open()
        rows = [engine.prefill_logits(sequence, long_run.token_ids[start : start + 8]) for start in (0, 8)]
        moved = []
        for index, token_id in enumerate(long_run.token_ids[16:24]):
            homes = [weights.gpu.data_ptr() for weights in engine.weights.linears if weights.gpu is not None]
            engine.move((after, before)[index % 2])
            kept = [weights.gpu.data_ptr() for weights in engine.weights.linears if weights.gpu is not None]
            moved.append(homes[1::2] != kept[1::2])
            rows.append(engine.decode_step([sequence], [token_id]).clone())

    assert nmse(torch.cat(rows), long_run.logits[:24]) <= 1e-11
    assert any(moved)


@pytest.mark.parametrize("handover", ["flags", "graph"])
def test_the_ring_makes_an_event_of_each_kind_for_a_slot_and_step_not_for_a_piece(long_run, monkeypatch, handover):
    """Making events was much of what Python needed to queue a streamed piece."""
    workload = toy_workload(long_run.path, page_size=4, prefill_chunk=8, max_batch=1)
    plan = uniform_plan(workload, gpu=0.3, stream=0.7, gpu_kv_heads=2)
    made, takes, record, take = [], [], CudaDriver.record, CopyAhead.take

    def counted(driver, stream, reuse=None):
        made.append(reuse is None)
        return record(driver, stream, reuse)

    monkeypatch.setattr(CudaDriver, "record", counted)
    monkeypatch.setattr(CopyAhead, "take", lambda ahead: (takes.append(1), take(ahead))[1])
    with fake_engine(long_run.path, plan, handover=handover) as engine:
        sequence = engine.kv_cache.open()
        made.clear(), takes.clear()
        engine.prefill(sequence, long_run.token_ids[:8])
        slots = plan.staging_slots + 2  # those of older pages, of which there are none yet
        assert len(takes) > 2 * slots and sum(made) <= 2 * slots + 4 and len(made) > 2 * len(takes)
        actual = [engine.decode_step([sequence], [token]).clone() for token in long_run.token_ids[8:14]]

    assert nmse(torch.cat(actual), long_run.logits[8:14]) <= 1e-11


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
