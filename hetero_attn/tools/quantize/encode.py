"""Rows of weights as bytes of a GGUF type: each rounded to the nearest, or so that errors make up for each other.

A linear's output is w x. Over inputs with the second moments H = E[x x'] the rounding of a row w to w' costs
(w - w') H (w - w')'. Inputs are rounded one after the other, and what an input's rounding costs is taken off the
weights of those behind it, which is where least is lost: Frantar et al., GPTQ (arXiv 2210.17323), section 3, with the
grid of every block fitted beforehand and the inputs of most energy first.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.checkpoints.loading.run_rows import dequantised
from hetero_attn.errors import CheckpointError
from hetero_attn.tools.quantize.blocks import BLOCK_TYPES, BlockType, Grid

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HALF_MAX = torch.finfo(torch.float16).max
CHUNK_WEIGHTS = 1 << 18  # encoded at once, in a core's cache
FED_BACK_ROWS = 4096  # at once: a step of the loop over inputs should outlast the call that makes it
RUN = 64  # inputs whose errors reach the inputs behind the run in one product
DAMPING = 0.01  # of the mean energy of an input, added to all


def fits(name: str, in_features: int) -> bool:
    """Whether rows of so many inputs are whole blocks of a type that is made here."""
    return (name in BLOCK_TYPES or name in PLAIN) and in_features % GGUF_BY_NAME[name].items == 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known of a linear's inputs. order: int64, the inputs in the order in which they are rounded. factor:
    float32 [inputs, inputs], the upper Cholesky factor of the inverse of their moments in that order. energy: float32
    [inputs], the mean square of each."""

    order: torch.Tensor
    factor: torch.Tensor
    energy: torch.Tensor


def known_inputs(moments: torch.Tensor, tokens: int) -> Inputs:
    """Of second moments float32 [inputs, inputs], the mean over `tokens`.

    Few tokens say less of how inputs go together than of how large they are, so what is off the diagonal counts less
    the fewer they are: an input that never was there then counts as little as the damping.
    """
    inputs = moments.shape[0]
    energy = moments.diagonal() + DAMPING * moments.diagonal().mean().clamp_min(1e-30)
    damped = moments * (tokens / (tokens + inputs))
    damped.diagonal().copy_(energy)
    order = moments.diagonal().argsort(descending=True, stable=True)
    damped = damped[order][:, order].double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    return Inputs(order, factor, energy)


def encode(name: str, rows: torch.Tensor, inputs: Inputs | None = None) -> torch.Tensor:
    """uint8 [rows, row_bytes] of float32 rows in a GGUF type; `in_features` must be a multiple of its items. Raises
    CheckpointError for numbers that F16 has not."""
    if name == "F16" and (largest := rows.abs().amax().item()) > HALF_MAX:
        raise CheckpointError(
            f"a weight of {largest:g} is beyond F16, which ends at {HALF_MAX:g}; give fewer --bits, or none"
        )
    if name in PLAIN:
        return rows.to(PLAIN[name]).contiguous().view(torch.uint8)
    kind, items = BLOCK_TYPES[name], GGUF_BY_NAME[name].items
    with _one_thread_each() as pool:
        if inputs is None:
            parts = pool.map(lambda some: _plainly(kind, some, items), _pieces(rows))
        else:
            parts = (_fed_back_bytes(kind, some, items, inputs, pool) for some in rows.split(FED_BACK_ROWS))
        return torch.cat(list(parts))


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each of which computes alone: operations on a core's cache full of numbers
    are over before a second thread has taken its half."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        torch.set_num_threads(1)
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)


def _pieces(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows.split(max(1, CHUNK_WEIGHTS // rows.shape[1]))


def _plainly(kind: BlockType, rows: torch.Tensor, items: int) -> torch.Tensor:
    grid = kind.fit(rows.reshape(-1, items), None)
    return kind.pack(grid.stored, nearest(kind, rows, grid, items)).view(rows.shape[0], -1)


def _fed_back_bytes(
    kind: BlockType, rows: torch.Tensor, items: int, inputs: Inputs, pool: ThreadPoolExecutor
) -> torch.Tensor:
    energy = inputs.energy.view(-1, items)

    def fitted(some: torch.Tensor) -> Grid:
        return kind.fit(some.reshape(-1, items), energy.repeat(some.shape[0], 1))

    grids = list(pool.map(fitted, _pieces(rows)))
    stored = tuple(torch.cat(numbers) for numbers in zip(*(grid.stored for grid in grids), strict=True))
    minima = [grid.minimum for grid in grids if grid.minimum is not None]
    grid = Grid(torch.cat([grid.scale for grid in grids]), torch.cat(minima) if minima else None, stored)
    codes = fed_back(kind, rows, grid, inputs)
    return kind.pack(grid.stored, codes.reshape(-1, items)).view(rows.shape[0], -1)


def held(name: str, data: torch.Tensor, in_features: int, ops: CpuKernels) -> torch.Tensor:
    """float32 [rows, in_features] of what `encode` gives, as a reader of the file has it."""
    if name in PLAIN:
        return data.view(PLAIN[name]).float()
    return dequantised(ops, data, name, name, in_features)


def nearest(kind: BlockType, rows: torch.Tensor, grid: Grid, items: int) -> torch.Tensor:
    """The nearest codes of rows [rows, in_features] in blocks of so many items, float32 [blocks, items]."""
    groups = rows.reshape(-1, items // kind.group, kind.group)
    minimum = 0.0 if grid.minimum is None else grid.minimum[..., None]
    return kind.codes(groups, grid.scale[..., None], minimum).flatten(1)


def fed_back(kind: BlockType, rows: torch.Tensor, grid: Grid, inputs: Inputs) -> torch.Tensor:
    """Codes of rows [rows, in_features], float32, each chosen with what the roundings before it have left to it."""
    width = rows.shape[1]
    left = rows.t()[inputs.order].contiguous()  # an input a row, so that all that is done to one lies side by side
    scale = grid.scale.view(rows.shape[0], -1).t().contiguous()
    minimum = None if grid.minimum is None else grid.minimum.view(rows.shape[0], -1).t().contiguous()
    group_of = (inputs.order // kind.group).tolist()
    codes = torch.empty_like(left)
    for start in range(0, width, RUN):
        stop = min(start + RUN, width)
        errors = torch.empty(stop - start, rows.shape[0], dtype=torch.float32, device="cpu")
        for place in range(start, stop):
            own = scale[group_of[place]], 0.0 if minimum is None else minimum[group_of[place]]
            codes[place] = kind.codes(left[place], *own)
            error = (left[place] - kind.values(codes[place], *own)) / inputs.factor[place, place]
            left[place + 1 : stop].addr_(inputs.factor[place, place + 1 : stop], error, alpha=-1)
            errors[place - start] = error
        left[stop:].addmm_(inputs.factor[start:stop, stop:].t(), errors, alpha=-1)
    found = torch.empty_like(codes)
    found[inputs.order] = codes
    return found.t().contiguous()
