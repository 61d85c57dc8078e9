"""The lanes' own code on a GPU that does everything as late as it may: no race, the right answer, no wait too many.

`simulated_gpu.py` says what is checked. That every wait is needed is shown by leaving each out in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hetero_attn.devices import Device
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.lanes.flag_handover import FlagHandover
from hetero_attn.lanes.handover import EventHandover
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.ops.step_rows import Rows
from hetero_attn.spec.blocks import BufferSet
from hetero_attn.spec.buffers import ActivationWidths
from placement.plan.plan import Plan
from tests.support.gpu.race_checker import MixedMemoryError, RaceError, StuckError
from tests.support.gpu.simulated_lanes import simulated
from tests.support.models.eagle import SlowHead, make_head
from tests.support.models.moe import make_moe
from tests.support.models.runtime import emulated_plan, nmse, one_device_run, run_logits, toy_workload, uniform_plan
from tests.support.models.toy import FAMILIES, hf_model, make_checkpoint, make_family_checkpoint

LIMIT = 1e-11


# Families whose blocks queue other work than those of Llama.
OTHERS = {
    "olmo2": {"head_dim": 12},
    "cohere2": {"sliding_window": 11, "hidden_size": 240, "layer_types": ["sliding_attention", "full_attention"]},
    "starcoder2": {"sliding_window": 11},
    "gemma3_text": {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]},
}


def spilling_plan(path: Path, gpu: float = 0.3, stream: float = 0.4, gpu_kv_heads: int = 1) -> Plan:
    """All three lanes, two chunks of prompt, and a cache that spills."""
    return uniform_plan(toy_workload(path, page_size=4, prefill_chunk=8, max_batch=1), gpu, stream, gpu_kv_heads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The one-device run of every family, made when first asked for."""
    made = {}

    def run(family: str = "llama"):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            if family in FAMILIES:
                path = make_checkpoint(folder, family, layers=2, sliding_window=11, biases=True)
            elif family in OTHERS:
                path = make_family_checkpoint(folder, family, num_hidden_layers=2, **OTHERS[family])
            else:
                path = make_moe(folder, family, layers=2)
            made[family] = one_device_run(path, "fp32", tokens=22, prompt_tokens=18)
        return made[family]

    return run


@pytest.mark.parametrize(
    "family,handover",
    [
        *((family, "events") for family in (*FAMILIES, *OTHERS)),
        ("llama", None),
        ("mistral", "flags"),
        ("gemma3_text", "flags"),
        ("cohere2", "flags"),
        ("qwen2_moe", "events"),  # experts on all three lanes, beside one that is shared
        ("qwen2_moe", "flags"),
    ],
)
def test_every_family_is_right_and_without_a_race(runs, family, handover):
    run = runs(family)
    with simulated(run.path, spilling_plan(run.path), handover) as engine:
        actual = run_logits(engine, run.token_ids, run.prompt_tokens)

    assert nmse(actual, run.logits) <= LIMIT


@pytest.mark.parametrize("gpu,stream,gpu_kv_heads", [(1.0, 0.0, 2), (0.0, 1.0, 2), (0.5, 0.0, 0)])
def test_every_shape_of_plan_is_right_and_without_a_race(runs, gpu, stream, gpu_kv_heads):
    run = runs()
    with simulated(run.path, spilling_plan(run.path, gpu, stream, gpu_kv_heads)) as engine:
        actual = run_logits(engine, run.token_ids, run.prompt_tokens)

    assert nmse(actual, run.logits) <= LIMIT


@pytest.mark.parametrize("handover", ["events", "flags"])
def test_a_pass_of_rows_of_every_kind_is_right_and_without_a_race(runs, handover: str) -> None:
    """A single row over a cache that has spilled, a chain, and the end of a chunk, whose logits are brought together."""
    run = runs("mistral")
    ids = run.token_ids
    workload = toy_workload(run.path, page_size=4, prefill_chunk=8, max_batch=3)
    with simulated(run.path, uniform_plan(workload, 0.3, 0.4, gpu_kv_heads=1), handover) as engine:
        old, chained, new = (engine.kv_cache.open() for _ in range(3))
        for sequence in (old, chained):
            engine.prefill(sequence, ids[:8], logits=False)
        engine.prefill(old, ids[8:16], logits=False)
        rows = [Rows(old, ids[16:17]), Rows(chained, ids[8:10], 2), Rows(new, ids[:5], is_chunk=True)]
        found = [engine.run(rows), engine.run([Rows(new, ids[5:8]), Rows(old, ids[17:21], is_chunk=True)])]

    wanted = [[run.logits[16:17], run.logits[8:10], run.logits[4:5]], [run.logits[7:8], run.logits[20:21]]]
    for actual, expected in zip(found, wanted, strict=True):
        assert nmse(torch.cat(actual), torch.cat(expected)) <= LIMIT


