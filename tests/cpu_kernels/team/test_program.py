"""A recorded program computes what the direct calls compute, every time, and stops at an op that cannot be right."""

import threading
import time

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import Pages, Partial, RowKeys
from cpu_kernels.formats import weights as layout
from tests.support.kernels.kernel_data import normal

WEIGHT = torch.ones(64)  # a program keeps addresses only


@pytest.fixture(scope="module")
def ops():
    with CpuKernels(2) as ops:
        yield ops


def packed(ops, weight_dtype: str, features: int, inputs: int, seed: int) -> torch.Tensor:
    out = torch.empty(features // 16, layout.block_bytes(weight_dtype, inputs), dtype=torch.uint8)
    ops.pack(normal(features, inputs, seed=seed), weight_dtype, out)
    return out


@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16", "q8", "q4"])
def test_a_run_equals_direct_calls_bit_for_bit(ops, weight_dtype):
    weights = [packed(ops, weight_dtype, 96, 96, seed) for seed in range(3)]
    norm = normal(96, seed=9)

    def work(x, normed):
        for weight in weights:
            ops.rms_norm(x, norm, 1e-6, normed)
            ops.linear(normed, weight, weight_dtype, None, x, True)

    x, normed = torch.empty(2, 96), torch.empty(2, 96)
    program = ops.record(lambda: work(x, normed))
    for seed in range(4):
        start = normal(2, 96, seed=seed)
        expected = start.clone()
        work(expected, torch.empty(2, 96))
        x.copy_(start)
        program.run()

        assert torch.equal(expected, x)
    assert len(program) == 6


def test_a_selection_runs_only_the_kept_kernels(ops):
    x, normed, out = normal(1, 64, seed=1), torch.zeros(1, 64), torch.zeros(1, 32)
    weight = packed(ops, "bf16", 32, 64, seed=2)

    def work():
        ops.rms_norm(x, torch.ones(64), 1e-6, normed)
        ops.linear(x, weight, "bf16", None, out)

    linears = ops.record(work).select(lambda name: name.startswith("linear"))
    linears.run()

    assert len(linears) == 1
    assert (normed == 0).all() and out.abs().sum() > 0


def test_recording_computes_nothing_and_checks_everything(ops):
    x, out = normal(1, 64, seed=1), torch.full((1, 64), 7.0)
    ops.record(lambda: ops.rms_norm(x, torch.ones(64), 1e-6, out))

    assert (out == 7.0).all()
    with pytest.raises(ValueError, match="weight"):
        ops.record(lambda: ops.rms_norm(x, torch.ones(63), 1e-6, out))
    ops.rms_norm(x, torch.ones(64), 1e-6, out)
    assert not (out == 7.0).any()


def test_a_length_outside_the_table_stops_the_program(ops):
    k_pages, v_pages = normal(4, 16, 32, seed=1), normal(4, 16, 32, seed=2)
    table = torch.arange(4, dtype=torch.int32).view(1, 1, 4)
    start, stop = torch.zeros(1, dtype=torch.int32), torch.full((1,), 40, dtype=torch.int32)
    q, out, lse = normal(1, 2, 32, seed=3), torch.empty(1, 2, 32), torch.empty(1, 2)
    program = ops.record(
        lambda: ops.decode_attention(q, Pages(k_pages, v_pages), RowKeys(table, start, stop), 0.2, Partial(out, lse))
    )
    program.run()
    stop.fill_(65)

    with pytest.raises(RuntimeError, match="op 0 .decode. of a recorded program"):
        program.run()
    stop.fill_(64)
    program.run()


def test_a_closed_object_refuses_to_replay():
    ops = CpuKernels(1)
    x, out = normal(1, 64, seed=1), torch.empty(1, 64)
    program = ops.record(lambda: ops.rms_norm(x, torch.ones(64), 1e-6, out))
    ops.close()

    with pytest.raises(RuntimeError, match="closed"):
        program.run()


def norm_between_flags(ops, x, out) -> tuple:
    """A program that waits for its first flag, normalises and sets its second; with both flags."""
    flags = torch.zeros(2, 16, dtype=torch.int64)
    first, second = flags[0, :1], flags[1, :1]

    def work():
        ops.record_wait(first, 1)
        ops.rms_norm(x, WEIGHT, 1e-6, out)
        ops.record_set(second, 5)

    return ops.record(work), first, second


def test_a_program_waits_for_a_flag_and_sets_one(ops):
    x, out, expected = normal(1, 64, seed=1), torch.zeros(1, 64), torch.zeros(1, 64)
    program, first, second = norm_between_flags(ops, x, out)
    running = threading.Thread(target=program.run)
    running.start()
    time.sleep(0.05)

    assert (out == 0).all() and second.item() == 0
    ops.set_flag(first, 1)
    assert ops.await_flag(second, 5, 20.0)
    running.join()
    ops.rms_norm(x, WEIGHT, 1e-6, expected)
    assert torch.equal(out, expected)
    assert 0.03 < program.waited_s < 20


def test_a_flag_that_does_not_come_stops_the_program(ops):
    x, out = normal(1, 64, seed=1), torch.zeros(1, 64)
    program, first, second = norm_between_flags(ops, x, out)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="entry 0 of a recorded program waited 0.1 s"):
        program.run(0.1)

    assert time.monotonic() - started >= 0.1
    assert (out == 0).all() and second.item() == 0
    ops.set_flag(first, 1)
    program.run(0.1)
    assert second.item() == 5 and program.waited_s == 0


def test_members_do_not_park_while_a_program_waits():
    """Nobody could wake them between two ops of it."""
    with CpuKernels(2) as ops:
        parked = ops._team._shared.parked
        x, out = normal(1, 64, seed=1), torch.zeros(1, 64)
        program, first, second = norm_between_flags(ops, x, out)
        running = threading.Thread(target=lambda: pytest.raises(TimeoutError, program.run, 0.3))
        running.start()
        seen = []
        while running.is_alive():
            seen.append(len(parked))
            time.sleep(0.005)
        deadline = time.monotonic() + 20
        while not parked and time.monotonic() < deadline:
            time.sleep(0.01)

        assert not any(seen[3:]) and len(seen) > 10  # the first: the program had not begun
        assert len(parked) == 1


def test_a_flag_of_a_program_needs_a_program(ops):
    with pytest.raises(RuntimeError, match="inside record"):
        ops.record_wait(torch.zeros(1, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="one int64"):
        ops.record(lambda: ops.record_set(torch.zeros(1), 1))
