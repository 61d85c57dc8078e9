"""Weights whose inputs lie in another order than the model's: which of them a step can bring its rows into order for.

A linear of ours multiplies the same rows by several tensors, q, k and v or gate and up, so that one order must serve
them all; GPTQ's act-order gives them one where it quantised them by the same rows. Others are held as float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from hetero_attn.spec.blocks import ModelSpec

if TYPE_CHECKING:
    import torch

SCATTERED_APART = "groups that act-order scattered otherwise in each of the tensors that are multiplied together"


class Ordered(Protocol):
    """A checkpoint that knows the order of its weights' inputs."""

    def input_order(self, name: str) -> torch.Tensor | None:
        """Which input of the model each input of a tensor's rows is; None where they are the same."""


def together(source: Ordered, model: ModelSpec) -> set[str]:
    """The tensors with an order of their own that are held as they are: all of a linear have the same one, and its
    block brings rows into it."""
    return {
        part.tensor
        for block in model.blocks
        if block.reorders
        for linear in block.linears
        if _have_one(source.input_order(part.tensor) for part in linear.parts)
        for part in linear.parts
    }


def apart(source: Ordered, model: ModelSpec) -> list[str]:
    """The tensors with an order of their own that a model holds as float32 because of it; of experts those of the
    first."""
    may_be_packed = together(source, model)
    return [
        part.tensor
        for linear in model.packed_linears
        for part in linear.parts
        if part.format == "fp32" and part.tensor not in may_be_packed and source.input_order(part.tensor) is not None
    ]


def _have_one(orders: Iterable[torch.Tensor | None]) -> bool:
    import torch

    first, *others = orders
    return first is not None and all(order is not None and torch.equal(order, first) for order in others)
