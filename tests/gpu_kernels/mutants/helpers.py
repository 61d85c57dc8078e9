"""Planted bugs of what several linears share: rounding of activations and dequantising of weights."""

from __future__ import annotations

from functools import partial

from gpu_kernels import linear_layer
from gpu_kernels.linear_layer import linear
from tests.gpu_kernels.mutants.linear import FLAT_Q4, FLAT_Q8, GEMV_Q4
from tests.support.kernels import kernel_checks as checks

DENSE_Q4 = partial(
    checks.check_linear,
    device="cpu",
    weight_dtype="q4",
    rows=70,
    num_blocks=3,
    in_features=100,
    tolerance=checks.DENSE_NMSE,
)
DENSE_Q8 = partial(DENSE_Q4, weight_dtype="q8")

# name: (file of a helper, module that uses it, the helper, check of an op, right text, wrong text)
HELPER_MUTANTS = {
    "rounding half up": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(GEMV_Q4, linear),
        "(steps + ROUNDING) - ROUNDING",
        "tl.floor(steps + 0.5)",
    ),
    "zero group divides by zero": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(GEMV_Q4, linear),
        "tl.where(scale == 0.0, 1.0, scale)",
        "scale",
    ),
    "inputs of q4 not reordered": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(FLAT_Q4, linear),
        "high * 32 + quarter * 8 + half * 4 + byte",
        "stored",
    ),
    "inputs of q8 not reordered": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(FLAT_Q8, linear),
        "half * 32 + high * 16 + quarter * 4 + byte",
        "stored",
    ),
    "scales of another row": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(FLAT_Q8, linear),
        "scales + groups * scale_stride + row",
        "scales + groups * scale_stride + (row ^ 1)",
    ),
    "rounded x without its scale": (
        "activation",
        linear_layer,
        "round_activation",
        partial(DENSE_Q4, linear),
        "steps * scale[:, None]",
        "steps",
    ),
    "rounding reads past a row": (
        "activation",
        linear_layer,
        "round_activation",
        partial(DENSE_Q4, linear),
        "mask=columns < in_features",
        "mask=columns <= in_features",
    ),
    "x is not rounded to int8": (
        "activation",
        linear_layer,
        "round_activation",
        partial(DENSE_Q4, linear),
        "(steps + ROUNDING) - ROUNDING",
        "steps",
    ),
    "dequantising swaps nibbles": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q4, linear),
        "inputs // 4 * 4",
        "(1 - inputs // 4) * 4",
    ),
    "dequantising forgets the minima": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q4, linear),
        "* scale + minimum",
        "* scale",
    ),
    "dequantising has another zero point": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q8, linear),
        "- 128)",
        "- 127)",
    ),
    "dequantising uses one scale for both halves": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q8, linear),
        "span % 2 * 16",
        "0",
    ),
    "dequantising leaves the last span out": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q4, linear),
        "inside = span < num_spans",
        "inside = span < num_spans - 1",
    ),
    "dequantising mixes features": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q4, linear),
        "(block * 16 + four * 4 + one)",
        "(block * 16 + four + one * 4)",
    ),
}
