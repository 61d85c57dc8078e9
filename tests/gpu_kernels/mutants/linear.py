"""Planted bugs of the linears: of one row, of few, of tiles and of dense blocks."""

from __future__ import annotations

from functools import partial

from gpu_kernels import activation
from tests.support.kernels import kernel_checks as checks


def tiled(multiply, weight_dtype):
    """Few rows by the tile for many, of inputs in their own order."""

    def op(x, weight, weight_dtype, bias, out, accumulate):
        multiply(activation.quantize_activation(x, "own"), weight, weight_dtype, bias, out, accumulate)

    checks.check_linear(op, "cpu", weight_dtype, rows=5, num_blocks=3, in_features=192)


GEMV_Q4 = partial(checks.check_linear, device="cpu", weight_dtype="q4", rows=1, num_blocks=2, in_features=2112)
GEMV_Q8 = partial(checks.check_linear, device="cpu", weight_dtype="q8", rows=1, num_blocks=2, in_features=192)
FLAT_Q4 = partial(checks.check_linear, device="cpu", weight_dtype="q4", rows=18, num_blocks=3, in_features=192)
FLAT_Q8 = partial(checks.check_linear, device="cpu", weight_dtype="q8", rows=18, num_blocks=3, in_features=192)
TILE_Q4 = partial(tiled, weight_dtype="q4")
TILE_Q8 = partial(tiled, weight_dtype="q8")
LONG_FLAT_Q4 = partial(checks.check_linear, device="cpu", weight_dtype="q4", rows=3, num_blocks=2, in_features=1088)

# name: (file, op, check, right text, wrong text)
MUTANTS = {
    "gemv swaps nibbles": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "packed & 0x0F0F0F0F",
        "(packed >> 4) & 0x0F0F0F0F",
    ),
    "gemv forgets the minima": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "tl.sum(products, axis=1) + offsets",
        "tl.sum(products, axis=1) + 0.0 * offsets",
    ),
    "gemv of q8 keeps the offset": ("quantized_linear", "quantized_linear", GEMV_Q8, "packed ^ -2139062144", "packed"),
    "gemv of q8 uses one scale for both halves": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q8,
        "(other * row_scale[:, None])",
        "(scale * row_scale[:, None])",
    ),
    "gemv reads the inputs of another line": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "lines % 4 * 4 + lines // 4",
        "lines * 2",
    ),
    "gemv warps share a group": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "group = first + step * WARPS + tl.arange(0, WARPS)",
        "group = first + step * WARPS + 0 * tl.arange(0, WARPS)",
    ),
    "a step is left out": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "tl.static_range(UNROLL)",
        "tl.static_range(UNROLL - 1)",
    ),
    "the last group is left out": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "inside = group < num_groups",
        "inside = group < num_groups - 1",
    ),
    "flat swaps nibbles": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q4,
        "tl.join(low_nibbles(packed), high_nibbles(packed))",
        "tl.join(high_nibbles(packed), low_nibbles(packed))",
    ),
    "tile forgets the minima": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q4,
        "acc += row_sum[:, None] * minimum",
        "acc += 0.0 * row_sum[:, None] * minimum",
    ),
    "tile swaps the nibbles": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q4,
        "tl.join(low_nibbles(packed), high_nibbles(packed))",
        "tl.join(high_nibbles(packed), low_nibbles(packed))",
    ),
    "tile multiplies the weights of the step before": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q4,
        "following = step + 1 ",
        "following = step ",
    ),
    "tile of q8 reads the first half twice": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q8,
        "half = 0 if IS_Q4 else following % 2",
        "half = 0",
    ),
    "tile of q8 scales by the other row": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q8,
        "tl.load(scales + group * scale_stride + row, mask",
        "tl.load(scales + group * scale_stride + (row ^ 1), mask",
    ),
    "flat forgets the minima": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q4,
        "acc += minimum[:, :, None] * row_sum[:, None, :]",
        "acc += 0.0 * minimum[:, :, None] * row_sum[:, None, :]",
    ),
    "flat of q8 keeps the offset": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "signed(packed).reshape",
        "packed.to(tl.int8, bitcast=True).reshape",
    ),
    "flat of q8 uses one scale for both halves": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "_feature_values(header + half * 4,",
        "_feature_values(header,",
    ),
    "flat reads features of another block": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "quad[:, None] // 4",
        "quad[:, None] // 8",
    ),
    "flat orders the scales of a quad otherwise": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "tl.join(_half(words, 0), _half(words, 2)), tl.join(_half(words, 1), _half(words, 3))",
        "tl.join(_half(words, 0), _half(words, 1)), tl.join(_half(words, 2), _half(words, 3))",
    ),
    "flat reads other rows": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "tl.arange(0, ROWS // 8)[None, :] * 8",
        "tl.arange(0, ROWS // 8)[None, :] * 4",
    ),
    "flat takes scales of other rows": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "tl.join(low, high).permute(0, 2, 1)",
        "tl.join(high, low).permute(0, 2, 1)",
    ),
    "flat parts share a group": ("quantized_linear", "quantized_linear", LONG_FLAT_Q4, "warp % PARTS", "warp // PARTS"),
    "flat leaves the last group out": (
        "quantized_linear",
        "quantized_linear",
        LONG_FLAT_Q4,
        "inside = group < num_groups",
        "inside = group < num_groups - 1",
    ),
    "flat leaves a step out": (
        "quantized_linear",
        "quantized_linear",
        LONG_FLAT_Q4,
        "tl.static_range(UNROLL)",
        "tl.static_range(UNROLL - 1)",
    ),
    "flat writes rows past the last": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "(rows_of_tile < rows)",
        "(rows_of_tile < rows + 1)",
    ),
    "flat writes features past the last": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "inside = column < num_blocks * 16",
        "inside = column <= num_blocks * 16",
    ),
}