@pytest.mark.parametrize("handover", ["events", "flags"])
def test_a_paired_plan_is_right_and_without_a_race(tmp_path: Path, handover: str) -> None:
    """Heads and neurons half on the GPU and half on the CPU, the boundaries of one layer's rows a unit apart."""
    shape = {"layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "intermediate": 192}
    run = one_device_run(make_checkpoint(tmp_path, "llama", **shape), "fp32", tokens=22, prompt_tokens=18)
    workload = toy_workload(run.path, page_size=4, prefill_chunk=8, max_batch=1, paired=True)
    plan = uniform_plan(workload, gpu=0.5, stream=0.0, gpu_kv_heads=1)
    linears = [replace(linear, gpu_units=2) if linear.name == "layers.1.down" else linear for linear in plan.linears]
    with simulated(run.path, emulated_plan(workload, linears, plan.kv), handover) as engine:
        actual = run_logits(engine, run.token_ids, run.prompt_tokens)

    assert nmse(actual, run.logits) <= LIMIT


def test_a_move_to_another_plan_is_right_and_without_a_race(runs) -> None:
    """Weights, cache and ring move between two tokens, down and up again."""
    run = runs()
    workload = replace(toy_workload(run.path, page_size=4, prefill_chunk=8, max_batch=1), elastic=True)
    large, small = (
        uniform_plan(workload, gpu, 0.3, 1, tokens)
        for gpu, tokens in ((0.6, workload.min_gpu_tokens + 8), (0.2, workload.min_gpu_tokens))
    )
    with simulated(run.path, large) as engine:
        sequence = engine.kv_cache.open()
        rows = [engine.prefill_logits(sequence, run.token_ids[start : start + 8]) for start in (0, 8)]
        for index, token_id in enumerate(run.token_ids[16:]):
            engine.move((small, large)[index % 2])
            rows.append(engine.decode_step([sequence], [token_id]).clone())

    assert nmse(torch.cat(rows), run.logits) <= LIMIT


def waits(run: Callable[[], torch.Tensor], leave_out: int | None = None) -> tuple[list[str], torch.Tensor]:
    """Names of the waits of a run in their order, and its result; the wait numbered `leave_out` does nothing."""
    seen: list[str] = []

    def counted(owner: type, name: str, counts: Callable[..., bool] = lambda *arguments: True):
        original = getattr(owner, name)

        def wait(self, *arguments):
            if not counts(self):
                return original(self, *arguments)
            seen.append(f"{owner.__name__}.{name}")
            if len(seen) - 1 != leave_out:
                original(self, *arguments)
            elif name == "join":
                self._jobs.clear()  # given, and never waited for
            return None

        patch.setattr(owner, name, wait)

    with pytest.MonkeyPatch.context() as patch:
        counted(Lanes, "_await_inputs", lambda lanes: lanes._inputs is not None)
        counted(Device, "wait")
        counted(Device, "synchronize")
        counted(Device, "wait_flag")
        counted(EventHandover, "join", lambda handover: bool(handover._jobs))
        counted(FlagHandover, "join", lambda handover: bool(handover._jobs))
        counted(FlagHandover, "_await_request")
        result = run()
    return seen, result


def short_run(path: Path, plan: Plan, handover: str) -> torch.Tensor:
    """Logits of a prompt in two chunks, during which the cache spills, and of a token."""
    with simulated(path, plan, handover) as engine:
        sequence = engine.kv_cache.open()
        rows = [engine.prefill_logits(sequence, list(range(1, 9)))]
        rows += [engine.prefill(sequence, [9, 10, 11])[None], engine.decode_step([sequence], [12])]
        return torch.cat(rows)


@pytest.mark.parametrize("handover", ["events", "flags"])
def test_a_head_that_drafts_is_right_and_without_a_race(tmp_path: Path, handover: str) -> None:
    """Rows made of a model's hidden states in two chunks, then of its own, on all three lanes."""
    head = make_head(tmp_path / "head", norm_before_fc=True, norm_before_residual=True, norm_output=True)
    states, slow = torch.randn(13, 3 * 72, generator=torch.Generator().manual_seed(1)), SlowHead(head)
    tokens = [5 + 7 * place for place in range(16)]
    with simulated(head, spilling_plan(head), handover) as engine:
        sequence = engine.kv_cache.open(32)
        for start, stop in ((0, 8), (8, 12)):
            fused = engine.fused(states[start:stop])
            engine.run([Rows(sequence, tokens[start:stop], 0, True, fused)])
        hidden = engine.fused(states[12:])
        expected, its = [slow.row(slow.fused(states[place]), tokens[place]) for place in range(12)], None
        for place in range(12, 16):
            ((logits,),) = engine.run([Rows(sequence, tokens[place : place + 1], hidden=hidden)])
            hidden = engine.handed_on(1)
            expected, its = slow.row(slow.fused(states[12]) if its is None else its, tokens[place])

            assert nmse(logits, expected) <= LIMIT


@pytest.mark.parametrize("handover", ["events", "flags"])
def test_what_is_kept_for_a_head_is_right_and_without_a_race(runs, handover: str) -> None:
    """Of chunks, of a step, and of a step that is captured and replayed."""
    run, taps = runs("mistral"), (1, 0)
    with torch.inference_mode():
        seen = hf_model(run.path)(torch.tensor([run.token_ids]), output_hidden_states=True).hidden_states
    expected, plan = torch.cat([seen[tap][0] for tap in taps], 1), spilling_plan(run.path)
    plan = replace(plan, gpu_memory_bytes=2 * plan.gpu_memory_bytes)  # it was made without them
    with simulated(run.path, plan, handover, taps) as engine:
        sequence = engine.kv_cache.open(32)
        for start, stop in ((0, 8), (8, 16), *((place, place + 1) for place in range(16, 20))):
            engine.run([Rows(sequence, run.token_ids[start:stop], is_chunk=stop - start > 1)])

            assert nmse(engine.kept(sequence, stop - start), expected[start:stop]) <= LIMIT


@pytest.mark.parametrize("handover", ["events", "flags"])
def test_tokens_of_layers_with_a_state_are_right_and_without_a_race(tmp_path: Path, handover: str) -> None:
    """One by one from the beginning: what torch computes of longer prompts makes tensors outside of the arena."""
    run = one_device_run(make_moe(tmp_path, "qwen3_next", layers=3), "fp32", tokens=10, prompt_tokens=6)
    with simulated(run.path, spilling_plan(run.path), handover) as engine:
        actual = run_logits(engine, run.token_ids, 1)

    assert nmse(actual, run.logits) <= 1e-9  # a prompt's states are summed in chunks


def run_of_chunks(path: Path, plan: Plan, handover: str) -> torch.Tensor:
    """Logits of a prompt whose first chunks are left running while the next is prepared, and of a token."""
    with simulated(path, plan, handover) as engine:
        sequence = engine.kv_cache.open()
        engine.prefill(sequence, list(range(1, 9)), logits=False)
        engine.prefill(sequence, list(range(9, 15)), logits=False)
        return torch.cat([engine.prefill(sequence, [15, 16])[None], engine.decode_step([sequence], [17])])


def streaming_plan(path: Path) -> Plan:
    """The CPU computes nothing, so no job orders a chunk after the one before; older tokens come back to the GPU."""
    return spilling_plan(path, gpu=0.5, stream=0.5, gpu_kv_heads=2)


def crossing_plan(path: Path) -> Plan:
    """The CPU computes every q, k and v and the GPU owns every head, so all of them cross; nothing streams."""
    workload = toy_workload(path, page_size=4, prefill_chunk=8, max_batch=1)
    plan = uniform_plan(workload, gpu=0.5, stream=0.0, gpu_kv_heads=2)
    linears = [replace(linear, gpu_units=0) if "qkv" in linear.name else linear for linear in plan.linears]
    return emulated_plan(workload, linears, plan.kv)


def some_of(names: list[str]) -> set[int]:
    """Places of a third of the waits: the first and the last of every name among them."""
    last = {name: place for place, name in enumerate(names)}
    return {names.index(name) for name in last} | {*last.values()} | {*range(0, len(names), 3)}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.matrix)], ids=["some", "every"])
