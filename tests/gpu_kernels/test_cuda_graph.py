"""On a CUDA device: a captured decode attention stays right as the sequence grows; no op waits for the device."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.contract import Pages, Partial, RowKeys
from tests.support.kernel_data import boundary_adversarial, lse_error, nmse, oracle_decode, paged_cache

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
