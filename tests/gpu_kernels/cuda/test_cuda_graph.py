"""On a CUDA device: a captured decode attention stays right as the sequence grows; no op waits for the device."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.contract import DeltaRule, DeltaStates, Pages, Partial, RowKeys
from tests.support.kernels.delta_cases import EXACT, PUBLISHED, drawn, oracle
from tests.support.kernels.kernel_data import boundary_adversarial, lse_error, nmse, oracle_decode, paged_cache

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

import gpu_kernels
from gpu_kernels.device_ops import DeviceOps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("counters", ["cleared in the graph", "kept"])
def test_a_captured_decode_attention_follows_the_device_side_range(counters):
    ops = DeviceOps("cuda") if counters == "kept" else gpu_kernels
    q, keys, values = boundary_adversarial(2, 2, 4, 2048, 64, [700, 1500], torch.bfloat16)
    cache = paged_cache(keys, values, 16, [range(2048)] * 2)
    start, stop = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.ones(2, dtype=torch.int32, device="cuda")
    out, lse = torch.empty_like(q, device="cuda"), torch.empty(q.shape[:2], device="cuda")
    query, pages = q.cuda(), Pages(cache.k_pages.cuda(), cache.v_pages.cuda())
    keys_seen = RowKeys(cache.page_table.cuda(), start, stop)

    def step() -> None:
        ops.decode_attention(query, pages, keys_seen, 0.125, Partial(out, lse))

    step()  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for limit in ([700, 1], [2048, 1500], [0, 17], [2048, 2048], [64, 65]):
        stop.copy_(torch.tensor(limit, dtype=torch.int32))
        graph.replay()
        expected, expected_lse = oracle_decode(q, cache, [0, 0], limit, 0.125)

        assert lse_error(lse, expected_lse) <= 1e-5
        assert nmse(out, expected, dims=(0, 2)) <= 1e-5


def test_a_captured_delta_step_follows_ids_and_states():
    """Of the published shape; states go on from one replay to the next, and rows change their sequences."""
    case = drawn(PUBLISHED, [2, 0, 1], padding=16)
    rule = DeltaRule(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in case.rule))
    projected, gates, states, ids = (part.cuda() for part in (case.projected, case.gates, case.states, case.ids))
    out = torch.empty(3, PUBLISHED.value_heads * PUBLISHED.value_dim, device="cuda")
    gpu_kernels.delta_step(projected, gates, rule, DeltaStates(states), ids, out)  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu_kernels.delta_step(projected, gates, rule, DeltaStates(states), ids, out)
    states.copy_(case.states)
    for order in ([2, 0, 1], [0, 3, 2], [1, 1, 1], [3, 0, 3]):
        ids.copy_(torch.tensor(order))
        case = case._replace(ids=torch.tensor(order), states=states.cpu())
        graph.replay()
        expected, after = oracle(PUBLISHED, case)

        assert nmse(out.cpu(), expected, dims=(0, 1)) <= EXACT
        assert nmse(states.cpu(), after, dims=(0, 1)) <= EXACT


@pytest.mark.parametrize("weight_dtype", ["q4", "q8", "bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_linear_does_not_synchronise(weight_dtype, rows):
    block_bytes = {"q4": 576, "q8": 1088, "bf16": 16 * 64 * 2, "fp32": 16 * 64 * 4}[weight_dtype]
    weight = torch.zeros(4, block_bytes, dtype=torch.uint8, device="cuda")
    x, out = torch.zeros(rows, 64, device="cuda"), torch.empty(rows, 64, device="cuda")
    gpu_kernels.linear(x, weight, weight_dtype, None, out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_kernels.linear(x, weight, weight_dtype, None, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert torch.equal(out.cpu(), torch.zeros(rows, 64))
