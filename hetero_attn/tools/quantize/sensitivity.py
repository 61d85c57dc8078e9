"""How much a rounding of each weight, alone, changes what a model says on a text.

To second order the KL divergence of the output grows with the squared error of a linear's own output. So every weight
is rounded once, coarsely, and its divergence measured; that of a type is in proportion to the error that the type makes
in the linear's output. A linear of layer i is measured by the layers from i on, which begin with what the unrounded
layers before them left; where a head is tied to the embedding both uses are measured together.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.serving.progress import steps_bar
from hetero_attn.tools.quantize.choose import CANDIDATES, Loss
from hetero_attn.tools.quantize.encode import encode, fits, held
from hetero_attn.tools.quantize.feedback import Moments
from hetero_attn.tools.quantize.layer_runs import LayerRuns

Result = TypeVar("Result")
MEASURED_TOKENS = 128
SAMPLED_ROWS = 32  # of a weight, for the error of a type
COARSE_GROUP, COARSE_CODES = 32, 7
LEAST_KL = 1e-9  # so that of two weights without any effect the cheaper type is taken for neither by chance
HALF_MAX = torch.finfo(torch.float16).max


def losses(runs: LayerRuns, ops: CpuKernels) -> dict[str, Loss]:
    """What every weight costs in each type that it may have, by the name of its tensor; a tied head with its embedding.

    runs: over one window, several of which run together.
    """
    hidden = runs.embedded()
    starts: list[torch.Tensor] = [hidden]
    moments: list[Moments] = []
    for layer in range(runs.layers):
        gather = Moments()
        hidden = runs.after_layer(layer, hidden, gather)
        starts.append(hidden)
        moments.append(gather)
    before = runs.log_probabilities(hidden.flatten(0, 1))
    measured: dict[str, Loss] = {}
    for layer in steps_bar(range(runs.layers), "measuring what each linear costs"):
        parts = list(runs.parts(layer))
        changed = [_changed(rows, partial(runs.after_layer, layer, starts[layer])) for _, rows, _ in parts]
        for (part, rows, address), found in zip(parts, _divergences(runs, layer + 1, changed, before), strict=True):
            measured[part.tensor] = _loss(_flat(rows)[: part.rows], moments[layer].mean(address), found, ops)
    for name, rows, count, starts_at in _ends(runs, starts):
        found = _changed(rows, lambda: _divergences(runs, *starts_at(), before)[0])  # noqa: B023
        measured[name] = _loss(_flat(rows)[:count], None, found, ops)
    return measured


def _ends(
    runs: LayerRuns, starts: list[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, int, Callable[[], tuple[int, list[torch.Tensor]]]]]:
    """Embedding and head, a tied pair once: the tensor, its rows, how many are no padding, and from where on the model
    is run with others."""
    name, embedding = runs.embedding
    for part, rows, _ in runs.head_parts():
        if part.tensor != name:
            yield part.tensor, rows, part.rows, lambda: (runs.layers, [starts[-1]])
        is_tied = part.tensor == name
        count = part.rows if is_tied else embedding.shape[0]
        yield name, rows if is_tied else embedding, count, lambda: (0, [runs.embedded()])


def _divergences(runs: LayerRuns, layer: int, changed: list[torch.Tensor], before: torch.Tensor) -> list[float]:
    """The mean divergence of the output for each of what the layers from `layer` on begin with."""
    hidden = torch.cat(changed)
    for index in range(layer, runs.layers):
        hidden = runs.after_layer(index, hidden)
    found = []
    for each in hidden.split(changed[0].shape[0]):
        after = runs.log_probabilities(each.flatten(0, 1))
        found.append((before.exp() * (before - after)).sum(-1).mean().item())
    return found


def _changed(rows: torch.Tensor, run: Callable[[], Result]) -> Result:
    """What `run` gives while a weight's rows are rounded coarsely."""
    kept = rows.clone()
    rows.copy_(rounded_coarsely(_flat(kept)).view(rows.shape))
    try:
        return run()
    finally:
        rows.copy_(kept)


def _flat(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, rows.shape[-1]).float()


def _loss(rows: torch.Tensor, moments: torch.Tensor | None, divergence: float, ops: CpuKernels) -> Loss:
    """divergence: of the rows [rows, in_features] rounded coarsely. moments: of the inputs, None to count every error
    alike."""
    error = _error(rounded_coarsely(rows), rows, moments) / rows.shape[0]
    scale = max(divergence, LEAST_KL) / max(error, 1e-30)
    sample = rows[:: max(1, rows.shape[0] // SAMPLED_ROWS)].contiguous()
    errors = _errors(sample, moments, ops)
    return Loss(rows.shape[0], rows.shape[1], {name: scale * found for name, found in errors.items()})


def rounded_coarsely(rows: torch.Tensor) -> torch.Tensor:
    """Rows of about four bits in groups of 32, or what divides the inputs, without any search."""
    group = COARSE_GROUP if rows.shape[1] % COARSE_GROUP == 0 else rows.shape[1]
    groups = rows.reshape(-1, group)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-30) / COARSE_CODES
    return ((groups / scale).round_() * scale).view(rows.shape)


def _error(found: torch.Tensor, expected: torch.Tensor, moments: torch.Tensor | None) -> float:
    """The squared error of the output of a linear whose inputs have these moments, or of the weights."""
    missed = found - expected
    return (missed.square() if moments is None else missed @ moments * missed).sum().item()


def _errors(rows: torch.Tensor, moments: torch.Tensor | None, ops: CpuKernels) -> dict[str, float]:
    """The error of a row, on average, in every type that rows may have."""
    found = {}
    for name in CANDIDATES:
        if fits(name, rows.shape[1]) and not (name == "F16" and rows.abs().amax() > HALF_MAX):
            found[name] = _error(held(name, encode(name, rows), rows.shape[1], ops), rows, moments) / rows.shape[0]
    return {name: error for name, error in found.items() if not _is_beaten(name, error, found)}


def _is_beaten(name: str, error: float, found: dict[str, float]) -> bool:
    """Whether a type of fewer bytes is no worse."""
    size = GGUF_BY_NAME[name].block_bytes / GGUF_BY_NAME[name].items
    smaller = (other for other in found if GGUF_BY_NAME[other].block_bytes / GGUF_BY_NAME[other].items < size)
    return any(found[other] <= error for other in smaller)
