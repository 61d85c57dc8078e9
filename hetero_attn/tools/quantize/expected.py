"""What a rounding probably costs where no text says it: by the error that it makes, the part of the layer, its place.

To second order the divergence of a model's output is in proportion to the squared error of a weight, over the square of
the weight itself. How much of it depends on the part: the numbers are rounded from measurements (`sensitivity`) of
SmolLM2-135M and the shipped checkpoint, where of parts alike most lie within a factor of two of their mean, and what
matters more lies in the first layers and the last.
"""

from collections.abc import Mapping

import torch

from cpu_kernels import CpuKernels
from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.loading.run_rows import numbers_of
from hetero_attn.serving.progress import steps_bar
from hetero_attn.spec.tensor_names import split_name, tensor_name
from hetero_attn.tools.quantize.choose import Loss
from hetero_attn.tools.quantize.errors import (
    SAMPLED_ROWS,
    errors_of_types,
    kept_as_it_is,
    squared_error,
    without_beaten,
)
from hetero_attn.tools.quantize.stacks import is_router, stacks

# Of all of a layer's or a model's weights of a kind together, in a common unit.
OF_PART = {"q_proj": 1, "k_proj": 1, "v_proj": 4, "o_proj": 1, "gate_proj": 2, "up_proj": 2.5, "down_proj": 2.5}
OF_EMBEDDING, OF_HEAD = 15, 55
AT_THE_ENDS, END = 3, 1 / 12  # times, in that share of the layers at either end
SAMPLED_RUNS = 8  # of a stack's rows


def expected_losses(
    source: Checkpoint | GgufCheckpoint,
    shapes: Mapping[str, tuple[int, ...]],
    layers: int,
    head_dim: int,
    own: Mapping[str, str],
    ops: CpuKernels,
) -> dict[str, Loss]:
    """What every matrix costs in each type that it may have, by its stack, in a unit that is no divergence. own: the
    types of codes in which the source already has stacks."""
    found: dict[str, Loss] = {}
    matrices = stacks(name for name, shape in shapes.items() if len(shape) == 2 and not is_router(name))
    is_tied = tensor_name("head") not in shapes
    for stack, names in steps_bar(list(matrices.items()), "rounding a sample of each weight"):
        rows = _sampled(source, names, shapes[names[0]], head_dim, ops)
        factor = _factor(names[0], layers, is_tied) / max(squared_error(rows, torch.zeros_like(rows)), 1e-30)
        kl = {kind: factor * error for kind, error in errors_of_types(rows, None, ops).items()}
        count, width = shapes[names[0]]
        if kl:
            kl = without_beaten(kl | kept_as_it_is(own.get(stack), width))
            found[stack] = Loss(len(names) * count, width, kl)
    return found


def own_types(source: Checkpoint | GgufCheckpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The types that a source already has, of stacks all weights of which have one: of codes those of a GGUF file, of
    plain numbers BF16, of which F16 loses the large and the small."""

    def own(name: str) -> str | None:
        if source.is_coded(name):
            return source.source_type(name) if isinstance(source, GgufCheckpoint) else None
        return "BF16" if source.dtype(name) == "bf16" else None

    kinds = {stack: {own(name) for name in names} for stack, names in stacks(shapes).items()}
    return {stack: kind for stack, found in kinds.items() if len(found) == 1 and (kind := next(iter(found)))}


def _factor(name: str, layers: int, is_tied: bool) -> float:
    layer, part, _ = split_name(name)
    if not part:
        is_head = name == tensor_name("head")
        return OF_HEAD if is_head else OF_EMBEDDING + is_tied * OF_HEAD
    end = max(1, round(END * layers))
    return OF_PART.get(part.rpartition(".")[2], 1) * (AT_THE_ENDS if layer < end or layer >= layers - end else 1)


def _sampled(
    source: Checkpoint | GgufCheckpoint, names: list[str], shape: tuple[int, ...], head_dim: int, ops: CpuKernels
) -> torch.Tensor:
    """float32 rows of a stack, some of each of a few runs: whole heads are read, which other orders of q and k ask."""
    run = min(shape[0], head_dim)
    places = [(name, start) for name in names for start in range(0, shape[0] - run + 1, run)]
    places = places[:: -(-len(places) // SAMPLED_RUNS)]
    step = max(1, run * len(places) // SAMPLED_ROWS)
    found = []
    for name, start in places:
        rows = source.read(name, slice(start, start + run))
        found.append(numbers_of(source, ops, name, rows)[::step])
    return torch.cat(found).contiguous()
