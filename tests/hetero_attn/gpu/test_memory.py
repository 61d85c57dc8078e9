"""Memory of the device and of the host: one slab, alignment, small copies, events of the ring, failures by name."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from hetero_attn.devices import Device
from hetero_attn.devices.copy_ahead import CopyAhead
from hetero_attn.devices.cuda import CudaDriver
from hetero_attn.devices.libcuda import CudaError, LibCuda
from hetero_attn.devices.slab import ALIGN_BYTES, Slab
from hetero_attn.errors import MemoryBudgetError
from tests.support.gpu.fake_driver import fake_driver
from tests.support.gpu.fake_engine import fake_engine
from tests.support.models.runtime import emulated_plan, nmse, toy_workload, uniform_plan


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


@pytest.mark.parametrize("odd", [1, 4, 12, 255])
def test_both_ends_of_a_slab_of_any_size_are_aligned(odd):
    """A budget is any number of bytes; integers of a step's tables, and vector loads, need aligned addresses."""
    slab = Slab(10 * ALIGN_BYTES + odd)

    assert slab.take(100, at_end=True) == 9 * ALIGN_BYTES
    assert slab.take(100) == 0


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
