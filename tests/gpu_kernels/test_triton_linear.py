"""The linear op over packed blocks in every row regime, against float64 over the bytes read one at a time."""

from __future__ import annotations

import pytest
import torch

from placement.cost import terms as op_cost
from tests.support.kernels import kernel_checks as checks
from tests.support.kernels.kernel_data import normal, packed_weight

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels import activation, dequantize, int8_tile, linear_layer, quantized_linear, quantized_shapes, reference
from gpu_kernels.device_ops import DeviceOps

BORDER = linear_layer.INT8_ROWS
TILES = sorted({*quantized_shapes.TILES_FEW, *quantized_shapes.TILES_MANY, quantized_shapes.Tile(8, 2, 2, 2)})
GEMV_SHAPES = [quantized_shapes.GEMV_FEW, quantized_shapes.GEMV_MANY, quantized_shapes.GemvShape(2, 1)]


def check(device, weight_dtype, rows, num_blocks, in_features, **options):
    """check_linear with the tolerance of the regime that `rows` is in."""
    tolerance = checks.FLOAT32_NMSE if rows <= BORDER else checks.DENSE_NMSE
    checks.check_linear(
        linear_layer.linear, device, weight_dtype, rows, num_blocks, in_features, tolerance=tolerance, **options
    )


@pytest.mark.table
@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
@pytest.mark.parametrize(
    "rows,num_blocks,in_features",
    [
        (1, 3, 100),
        (1, 2, 2112),
        (1, 1, 64),
        (2, 3, 100),
        (5, 2, 2112),
        (8, 1, 64),
        (9, 3, 130),
        (16, 1, 320),
        (17, 3, 130),
        (33, 5, 64),
        (BORDER, 3, 100),
        (BORDER + 1, 3, 100),
        (130, 5, 1088),
    ],
)
def test_quantised_linear(device, weight_dtype, rows, num_blocks, in_features):
    check(device, weight_dtype, rows, num_blocks, in_features)


@pytest.mark.table
@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
@pytest.mark.parametrize("rows,in_features", [(1, 64), (1, 2112), (3, 64), (3, 2112), (BORDER + 6, 64)])
def test_quantised_linear_accumulates(device, weight_dtype, rows, in_features):
    check(device, weight_dtype, rows, 3, in_features, with_bias=False, accumulate=True)


@pytest.mark.table
@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_serves_any_shape(device, weight_dtype, tile, monkeypatch):
    monkeypatch.setattr(quantized_linear, "tile_for", lambda rows, num_blocks: tile)

    check(
        device,
        weight_dtype,
        min(tile.rows + 3, BORDER),
        2 * tile.tiles + 1,
        64 * tile.parts * tile.unroll + 30,
        accumulate=True,
    )


@pytest.mark.table
@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
@pytest.mark.parametrize("shape", GEMV_SHAPES, ids=str)
def test_every_shape_of_one_row_serves_any_inputs(device, weight_dtype, shape, monkeypatch):
    monkeypatch.setattr(quantized_linear, "gemv_shape", lambda num_blocks: shape)

    check(device, weight_dtype, 1, 2, 64 * shape.warps * shape.unroll + 30, accumulate=True)


@pytest.mark.table
@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
@pytest.mark.parametrize("tile", [int8_tile.TILE, int8_tile.SMALL_TILE], ids=str)
@pytest.mark.parametrize("rows,num_blocks,in_features", [(65, 3, 100), (130, 9, 192)])
def test_many_rows_in_int8_are_as_exact_as_few(device, weight_dtype, tile, rows, num_blocks, in_features, monkeypatch):
    monkeypatch.setattr(int8_tile, "tile_for", lambda rows, num_blocks: tile)
    accumulate = rows == 130

    checks.check_linear(
        DeviceOps(device, {weight_dtype: 512}).linear,
        device,
        weight_dtype,
        rows,
        num_blocks,
        in_features,
        not accumulate,
        accumulate,
    )


@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
def test_what_a_card_multiplies_in_int8_is_said_once_for_its_operations(device, weight_dtype, monkeypatch):
    """At 70 rows: in int8 with 70, in bf16 with 69; x rounded before is multiplied as it was rounded."""
    used = []
    monkeypatch.setattr(linear_layer, "multiply_many_rows", lambda *arguments: used.append("int8"))
    monkeypatch.setattr(linear_layer, "_dense_linear", lambda *arguments: used.append("bf16"))
    x, out = torch.ones(70, 64, device=device), torch.empty(70, 16, device=device)
    weight = packed_weight(weight_dtype, 1, 64, seed=1).to(device)
    for limit, expected in ((70, "int8"), (69, "bf16")):
        ops = DeviceOps(device, {"q4": limit, "q8": limit})
        for given in (x, ops.rounded(x, weight_dtype)):
            ops.linear(given, weight, weight_dtype, None, out)
            assert used.pop() == expected


