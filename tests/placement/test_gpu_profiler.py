"""The GPU part of the profiler against a fake GPU of known rates: the numbers come out, in bounded time."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cpu_kernels.formats.weights import BLOCK_FEATURES
from placement import HardwareProfile
from placement.machine.rates import ANY_ROWS, DtypeRates, RowRate
from placement.profilers import gpu as gpu_profiler
from placement.profilers import timing
from placement.profilers.gpu import (
    COPY_BYTES,
    Together,
    copy_rates,
    gpu_attention_rate,
    measure_gpu,
    shares_together,
    streaming_pays,
)
from placement.profilers.gpu_linear import crossing, crossovers

MEMORY, FLOPS = 400e9, {"fp32": 10e12, "bf16": 40e12, "q8": 40e12, "q4": 30e12}
PINNED_H2D, PINNED_D2H, PAGEABLE_H2D, PAGEABLE_D2H = 20e9, 18e9, 6e9, 5e9
INT8 = {"q8": 60e12, "q4": 25e12}  # one faster than in bf16, one slower once memory is no longer waited for
ATTENTION = 15e12
CPU_BYTES, LEFT_WHILE_COPYING, COPIES_LEFT = 30e9, 0.75, 0.8


class FakeTensor:
    """A shape, a dtype and where it is: enough to be timed."""

    def __init__(self, shape, dtype, place):
        self.shape, self.dtype, self.place = torch.Size(shape), dtype, place
        self.nbytes = self.shape.numel() * dtype.itemsize

    def fill_(self, value):
        return self


class FakeGpu:
    """Clocks instead of hardware. Time passes when work is waited for; copies run beside the rest."""

    memory_bytes, free_bytes = 16 << 30, 15 << 30

    def __init__(self, slower_bus=1.0):
        self.clock = self.copies_end = self.kernels = 0.0
        self.slower = slower_bus
        self.ops = SimpleNamespace(linear=self._linear, rounded=self._rounded, prefill_attention=self._attention)

    def empty(self, shape, dtype):
        return FakeTensor(shape, dtype, "gpu")

    def host(self, shape, dtype, pinned):
        return FakeTensor(shape, dtype, "pinned" if pinned else "pageable")

    def copy(self, target, source):
        rate = {
            ("gpu", "pinned"): PINNED_H2D,
            ("pinned", "gpu"): PINNED_D2H,
            ("gpu", "pageable"): PAGEABLE_H2D,
            ("pageable", "gpu"): PAGEABLE_D2H,
        }[target.place, source.place]
        self.copies_end = max(self.copies_end, self.clock) + source.nbytes * self.slower / rate

    def seconds(self, work):
        self.synchronize()
        started, self.kernels = self.clock, 0.0
        work()
        self.clock = max(self.clock + self.kernels, self.copies_end)
        return self.clock - started

    def kernel_seconds(self, work):
        return self.seconds(work)

    def now(self):
        return self.clock

    def synchronize(self):
        self.clock = max(self.clock, self.copies_end)

    def cpu_work(self, size):
        """CPU work of known size; it and copies beside it slow each other by known shares."""
        taken, is_beside = size / CPU_BYTES, self.copies_end > self.clock
        if is_beside:
            taken /= LEFT_WHILE_COPYING
            self.copies_end += (1 - COPIES_LEFT) * taken
        self.clock += taken
        assert not is_beside or self.copies_end >= self.clock

    def _rounded(self, x, dtype, int8_rows=64):
        return x, INT8[dtype] if dtype in INT8 and x.shape[0] <= int8_rows else FLOPS[dtype]

    def _linear(self, rounded, weight, dtype, bias, out):
        x, rate = rounded
        operations = 2 * x.shape[0] * x.shape[1] * weight.shape[0] * BLOCK_FEATURES
        self.kernels += max(weight.nbytes / MEMORY, operations / rate)

    def _attention(self, q, pages, keys, scale, into):
        rows, heads, head_dim = q.shape
        seen = sum(keys.q_start + row + 1 for row in range(rows))
        self.kernels += 4 * head_dim * heads * seen / ATTENTION


class FakeKernels:
    """CPU kernels that only pass their time."""

    def __init__(self, gpu):
        self._gpu = gpu

    def linear(self, x, weight, dtype, bias, out):
        self._gpu.cpu_work(weight.numel())

    def decode_attention(self, q, pages, keys, scale, into):
        self._gpu.cpu_work(pages.k.nbytes + pages.v.nbytes)


@pytest.fixture
def small_buffers(monkeypatch):
    """Host buffers of the CPU work are real tensors: keep them small."""
    monkeypatch.setattr(gpu_profiler, "SWEEP_BYTES", 1 << 22)
    monkeypatch.setattr(timing, "CACHES", 0)


def test_known_rates_come_out(small_buffers):
    gpu, cpu, steps = FakeGpu(), HardwareProfile.named("generic-cpu"), []

    profile = measure_gpu(gpu, cpu, steps.append, FakeKernels(gpu))

    assert profile.has_gpu and 16 << 30 == profile.gpu_memory_bytes
    assert pytest.approx((PINNED_H2D, PINNED_D2H, PAGEABLE_H2D, PAGEABLE_D2H)) == (
        profile.h2d_bytes_per_s,
        profile.d2h_bytes_per_s,
        profile.h2d_pageable_bytes_per_s,
        profile.d2h_pageable_bytes_per_s,
    )
    assert pytest.approx((MEMORY, ATTENTION)) == (profile.gpu_bytes_per_s, profile.gpu_attention_ops_per_s)
    assert pytest.approx(FLOPS | {"q8": INT8["q8"]}) == {dtype: profile.gpu_flops.of(dtype) for dtype in FLOPS}
    assert profile.int8_rows == {"q8": ANY_ROWS, "q4": 16}
    assert pytest.approx(INT8["q4"]) == profile.gpu_int8_ops_per_s
    assert pytest.approx((LEFT_WHILE_COPYING, LEFT_WHILE_COPYING, COPIES_LEFT)) == (
        profile.cpu_slowdown_while_copying,
        profile.cpu_attention_slowdown_while_copying,
        profile.copy_slowdown_while_computing,
    )
    assert profile.streams_in_decode
    assert cpu.cpu_linear_bytes_per_s == profile.cpu_linear_bytes_per_s
    assert {"copies over the bus", "GPU linear bf16 by rows", "CPU lane while copies run"} <= set(steps)
    assert profile == HardwareProfile.from_json(profile.to_json())


def test_copies_are_measured_by_size_and_a_narrow_bus_takes_no_longer():
    wide, narrow = FakeGpu(), FakeGpu(slower_bus=50.0)

    sizes = [rate.size_bytes for rate in copy_rates(wide)]
    slow = copy_rates(narrow)

    assert sizes == list(COPY_BYTES)
    assert len(slow) < len(sizes) and pytest.approx(PINNED_H2D / 50) == slow[-1].h2d_pinned
    assert narrow.clock < 5.0


def test_everything_together_takes_well_under_a_minute(small_buffers):
    """Of a slow GPU behind a slow bus, by its own clock."""
    gpu = FakeGpu(slower_bus=8.0)

    measure_gpu(gpu, HardwareProfile.named("generic-cpu"), ops=FakeKernels(gpu))

    assert gpu.clock < 20.0


def test_crossovers_say_where_rows_stop_being_free_and_where_a_gemm_has_arrived():
    def rate(rows: int, value: float) -> RowRate:
        return RowRate(rows, DtypeRates(value, value, value, value))

    rates = (rate(1, 1.0), rate(4, 4.0), rate(16, 12.0), rate(64, 30.0), rate(256, 32.0))

    assert (16, 64) == crossovers(rates, "bf16")


def test_int8_is_left_where_bf16_becomes_faster():
    """Seconds at 16, 64, 128 and 512 rows; unpacking costs 100, a row 1 in bf16 and more or less in int8."""
    counts = (16, 64, 128, 512)
    in_bf16 = [100.0 + rows for rows in counts]

    def limit(per_row: float, start: float = 0.0) -> int:
        return crossing(counts, [start + per_row * rows for rows in counts], in_bf16)

    assert limit(2.0) == 100
    assert limit(1.1) == pytest.approx(1000, abs=1)  # beyond what was measured
    assert limit(0.9) == limit(1.0) == ANY_ROWS
    assert limit(2.0, start=1000.0) == 1


def test_attention_counts_what_a_causal_chunk_sees():
    assert pytest.approx(ATTENTION) == gpu_attention_rate(FakeGpu())


def test_streaming_in_decode_is_left_where_copies_only_take_from_the_cpu_lane():
    """60 GB/s alone; beside copies of 12 GB/s it keeps a share."""
    pays = [streaming_pays(Together(share, 0.9), 60e9, 12e9) for share in (1.0, 0.9, 0.86, 0.8)]

    assert pays == [True, True, False, False]


def test_work_that_copies_do_not_disturb_is_not_sped_up():
    gpu = FakeGpu()
    quiet = lambda: setattr(gpu, "clock", gpu.clock + 0.01)  # noqa: E731

    assert pytest.approx((1.0, 1.0)) == shares_together(gpu, quiet, PINNED_H2D)


def test_a_plan_uses_the_measured_gpu(small_buffers):
    from placement import Policy, make_plan
    from tests.support.planning.planning_models import llama_8b

    gpu = FakeGpu()
    profile = measure_gpu(gpu, HardwareProfile.named("generic-cpu"), ops=FakeKernels(gpu))
    slower = replace(profile, gpu_rows=(), gpu_bytes_per_s=MEMORY / 4)

    fast, slow = (
        make_plan(llama_8b(dtype="q4"), machine, Policy.named("gpu_only"), device="cuda").predicted.decode
        for machine in (profile, slower)
    )

    assert fast.tokens_per_s > 2 * slow.tokens_per_s
