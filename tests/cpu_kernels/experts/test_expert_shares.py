"""How evenly threads share the picks of experts, one of which has most of the rows: counted, and still the same sums."""

import heapq

import pytest
import torch

from cpu_kernels.contract import Picks
from cpu_kernels.linear.expert_kernel import fair_range
from tests.cpu_kernels.experts.test_experts import KERNEL_NMSE, expert_weights, one_by_one
from tests.support.kernels.cpu_oracles import kernels, nmse


def busiest(picks: list[int], blocks: int, size: int, threads: int) -> float:
    """Rows times blocks of the busiest thread beside an even share, where who is ready takes the next range."""
    ready, total = [0] * threads, blocks * len(picks)
    for start in range(0, total, size):
        work = sum(picks[block // blocks] for block in range(start, min(start + size, total)))
        heapq.heappush(ready, heapq.heappop(ready) + work)
    return max(ready) / (blocks * sum(picks) / threads)


@pytest.mark.parametrize("place", [0, 60, 127])
@pytest.mark.parametrize("threads", [2, 8, 32])
@pytest.mark.parametrize(("blocks", "most"), [(96, 7), (128, 18)], ids=["gate_up", "down"])
def test_an_expert_with_a_third_of_the_rows_costs_no_thread_more_than_a_twentieth(blocks, most, threads, place):
    """Qwen3-30B-A3B in q4, 512 rows. Ranges of 128 KiB gave the busiest of 32 threads twice its share."""
    picks = [24] * 128
    picks[place] = 1224
    size = fair_range.py_func(most, blocks * sum(picks), max(picks), threads)

    assert 1 <= size <= most
    assert busiest(picks, blocks, size, threads) <= 1.05


def test_rows_that_are_even_are_handed_out_in_ranges_as_long_as_ever():
    assert fair_range.py_func(7, 96 * 4096, 46, 2) == 7
    assert busiest([24] * 127 + [1224], 128, 18, 32) > 1.5


@pytest.mark.parametrize("weight_dtype", ["bf16", "q8", "q4"])
def test_most_rows_at_one_expert(weight_dtype):
    starts = torch.tensor([0, 3, 3, 45, 46], dtype=torch.int32)
    sources = torch.arange(46, dtype=torch.int32) % 42
    weight, plain = expert_weights(4, 9, 128, weight_dtype)
    x, out, expected = torch.randn(42, 128), torch.empty(46, 144), torch.empty(46, 144)
    one_by_one(x, sources, starts, 0, plain, weight_dtype, expected)
    kernels().expert_linear(x, Picks(sources, starts, 0), weight, weight_dtype, out)

    assert nmse(out, expected) < KERNEL_NMSE