@pytest.mark.parametrize("weight_dtype", ["bf16", "q4", "q8"])
@pytest.mark.parametrize("bound", ["PRODUCT_BYTES", "DENSE_BYTES"])
def test_many_rows_are_computed_in_pieces(device, weight_dtype, bound, monkeypatch):
    monkeypatch.setattr(linear_layer, bound, 2 * 4 * 16 * 70 if bound == "PRODUCT_BYTES" else 2 * 2 * 16 * 164)

    check(device, weight_dtype, 70, 5, 100, accumulate=True)


@pytest.mark.parametrize(
    "rows,in_features,expected",
    [
        (1, 2**20, 1),
        (65, 4096, 504),
        (512, 4096, 504),
        (4096, 64, 128),
    ],
)
def test_a_piece_stays_within_its_bounds(rows, in_features, expected):
    x = torch.empty(rows, in_features, device="meta")

    assert linear_layer._blocks_at_once(x, "q4") == expected


def test_the_cost_model_counts_products_of_the_same_size():
    assert op_cost.GPU_PRODUCT_BYTES == linear_layer.DENSE_BYTES


@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
@pytest.mark.parametrize("num_blocks,in_features", [(1, 64), (3, 1100)])
def test_dequantised_weights_are_those_of_the_reference(device, weight_dtype, num_blocks, in_features):
    weight = packed_weight(weight_dtype, num_blocks, in_features, seed=4)
    padded = -(-in_features // 64) * 64

    dense = dequantize.dequantize(weight.to(device), weight_dtype).cpu()

    # A fused multiply-add may differ in the last bit of float32, and so now and then in the last one of bf16.
    expected = reference.unpack(weight, weight_dtype, padded)
    assert dense.dtype == torch.bfloat16 and dense.shape == (num_blocks * 16, padded)
    assert ((dense.float() - expected).abs() <= 2.0**-8 * expected.abs()).all()


def test_activations_of_many_rows_are_those_of_the_reference(device):
    x = normal(3, 200, seed=1) * torch.tensor([[1e-6], [1.0], [1e6]])
    expected = torch.zeros(3, 256)
    expected[:, :200] = reference.round_activation(x, "q4")

    assert torch.equal(activation.round_activation(x.to(device)).cpu(), expected.bfloat16())


@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows,in_features,with_bias,accumulate", [(1, 100, True, False), (9, 64, False, True)])
def test_dense_linear(device, weight_dtype, rows, in_features, with_bias, accumulate):
    checks.check_linear(linear_layer.linear, device, weight_dtype, rows, 3, in_features, with_bias, accumulate)


@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
def test_quantised_activations_are_those_of_the_reference(device, weight_dtype):
    x = normal(3, 200, seed=1) * torch.tensor([[1e-6], [1.0], [1e6]])
    expected, expected_scale = reference.quantize_activation(x)

    q, scale, sums = activation.quantize_activation(x.to(device), weight_dtype)
    # Stored as [quarter, half, high, byte], where a line of four bytes is 4 * high + quarter. A half of q4 is low or
    # high nibbles, so inputs are [line, half, byte]; a half of q8 is 8 lines, so inputs are [half, line, byte].
    stored = q.cpu().view(3, 4, 4, 2, 2, 4)
    q = stored.permute((0, 1, 4, 2, 3, 5) if weight_dtype == "q4" else (0, 1, 3, 4, 2, 5)).reshape(3, 4, 64)

    assert torch.equal(q, expected)
    assert torch.equal(scale.cpu().T, expected_scale)
    assert torch.allclose(sums.cpu().T, expected_scale * expected.float().sum(-1), rtol=1e-6)


def test_a_wrong_weight_is_refused(device):
    x, out = torch.zeros(1, 64, device=device), torch.zeros(1, 16, device=device)

    with pytest.raises(ValueError, match="'q5' is unknown"):
        linear_layer.linear(x, torch.zeros(1, 576, dtype=torch.uint8, device=device), "q5", None, out)
    with pytest.raises(AssertionError, match="1088"):
        linear_layer.linear(x, torch.zeros(1, 576, dtype=torch.uint8, device=device), "q8", None, out)


def test_no_rows_and_no_blocks_are_accepted(device):
    x, weight = torch.zeros(2, 64, device=device), torch.zeros(1, 576, dtype=torch.uint8, device=device)

    linear_layer.linear(x[:0], weight, "q4", None, torch.zeros(0, 16, device=device))
    linear_layer.linear(x, weight[:0], "q4", None, torch.zeros(2, 0, device=device))
