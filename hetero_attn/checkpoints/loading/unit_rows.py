"""The rows of a linear's units, read a run at a time through buffers that are reused until the load is over.

Rows come as numbers, ready to be packed, or, where the file already holds codes of the very format wanted, as the
file's own bytes, ready to be repacked. Fresh memory for every run is not given back evenly by the C library: a load
then held up to half of the packed weights beside them as holes in its heap.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from cpu_kernels import CpuKernels, fresh_memory
from cpu_kernels.formats import BLOCK_FEATURES, SOURCE_TYPES, format_of
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.weights import LinearSpec, Part

# Of a run's rows as they are read: few runs of a linear are read before the first is packed, and what each costs beside
# its bytes, in Python and in kernels that begin and end, is paid 250 times a GB.
RUN_BYTES = 4 << 20
READERS = 4  # threads that read: some wait for the disk, which so never waits, while others copy
PLAIN_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Buffers(NamedTuple):
    """What one run is read through: its rows, and a part of them that is not read straight into its place."""

    rows: torch.Tensor
    part: torch.Tensor


class Form(NamedTuple):
    """As what rows are read: items of a row, numbers or, where these are the codes wanted, bytes of the file."""

    dtype: torch.dtype
    width: int


class Filling(NamedTuple):
    """A linear to be read.

    home: the blocks of its units from `first_unit` on, in host memory. Numbers that are held as they are in the file
    are read straight into it: they lie where packing them would bring them. None: they lie elsewhere.
    place(start, stop, rows, packer): what is to be done with each run of its units; packer: of the calling thread, None
    for the team's. is_in_host: it brings all of them to host memory, so that any thread may call it.
    """

    spec: LinearSpec
    home: torch.Tensor | None
    first_unit: int
    place: Callable[..., None]
    is_in_host: bool = False


class Run(NamedTuple):
    """Units [start, stop) of a linear to be read. forms: of its runs of parts; by_caller: no other thread can read it,
    as kernels are called for it."""

    filling: Filling
    start: int
    stop: int
    forms: tuple[Form, ...]
    by_caller: bool


class UnitRows:
    """Reads runs of units of `linears`; what a run returns is overwritten READERS + 1 runs later.

    While a run is packed, threads read the next ones, also of the next linears. With `packer` a thread also packs what
    it has read, where it goes to host memory. The team is called by one thread only, so codes that are made into
    numbers are read by the caller. Close it before the source, and before what it reads into.
    """

    def __init__(
        self,
        source: WeightSource,
        linears: tuple[LinearSpec, ...],
        ops: CpuKernels,
        packer: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """packer(): one for a thread that has read, to place it with, where it is to (`Packers.one`)."""
        self._source, self._ops, self._packer = source, ops, packer
        self._linears = linears
        size = max(RUN_BYTES, *(self._unit_bytes(spec, self._forms(spec)) for spec in linears))
        self._buffers = [
            Buffers(*(fresh_memory((size,), torch.uint8) for _ in Buffers._fields)) for _ in range(READERS + 1)
        ]
        self._readers = ThreadPoolExecutor(READERS, "hetero-attn-reader")  # its threads begin with the first run

    def close(self) -> None:
        """Wait for what is being read, and end the threads; may be called twice."""
        self._readers.shutdown(cancel_futures=True)

    @property
    def packed_bytes(self) -> int:
        """The most that a run takes once it is packed."""
        each = ((spec, self._unit_bytes(spec, self._forms(spec))) for spec in self._linears)
        return max(-(-max(RUN_BYTES, size) * spec.unit_bytes // size) for spec, size in each)

    def _unit_bytes(self, spec: LinearSpec, forms: tuple[Form, ...]) -> int:
        """What a unit's rows take: as they are wanted, or in the file, where its last group may be a longer one."""
        total = 0
        for (_, parts), (dtype, width) in zip(spec.runs, forms, strict=True):
            row_bytes = max(dtype.itemsize * width, *(self._source.row_bytes(part.tensor) for part in parts))
            total += _padded_rows(parts) * row_bytes
        return total

    def runs(self, fillings: Iterable[Filling]) -> Iterator[tuple[Filling, int, int, list[torch.Tensor] | None]]:
        """Of each linear runs of units [start, stop) with the rows of every run of parts of one format
        (`LinearSpec.runs`), None where they have been placed already.

        Rows are [(stop - start) * features of these parts, in_features] of numbers, or uint8 [.., bytes of a row in the
        file] of codes, padded with zeros to whole blocks a unit. Codes of several parts that have a block in each unit,
        as gate and up have, are [stop - start, parts, 16, bytes of a row]: the rows of each part lie together.

        Raises:
            CheckpointError: the file cannot be read, or holds a number that is not finite.
        """
        ahead: deque[tuple[Run, Callable[[], list[torch.Tensor] | None]]] = deque()
        for index, run in enumerate(chain.from_iterable(map(self._split, fillings))):
            ahead.append((run, self._begun(run, self._buffers[index % len(self._buffers)])))
            if len(ahead) > READERS:
                yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())

    def _split(self, filling: Filling) -> Iterator[Run]:
        spec = filling.spec
        forms = self._forms(spec)
        step, by_caller = max(1, RUN_BYTES // self._unit_bytes(spec, forms)), not self._is_read_as_wanted(spec, forms)
        for start in range(0, spec.column_units, step):
            yield Run(filling, start, min(start + step, spec.column_units), forms, by_caller)

    def _begun(self, run: Run, buffers: Buffers) -> Callable[[], list[torch.Tensor] | None]:
        """What gives the rows of a run, which a thread is reading or also placing, or the caller then has to read."""
        if run.by_caller:
            return partial(self._units, run, buffers)
        return self._readers.submit(self._units if self._packer is None else self._placed, run, buffers).result

    def _is_read_as_wanted(self, spec: LinearSpec, forms: tuple[Form, ...]) -> bool:
        """Whether no kernel is called to read it."""
        return all(
            dtype == self._source.torch_dtype(part.tensor)
            for (_, parts), (dtype, _) in zip(spec.runs, forms, strict=True)
            for part in parts
        )

    def _placed(self, run: Run, buffers: Buffers) -> list[torch.Tensor] | None:
        """None once a run is in its place; its rows where they are left to the caller."""
        assert self._packer is not None
        rows = self._units(run, buffers)
        if not run.filling.is_in_host or self._is_left(run.filling.spec, rows):
            return rows
        with self._packer() as packer:
            run.filling.place(run.start, run.stop, rows, packer)
        return None

    def _is_left(self, spec: LinearSpec, rows: list[torch.Tensor]) -> bool:
        """Whether numbers are among the rows that are only looked at, in many short calls for which threads would wait
        for Python's lock, or that the file has in codes: sums are made of those in order."""
        return any(
            each.dtype != torch.uint8
            and (PLAIN_DTYPES.get(name) == each.dtype or any(self._source.is_coded(part.tensor) for part in parts))
            for (name, parts), each in zip(spec.runs, rows, strict=True)
        )

    def _units(self, run: Run, buffers: Buffers) -> list[torch.Tensor]:
        """The rows of a run, in `buffers` or at home."""
        (spec, home, first_unit, *_), start, stop, forms, _ = run
        blocks = None
        if home is not None and start >= first_unit and len(spec.runs) == 1:
            blocks = home[(start - first_unit) * spec.unit_rows : (stop - first_unit) * spec.unit_rows]
        found = []
        for (name, parts), form in zip(spec.runs, forms, strict=True):
            at_home = blocks if PLAIN_DTYPES.get(name) == form.dtype else None
            found.append(self._run(parts, form, (start, stop), at_home, buffers))
            buffers = buffers._replace(rows=buffers.rows[found[-1].nbytes :])
        return found

    def _run(
        self,
        parts: tuple[Part, ...],
        form: Form,
        units: tuple[int, int],
        home: torch.Tensor | None,
        buffers: Buffers,
    ) -> torch.Tensor:
        (start, stop), (dtype, width) = units, form
        if dtype == torch.uint8 and len(parts) > 1 and all(part.rows_per_unit == BLOCK_FEATURES for part in parts):
            each = (len(parts), stop - start, BLOCK_FEATURES, width)
            return self._parts(parts, start, _front(buffers.rows, dtype, each))
        shape = (stop - start, _padded_rows(parts), width)
        rows = _front(buffers.rows, dtype, shape) if home is None else home.view(dtype).view(shape)
        offset = 0
        for part in parts:
            self._lay(part, start, rows[:, offset : offset + part.rows_per_unit], buffers.part)
            offset += part.rows_per_unit
        if offset < shape[1]:
            rows[:, offset:] = 0
        return rows.view(-1, width)

    def _parts(self, parts: tuple[Part, ...], start: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows of each part as they are read, [parts, units, features, items], unit by unit."""
        for part, each in zip(parts, rows, strict=True):
            self._lay(part, start, each, each)
        return rows.transpose(0, 1)

    def _forms(self, spec: LinearSpec) -> tuple[Form, ...]:
        """As what each run of parts of a linear is read."""
        return tuple(self._form(spec, name, parts) for name, parts in spec.runs)

    def _form(self, spec: LinearSpec, name: str, parts: tuple[Part, ...]) -> Form:
        kinds = [self._source.source_type(part.tensor) for part in parts]
        in_order = all(part.reordered or self._source.input_order(part.tensor) is None for part in parts)
        if in_order and all(kind is not None and SOURCE_TYPES[kind].format == name for kind in kinds):
            return Form(torch.uint8, self._source.row_bytes(parts[0].tensor))
        dtypes = {self._source.torch_dtype(part.tensor) for part in parts}
        return Form(torch.float32 if any(kinds) or len(dtypes) > 1 else dtypes.pop(), spec.in_features)

    def _lay(self, part: Part, start: int, target: torch.Tensor, buffer: torch.Tensor) -> None:
        """Rows of one part into `target`, [units from `start` on, rows_per_unit, items]; none left: zeros."""
        units, rows_per_unit, items = target.shape
        first, wanted = start * rows_per_unit, units * rows_per_unit
        here = min(wanted, part.rows - first)
        dtype = self._source.torch_dtype(part.tensor)
        direct = target.is_contiguous() and dtype == target.dtype
        if direct:
            rows = target.view(-1, items)
        else:
            width = items if dtype != torch.uint8 else self._source.row_bytes(part.tensor)
            rows = _front(buffer, dtype, (wanted, width))
        self._source.read(part.tensor, slice(first, first + here), out=rows[:here])
        if here < wanted:
            rows[here:] = 0
        if not direct:
            if dtype == torch.uint8 and target.dtype != torch.uint8:
                rows = numbers_of(self._source, self._ops, part.tensor, rows)
            _copy(target, rows.reshape(units, rows_per_unit, -1))


def _padded_rows(parts: tuple[Part, ...]) -> int:
    """Rows of these parts in a unit, padded to whole blocks."""
    return -(-sum(part.rows_per_unit for part in parts) // BLOCK_FEATURES) * BLOCK_FEATURES


def _finished(
    run: Run, rows: Callable[[], list[torch.Tensor] | None]
) -> tuple[Filling, int, int, list[torch.Tensor] | None]:
    """A run with its rows, once they are there or placed."""
    return run.filling, run.start, run.stop, rows()


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


def _front(buffer: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