@pytest.mark.parametrize(
    "make_plan,handover",
    [
        (spilling_plan, "events"),
        pytest.param(crossing_plan, "events", marks=pytest.mark.matrix),
        (spilling_plan, "flags"),
    ],
)
def test_leaving_out_any_one_wait_is_reported(tmp_path, make_plan, handover, whole):
    path = make_checkpoint(tmp_path, layers=1, hidden=32, num_heads=2, num_kv_heads=2, head_dim=16, intermediate=64)
    plan = make_plan(path)
    names, expected = waits(lambda: short_run(path, plan, handover))
    unnoticed, tried = [], range(len(names)) if whole else some_of(names)
    for index, name in enumerate(names):
        if index not in tried:
            continue
        if handover == "flags" and name not in ("Device.wait_flag", "FlagHandover._await_request"):
            continue  # the same code as with events
        try:
            _, actual = waits(lambda: short_run(path, plan, handover), leave_out=index)
            if torch.equal(actual, expected):
                unnoticed.append(f"{index} {name}")
        except (RaceError, StuckError, UnsupportedModelError):  # the last by the test at the start
            pass

    assert len(names) > 20
    assert unnoticed == []


def test_inputs_of_a_chunk_that_do_not_wait_for_those_of_the_chunk_before_are_reported(tmp_path):
    """Rows and tables of the next chunk, written over what the copies of this one have still to read."""
    path = make_checkpoint(tmp_path, layers=1, hidden=32, num_heads=2, num_kv_heads=2, head_dim=16, intermediate=64)
    plan = streaming_plan(path)
    names, _ = waits(lambda: run_of_chunks(path, plan, "events"))
    indices = [index for index, name in enumerate(names) if name == "Lanes._await_inputs"]

    assert len(indices) == 2
    for index in indices:
        with pytest.raises(RaceError):
            waits(lambda: run_of_chunks(path, plan, "events"), leave_out=index)


