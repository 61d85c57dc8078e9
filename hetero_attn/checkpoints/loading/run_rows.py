"""The rows of a run of a linear's units: numbers, ready to be packed, or, where the file holds codes of the very format
wanted, the file's own bytes, ready to be repacked.

Rows stay where the disk brought them to, wherever that is in a buffer; only those whose units share blocks, or that are
codes of another format, are gathered.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import BLOCK_FEATURES, SOURCE_TYPES, format_of
from hetero_attn.checkpoints.raw_file import Extent, RawFile
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.checkpoints.uncached import ALIGNED_BYTES, SPARE_BYTES
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.weights import LinearSpec, Part

PLAIN_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of a run of parts: [units * features, items], padded with zeros to whole blocks a unit, or, where each part has a
# block in every unit, as gate and up have, [units * 16, items] of each part by itself.
Rows: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
Key: TypeAlias = tuple[str, int]  # a tensor, and the first unit of a run
Pieces: TypeAlias = dict[Key, torch.Tensor]  # bytes of parts' rows


class Form(NamedTuple):
    """As what rows are read: items of a row, numbers or, where these are the codes wanted, bytes of the file."""

    dtype: torch.dtype
    width: int


class Run(NamedTuple):
    """Units [start, stop) of a linear. forms: of its runs of parts."""

    spec: LinearSpec
    start: int
    stop: int
    forms: tuple[Form, ...]


class Memory:
    """Gives out a buffer from its front on, by whole pages."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._free = buffer

    def take(self, size: int) -> torch.Tensor:
        """uint8 [size]."""
        taken, self._free = self._free[:size], self._free[-(-size // ALIGNED_BYTES) * ALIGNED_BYTES :]
        assert taken.numel() == size, f"{size} bytes of a buffer that has {taken.numel()} left"
        return taken

    def rows(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Of this shape, with unknown content."""
        return self.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


class RunRows:
    """Reads the rows of runs; of codes that are made into numbers by calling kernels, which one thread only may."""

    def __init__(self, source: WeightSource, ops: CpuKernels) -> None:
        self._source, self._ops = source, ops

    def forms(self, spec: LinearSpec) -> tuple[Form, ...]:
        """As what each run of parts of a linear is read."""
        return tuple(self._form(spec, name, parts) for name, parts in spec.runs)

    def unit_bytes(self, spec: LinearSpec, forms: tuple[Form, ...]) -> int:
        """What a unit's rows take, as they are wanted or in the file, where its last group may be a longer one; those
        that are gathered in both places."""
        total = 0
        for (_, parts), form in zip(spec.runs, forms, strict=True):
            row_bytes = max(form.dtype.itemsize * form.width, *(self._source.row_bytes(part.tensor) for part in parts))
            total += _padded_rows(parts) * row_bytes * (1 if self._stays(parts, form) else 2)
        return total

    def _stays(self, parts: tuple[Part, ...], form: Form) -> bool:
        """Whether rows are packed from where they are read to."""
        return _are_apart(parts) and self.is_as_wanted(parts, form)

    def is_as_wanted(self, parts: tuple[Part, ...], form: Form) -> bool:
        """Whether no kernel is called to read them."""
        return all(form.dtype == self._source.torch_dtype(part.tensor) for part in parts)

    def read(self, runs: Sequence[Run], memory: Memory) -> list[list[Rows]]:
        """Rows of every run of parts of these runs, in `memory`: of `buffer_bytes`."""
        each = [(part, run) for run in runs for _, parts in run.spec.runs for part in parts]
        extents = {(part.tensor, run.start): self._extent(part, run) for part, run in each}
        pieces = read_extents({key: extent for key, extent in extents.items() if extent is not None}, memory)
        return [
            [
                self._rows(parts, form, run, pieces, memory)
                for (_, parts), form in zip(run.spec.runs, run.forms, strict=True)
            ]
            for run in runs
        ]

    def _extent(self, part: Part, run: Run) -> Extent | None:
        """Where the file has a part's rows in a run; None where they have to be asked for."""
        first, stop = run.start * part.rows_per_unit, run.stop * part.rows_per_unit
        extent = self._source.extent(part.tensor, first, stop) if stop <= part.rows else None
        is_aligned = extent is not None and extent.offset % self._source.torch_dtype(part.tensor).itemsize == 0
        return extent if is_aligned else None

    def _rows(self, parts: tuple[Part, ...], form: Form, run: Run, pieces: Pieces, memory: Memory) -> Rows:
        """The rows of a run of parts."""
        if self._stays(parts, form):
            found = tuple(self._read(part, run, pieces, memory) for part in parts)
            return found[0] if len(found) == 1 else found
        units = run.stop - run.start
        rows, offset = memory.rows(form.dtype, (units, _padded_rows(parts), form.width)), 0
        for part in parts:
            values = self._read(part, run, pieces, memory)
            if values.dtype == torch.uint8 and form.dtype != torch.uint8:
                values = numbers_of(self._source, self._ops, part.tensor, values)
            _copy(rows[:, offset : offset + part.rows_per_unit], values.reshape(units, part.rows_per_unit, -1))
            offset += part.rows_per_unit
        rows[:, offset:] = 0
        return rows.view(-1, form.width)

    def _read(self, part: Part, run: Run, pieces: Pieces, memory: Memory) -> torch.Tensor:
        """Rows of a part in a run as the file has them; none left: zeros."""
        dtype, wanted = self._source.torch_dtype(part.tensor), (run.stop - run.start) * part.rows_per_unit
        if (part.tensor, run.start) in pieces:
            return pieces[part.tensor, run.start].view(dtype).view(wanted, -1)
        first = run.start * part.rows_per_unit
        here = min(wanted, part.rows - first)
        rows = memory.rows(dtype, (wanted, self._source.row_bytes(part.tensor) // dtype.itemsize))
        self._source.read(part.tensor, slice(first, first + here), out=rows[:here])
        rows[here:] = 0
        return rows

    def _form(self, spec: LinearSpec, name: str, parts: tuple[Part, ...]) -> Form:
        kinds = [self._source.source_type(part.tensor) for part in parts]
        in_order = all(part.reordered or self._source.input_order(part.tensor) is None for part in parts)
        if in_order and all(kind is not None and SOURCE_TYPES[kind].format == name for kind in kinds):
            return Form(torch.uint8, self._source.row_bytes(parts[0].tensor))
        dtypes = {self._source.torch_dtype(part.tensor) for part in parts}
        return Form(torch.float32 if any(kinds) or len(dtypes) > 1 else dtypes.pop(), spec.in_features)


def buffer_bytes(size: int, parts: int) -> int:
    """What `size` bytes of rows of so many parts are read in."""
    return size + 2 * parts * SPARE_BYTES


def read_extents(extents: dict[Key, Extent], memory: Memory) -> Pieces:
    """The bytes of each: those that follow each other in a file are read at once."""
    pieces: Pieces = {}
    for group in _neighbours(extents):
        first, last = extents[group[0]], extents[group[-1]]
        size = last.offset + last.nbytes - first.offset
        target = memory.take(size + SPARE_BYTES)
        begin = first.file.read_weights_within(target.numpy(), first.offset, size)
        for key in group:
            at = begin + extents[key].offset - first.offset
            pieces[key] = target[at : at + extents[key].nbytes]
    return pieces


def _neighbours(extents: dict[Key, Extent]) -> list[list[Key]]:
    """Keys of extents without a gap between them, in the order of the file."""
    groups: list[list[Key]] = []
    end: tuple[RawFile, int] | None = None
    for key, (file, offset, nbytes) in sorted(extents.items(), key=lambda item: (id(item[1].file), item[1].offset)):
        if end == (file, offset):
            groups[-1].append(key)
        else:
            groups.append([key])
        end = file, offset + nbytes
    return groups


def _are_apart(parts: tuple[Part, ...]) -> bool:
    """Whether blocks can be packed from each part by itself."""
    if len(parts) == 1:
        return parts[0].rows_per_unit % BLOCK_FEATURES == 0
    return all(part.rows_per_unit == BLOCK_FEATURES for part in parts)


def _padded_rows(parts: tuple[Part, ...]) -> int:
    """Rows of these parts in a unit, padded to whole blocks."""
    return -(-sum(part.rows_per_unit for part in parts) // BLOCK_FEATURES) * BLOCK_FEATURES


def numbers_of(source: WeightSource, ops: CpuKernels, tensor: str, rows: torch.Tensor) -> torch.Tensor:
    """float32 values [rows, in_features] of rows of a tensor as its source reads them, inputs in the model's order;
    raises as `dequantised` does."""
    kind = source.source_type(tensor)
    if kind is None:
        return rows.float()
    values, order = dequantised(ops, rows, kind, tensor, source.shape(tensor)[1]), source.input_order(tensor)
    return values if order is None else values.index_select(1, order.argsort())


def dequantised(ops: CpuKernels, rows: torch.Tensor, source_type: str, tensor: str, in_features: int) -> torch.Tensor:
    """float32 values [rows, in_features] of coded rows of a file, whose last group may be longer; CheckpointError names
    the tensor with a scale that is not finite."""
    kind = SOURCE_TYPES[source_type]
    whole = rows.shape[1] // kind.block_bytes * kind.items
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % BLOCK_FEATURES))
    shape = (padded.shape[0] // BLOCK_FEATURES, format_of(kind.format).block_bytes(whole))
    blocks = torch.empty(shape, dtype=torch.uint8, device="cpu")
    values = torch.empty(rows.shape[0], whole, dtype=torch.float32, device="cpu")
    try:
        ops.repack(padded, source_type, blocks)
    except ValueError as error:
        raise CheckpointError(f"{tensor}: {error}; the file is damaged, download it again") from error
    ops.unpack_rows(blocks, kind.format, torch.arange(rows.shape[0], device="cpu"), values)
    return values[:, :in_features]


def _copy(target: torch.Tensor, rows: torch.Tensor) -> None:
    """Rows into their places, on this thread: torch's own go on spinning after each copy that they have shared, on the
    cores that pack."""
    if rows.dtype == target.dtype:
        np.copyto(target.view(torch.uint8).numpy(), rows.view(torch.uint8).numpy())
    else:
        target.copy_(rows)
