"""How much a rounding of each weight, alone, changes what a model says on a text.

To second order the KL divergence of the output grows with the squared error of a weight. So every linear is rounded
once, coarsely, and its divergence measured; that of a type is in proportion to the type's own error.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from cpu_kernels import CpuKernels
from hetero_attn.checkpoints.unit_rows import dequantised
from hetero_attn.errors import PromptError
from hetero_attn.llm import LLM
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.serving.progress import steps_bar
from hetero_attn.spec.weights import Part
from hetero_attn.tools.quantize.blocks import ENCODERS, TYPES, encode, fits
from hetero_attn.tools.quantize.choose import CANDIDATES, Loss

CALIBRATION_TOKENS = 512
SAMPLED_ROWS = 128  # of a weight, for the error of a type
COARSE_GROUP, COARSE_CODES = 32, 7
LEAST_KL = 1e-9  # so that of two weights without any effect the cheaper type is taken for neither by chance


def losses(model: Path, text: str, ops: CpuKernels, threads: int | None = None) -> dict[str, Loss]:
    """What every linear costs in each type that it may have, by the name of its tensor; a tied head with its embedding.

    Raises PromptError for a text of fewer than two tokens, and what loading raises.
    """
    with LLM(
        model,
        device="cpu",
        dtype="fp32",
        kv_dtype="fp32",
        max_context=CALIBRATION_TOKENS,
        num_threads=threads,
        progress=True,
    ) as llm:
        if llm.tokenizer is None:
            raise PromptError(f"{model} has no tokenizer, so a text says nothing; give a --recipe")
        tokens = list(llm.tokenizer.encode(text))[:CALIBRATION_TOKENS]
        if len(tokens) < 2:
            raise PromptError(f"the calibration text has {len(tokens)} tokens; give some hundreds")
        before = torch.log_softmax(llm.logits(tokens), -1)
        parts = [found for linear in llm.engine.weights.linears for found in _parts(linear)]
        measured: dict[str, Loss] = {}
        for part, rows in steps_bar(parts, "measuring what each linear costs"):
            measured[part.tensor] = _loss(llm, tokens, before, rows, ops)
        return measured


def _parts(linear: LinearWeights) -> Iterator[tuple[Part, torch.Tensor]]:
    """Every part of a linear with its rows: views of the weights that the model computes with."""
    spec = linear.spec
    rows = linear.dram.view(torch.float32).view(spec.column_units, spec.unit_features, spec.in_features)
    offset = 0
    for part in spec.parts:
        yield part, rows[:, offset : offset + part.rows_per_unit]
        offset += part.rows_per_unit


def _loss(llm: LLM, tokens: list[int], before: torch.Tensor, rows: torch.Tensor, ops: CpuKernels) -> Loss:
    kept = rows.clone()
    flat = kept.view(-1, kept.shape[-1])
    coarse = rounded_coarsely(flat)
    rows.copy_(coarse.view(rows.shape))
    after = torch.log_softmax(llm.logits(tokens), -1)
    rows.copy_(kept)
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    error = relative_error(coarse, flat)
    sample = flat[:: max(1, flat.shape[0] // SAMPLED_ROWS)].contiguous()
    scale = max(divergence, LEAST_KL) / max(error, 1e-30)
    return Loss(flat.shape[0], flat.shape[1], {name: scale * found for name, found in _errors(sample, ops).items()})


def rounded_coarsely(rows: torch.Tensor) -> torch.Tensor:
    """Rows of about four bits in groups of 32, or what divides the inputs, without any search."""
    group = COARSE_GROUP if rows.shape[1] % COARSE_GROUP == 0 else rows.shape[1]
    groups = rows.reshape(-1, group)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-30) / COARSE_CODES
    return ((groups / scale).round_() * scale).view(rows.shape)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Squared error over the squares."""
    return ((found - expected).square().sum() / expected.square().sum().clamp_min(1e-30)).item()


def _errors(rows: torch.Tensor, ops: CpuKernels) -> dict[str, float]:
    """The relative error of rows in every type that they may have."""
    found = {}
    for name in CANDIDATES:
        if fits(name, rows.shape[1]):
            held = (
                rows.half().float()
                if name not in ENCODERS
                else dequantised(ops, encode(name, rows), name, "", rows.shape[1])
            )
            found[name] = relative_error(held, rows)
    return {name: error for name, error in found.items() if not _is_beaten(name, error, found)}


def _is_beaten(name: str, error: float, found: dict[str, float]) -> bool:
    """Whether a type of no more bytes is no worse."""
    size = TYPES[name].block_bytes / TYPES[name].items
    smaller = (other for other in found if TYPES[other].block_bytes / TYPES[other].items < size)
    return any(found[other] <= error for other in smaller)
