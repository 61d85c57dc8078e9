"""In how many products the timeline computes a linear on a GPU: as many as the GPU's linear does."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from cpu_kernels.formats import unit_blocks, unit_bytes
from gpu_kernels import linear_layer
from hetero_attn.tools.timeline.durations import products
from placement import HardwareProfile

MACHINE = HardwareProfile.named("rtx4060ti-ddr5")
FEATURES, INPUTS = 28672, 4096  # of Llama 3.1 8B's gate_up: four pieces of 64 MiB as bf16
PRODUCTS = (
    "_dense_linear",
    "multiply_few_half_rows",
    "multiply_few_number_rows",
    "multiply_few_rows",
    "multiply_many_rows",
    "multiply_quantized",
)


class OnGpu:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name):
        return getattr(self._tensor, name)

    def __getitem__(self, key):
        return self._tensor[key]


def computed_products(monkeypatch, weight_dtype, x, weight, out) -> int:
    """Calls of products by the GPU's linear, none of which runs."""
    calls = []
    for name in PRODUCTS:
        monkeypatch.setattr(linear_layer, name, lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(linear_layer, "products_in_place", lambda device: True)
    order = linear_layer.rounding_order(x.shape[0], weight_dtype, MACHINE.int8_rows.get(weight_dtype, 0))
    values = (x,) * (1 if order in (None, "bf16") else 3)
    linear_layer.linear(linear_layer.RoundedInput(tuple(x.shape), values), weight, weight_dtype, None, OnGpu(out))
    return len(calls)


def linear_of(weight_dtype, rows):
    """(x, weight, out) without memory."""
    blocks = FEATURES // 16 // unit_blocks(weight_dtype)
    shapes = (rows, INPUTS), (blocks, unit_bytes(weight_dtype, INPUTS)), (rows, FEATURES)
    return [torch.empty(shape, device="meta") for shape in shapes]


@pytest.mark.parametrize("rows", [1, 8, 9, 64, 65, 512])
@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16", "fp16", "q8", "q4", "q4_k", "nf4", "int8"])
def test_a_timeline_counts_the_products_that_a_linear_is_computed_in(weight_dtype, rows, monkeypatch):
    """It once counted four for few rows of coded weights, and one for many rows of float16 ones."""
    x, weight, out = linear_of(weight_dtype, rows)
    counted = products({"x": x, "weight": weight, "weight_dtype": weight_dtype, "out": out}, MACHINE)

    assert counted == computed_products(monkeypatch, weight_dtype, x, weight, out)


def test_a_mix_is_at_least_a_product_of_each_format():
    counts = []
    for rows in (8, 9):
        x, weight, out = linear_of("q4_k*4+q6_k*4", rows)
        counts.append(products({"x": x, "weight": weight, "weight_dtype": "q4_k*4+q6_k*4", "out": out}, MACHINE))

    assert counts == [2, 4]