def test_buffers_that_share_gpu_memory_while_both_live_are_seen(runs, monkeypatch):
    """Planted: the normed rows where gate_up writes while it still reads them."""
    run = runs()
    right = ActivationWidths.regions.fget

    def wrong(widths):
        wide, *_ = (group for group in widths.sets if group.buffers[0][0] == "qkv")
        (normed,) = (group for group in widths.sets if group.buffers[0][0] == "normed")
        mixed = BufferSet("wide", normed.buffers + wide.buffers)
        kept = {name: tuple(g for g in groups if g not in (wide, normed)) for name, groups in right(widths).items()}
        return kept | {"wide": (*kept["wide"], mixed)}

    monkeypatch.setattr(ActivationWidths, "regions", property(wrong))
    with simulated(run.path, spilling_plan(run.path)) as engine:
        actual = run_logits(engine, run.token_ids, run.prompt_tokens)

    assert not nmse(actual, run.logits) <= 1e-3


def test_a_row_of_the_8b_shape_takes_two_thirds_of_what_its_buffers_have(tmp_path):
    """288 KiB when each had memory of its own."""
    groups = (
        BufferSet("wide", (("qkv", 6144), ("query", 4096), ("out", 4096), ("partial", 4096))),
        BufferSet("narrow", (("normed", 4096),)),
        BufferSet("lse", (("lse", 32), ("partial_lse", 32))),
        BufferSet("wide", (("gate_up", 28672),)),
        BufferSet("narrow", (("activated", 14336),)),
    )
    widths = ActivationWidths(4096, groups)

    assert (widths.bytes_per_row, widths.host_bytes_per_row) == (200 * 1024 + 256, 288 * 1024 + 256)


def test_memories_are_not_mixed(runs, monkeypatch):
    """An operation of one side that is given a tensor of the other, and a tensor made outside of the arena."""
    run = runs()
    with simulated(run.path, spilling_plan(run.path)) as engine:
        lanes, normed = engine.lanes, engine.forward.work.of("normed", engine.config.hidden_size)
        weight = torch.ones(normed.host.shape[1])

        with pytest.raises(MixedMemoryError, match="GPU was given host memory"):
            lanes.device.ops.rms_norm(normed.device, weight, 1e-5, normed.device)
        with pytest.raises(MixedMemoryError, match="CPU was given GPU memory"):
            lanes.host_ops.rms_norm(normed.device, weight, 1e-5, normed.host)
        with lanes.device.current(), pytest.raises(MixedMemoryError, match="outside of the arena"):
            normed.device + normed.device
        with lanes.device.current(), pytest.raises(MixedMemoryError, match="given host memory"):
            normed.device.add_(normed.host)
