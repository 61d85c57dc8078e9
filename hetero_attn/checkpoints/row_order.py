"""Rows of a file's tensors where ours are others: several tensors in one, and pairs that are turned together.

A tensor of several of ours is cut by its offsets alone. Rotary embedding here turns dimension i with dimension
i + rotary_dim / 2; files whose models turn 2 i with 2 i + 1 have the same rows in another order.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.checkpoints.safetensors import GroupsEntry, TensorEntry
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.config import ModelConfig

if TYPE_CHECKING:
    import torch

Runs = tuple[tuple[int, int], ...]  # (first row in the file, rows) of the runs that rows of ours are made of, in order


def pieces(path: Path, name: str, entry: Any, parts: tuple[str, ...], config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """(our word, entry of its rows) of every part of a tensor that holds several; raises where the rows do not fit."""
    rows = rows_of(path, name, entry.shape[0] if entry.shape else 0, parts, config)
    row_bytes = entry.nbytes // entry.shape[0]
    for part, (first, count) in zip(parts, rows, strict=True):
        shape = (count, *entry.shape[1:])
        yield part, replace(entry, shape=shape, offset=entry.offset + first * row_bytes, nbytes=count * row_bytes)


def groups(
    path: Path, name: str, entry: TensorEntry, parts: tuple[str, ...], config: ModelConfig
) -> Iterator[tuple[str, TensorEntry]]:
    """(our word, entry of its rows) of every part of a tensor whose parts come in turn; raises where the rows do not
    fit."""
    each = [config.rows_in_turn(part) for part in parts]
    found, whole = entry.shape[0] if entry.shape else 0, sum(each)
    if not found or found % whole:
        raise CheckpointError(
            f"{path}: tensor {name} has {found} rows, expected groups of {whole}: those of {', '.join(parts)}; config "
            "and weights are of different models, download both again"
        )
    for part, rows, first in zip(parts, each, accumulate(each, initial=0), strict=False):
        shape, nbytes = (found // whole * rows, *entry.shape[1:]), entry.nbytes // whole * rows
        yield part, GroupsEntry(entry.file, entry.dtype, shape, entry.offset, nbytes, whole, rows, first)


def runs_between(runs: Runs, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(first row in the file, rows, which of those asked for is the first) of what rows [start, stop) are made of."""
    passed = 0
    for first, count in runs:
        begin, end = max(start, passed), min(stop, passed + count)
        if begin < end:
            yield first + begin - passed, end - begin, begin - start
        passed += count


def in_turn(path: Path, name: str, found: int, parts: tuple[str, ...], config: ModelConfig) -> dict[str, Runs]:
    """Where the rows of every part are in a tensor of `found` rows whose parts come in turn; CheckpointError where they
    do not fit."""
    each = [config.rows_in_turn(part) for part in parts]
    whole = sum(each)
    if not found or found % whole:
        raise CheckpointError(
            f"{path}: tensor {name} has {found} rows, expected groups of {whole}: those of {', '.join(parts)}; config "
            "and weights are of different models, download both again"
        )
    starts = list(accumulate(each, initial=0))
    return {
        part: tuple((group * whole + start, rows) for group in range(found // whole))
        for part, rows, start in zip(parts, each, starts, strict=False)
    }


def rows_of(path: Path, name: str, found: int, parts: tuple[str, ...], config: ModelConfig) -> list[tuple[int, int]]:
    """(first row, rows) of every part of a tensor that holds several, of `found` rows; CheckpointError where these are
    others."""
    counts = [config.rows_of(part) for part in parts]
    if found != sum(counts):
        raise CheckpointError(
            f"{path}: tensor {name} has {found} rows, expected {sum(counts)}: those of {', '.join(parts)}; config and "
            "weights are of different models, download both again"
        )
    return [(sum(counts[:index]), count) for index, count in enumerate(counts)]


def turn_back(rows: "torch.Tensor", head_dim: int, rotary_dim: int) -> None:
    """Bring rows of whole heads, [heads * head_dim, ...], from pairs side by side into our order, in place."""
    import torch

    assert rows.is_contiguous(), rows.stride()
    if not rows.numel():
        return
    # Of bytes and by numpy: torch's threads go on spinning after a copy that they have shared.
    heads = rows.view(-1).view(torch.uint8).numpy().reshape(rows.shape[0] // head_dim, head_dim, -1)[:, :rotary_dim]
    pairs = heads.reshape(heads.shape[0], rotary_dim // 2, 2, -1)
    heads[...] = pairs.transpose(0, 2, 1, 3).reshape(heads.shape)


def turned(rows: "torch.Tensor", head_dim: int) -> "torch.Tensor":
    """Rows of whole heads, every dimension of which is rotated, from our order into pairs side by side; a copy."""
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape).contiguous()


def is_rotated(name: str) -> bool:
    """Whether a tensor, by our name, makes the vectors that rotary embedding turns."""
    return ".q_proj." in name or ".k_proj." in name
