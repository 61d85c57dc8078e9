"""Steps on the three lanes: hand-overs, captured steps, pieces of linears, chunks of prompts, and failures in the middle."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hetero_attn.devices.libcuda import CudaError
from hetero_attn.errors import EngineDeadError
from hetero_attn.lanes.staging import Piece
from hetero_attn.ops.linear import LinearWeights
from placement.plan.plan import Plan
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.gpu.fake_engine import fake_engine
from tests.support.models.runtime import emulated_plan, nmse, run_logits, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint


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
                assert engine.forward.replay._captured
                engine.recut(moved)
                assert not engine.forward.replay._captured
            rows.append(engine.decode_step([sequence], [token_id]))
        steps = [captured for captured in engine.forward.replay._captured.values() if captured is not None]
        assert steps and all(len(captured.jobs.program) > len(captured.jobs.jobs) for captured in steps)

    assert nmse(torch.cat(rows), run.logits[16:24]) <= 1e-11


def test_the_border_between_two_chunks_does_not_wait_for_the_gpu(long_run):
    """The first chunk's call comes back, and the second is embedded, while the GPU has not begun; the answer is
    right."""
    workload = toy_workload(long_run.path, page_size=4, prefill_chunk=8, max_batch=1)
    # Streams take all that has no home on the GPU: a job of the CPU's would wait for what the GPU has not done.
    plan = uniform_plan(workload, gpu=0.5, stream=1.0, gpu_kv_heads=2, gpu_tokens=workload.full_tokens)
    assert all(linear.gpu_units + linear.stream_units[0] == linear.units for linear in plan.linears)
    with fake_engine(long_run.path, plan, handover="flags") as engine:
        sequence, gate, opened = engine.kv_cache.open(), threading.Event(), []
        engine.lanes.device.compute.add(lambda: opened.append(gate.wait(15)))
        engine.prefill(sequence, long_run.token_ids[:8], logits=False)
        gate.set()
        for start in (8, 16):
            engine.prefill(sequence, long_run.token_ids[start : start + 8], logits=False)
        last = engine.prefill(sequence, long_run.token_ids[24:32])
        following = engine.decode_step([sequence], long_run.token_ids[32:33])

    assert opened == [True]  # by this thread, and not because the time was over
    assert nmse(torch.stack([last, following[0]]), long_run.logits[31:33]) <= 1e-11


def captured_names(path: Path, plan: Plan, token_ids: list[int], prompt_tokens: int) -> list[str]:
    """The entries of the compute stream in a captured decode step."""
    with fake_engine(path, plan, handover="graph") as engine:
        run_logits(engine, token_ids, prompt_tokens)
        (step,) = [captured for captured in engine.forward.replay._captured.values() if captured is not None]
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
    assert max(sum(run.nbytes for run in piece) for each in pieces for piece in each) <= slot_bytes
    assert nmse(actual, long_run.logits) <= 1e-11


def test_a_wrong_boundary_between_pieces_is_seen(long_run, long_plan, monkeypatch):
    """Planted: every piece but the first begins a block too early, so some columns are another's."""
    pieces = LinearWeights.pieces

    def shifted(self: LinearWeights, tier: int) -> Iterator[Piece]:
        whole = self.dram
        for index, (piece,) in enumerate(pieces(self, tier)):
            start = (piece.data_ptr() - whole.data_ptr()) // whole.stride(0) - (index > 0)
            yield (whole[start : start + piece.shape[0]],)

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


@pytest.mark.table
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


def test_a_step_that_is_given_up_leaves_no_counter_behind(run, plan):
    with fake_engine(run.path, plan, handover="flags") as engine:
        library, sequence = engine.lanes.device.driver._library._library, engine.kv_cache.open()
        library.copies_before_failure = 3
        with pytest.raises(CudaError):
            engine.prefill(sequence, run.token_ids[:8])

        assert engine.lanes.device.driver.ops.cleared == 1
