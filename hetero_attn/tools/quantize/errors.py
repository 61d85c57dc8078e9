"""The squared error that each type makes in rows of weights, or in what a linear gives."""

from collections.abc import Mapping

import torch

from cpu_kernels import CpuKernels
from hetero_attn.tools.quantize.choose import CANDIDATES
from hetero_attn.tools.quantize.encode import HALF_MAX, encode, fits, held
from hetero_attn.tools.quantize.stacks import bits_of_type

SAMPLED_ROWS = 32  # of a weight


def squared_error(found: torch.Tensor, expected: torch.Tensor, moments: torch.Tensor | None = None) -> float:
    """The squared error of the output of a linear whose inputs have these moments, or of the weights, a row."""
    missed = found - expected
    return (missed.square() if moments is None else missed @ moments * missed).sum().item() / missed.shape[0]


def errors_of_types(rows: torch.Tensor, moments: torch.Tensor | None, ops: CpuKernels) -> dict[str, float]:
    """The error in every type that rows float32 [rows, in_features] may have."""
    return {
        name: squared_error(held(name, encode(name, rows), rows.shape[1], ops), rows, moments)
        for name in CANDIDATES
        if fits(name, rows.shape[1]) and not (name == "F16" and rows.abs().amax() > HALF_MAX)
    }


def kept_as_it_is(own: str | None, in_features: int) -> dict[str, float]:
    """The error of the type in which a source already has such rows; empty where there is none."""
    return {own: 0.0} if own is not None and fits(own, in_features) else {}


def without_beaten(errors: Mapping[str, float]) -> dict[str, float]:
    """The errors of types of which no smaller one is as good, nor BF16 where a source has that."""

    def is_beaten(name: str) -> bool:
        smaller = [other for other in errors if bits_of_type(other) < bits_of_type(name)]
        return any(errors[other] <= errors[name] for other in smaller) or (name == "F16" and "BF16" in errors)

    return {name: error for name, error in errors.items() if not is_beaten(name)}
