"""The rows of a linear's units, read a run at a time through buffers that are reused until the load is over.

Rows come as numbers, ready to be packed, or, where the file already holds codes of the very format wanted, as the
file's own bytes, ready to be repacked. Fresh memory for every run is not given back evenly by the C library: a load
then held up to half of the packed weights beside them as holes in its heap.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import NamedTuple

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


class Filling(NamedTuple):
    """A linear to be read.

    home: the blocks of its units from `first_unit` on, in host memory. Numbers that are held as they are in the file
    are read straight into it: they lie where packing them would bring them. None: they lie elsewhere.
    place(start, stop, rows): what is to be done with each run of its units.
    """

    spec: LinearSpec
    home: torch.Tensor | None
    first_unit: int
    place: Callable[[int, int, list[torch.Tensor]], None]


class Run(NamedTuple):
    """Units [start, stop) of a linear to be read; by_caller: no other thread can, as kernels are called for it."""

    filling: Filling
    start: int
    stop: int
    by_caller: bool


class UnitRows:
    """Reads runs of units of `linears`; what a run returns is overwritten READERS + 1 runs later.

    While a run is packed, threads read the next ones, also of the next linears. The kernels are called by one thread
    only, so codes that are made into numbers are read by the caller. Close it before the source, and before what it
    reads into.
    """

    def __init__(self, source: WeightSource, linears: tuple[LinearSpec, ...], ops: CpuKernels) -> None:
        self._source, self._ops = source, ops
        self._linears = linears
        size = max(self._run_bytes(spec) for spec in linears)
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
        return max(-(-self._run_bytes(spec) * spec.unit_bytes // self._unit_bytes(spec)) for spec in self._linears)

    def _run_bytes(self, spec: LinearSpec) -> int:
        """The most that a run of a linear takes, whichever way it is cut."""
        return max(RUN_BYTES, self._unit_bytes(spec))

    def _unit_bytes(self, spec: LinearSpec) -> int:
        """What a unit's rows take: as they are wanted, or in the file, where its last group may be a longer one."""
        total = 0
        for name, parts in spec.runs:
            dtype, width = self._form(spec, name, parts)
            row_bytes = max(dtype.itemsize * width, *(self._source.row_bytes(part.tensor) for part in parts))
            total += _padded_rows(parts) * row_bytes
        return total

    def runs(self, fillings: Iterable[Filling]) -> Iterator[tuple[Filling, int, int, list[torch.Tensor]]]:
        """Of each linear runs of units [start, stop) with the rows of every run of parts of one format
        (`LinearSpec.runs`).

        Rows are [(stop - start) * features of these parts, in_features] of numbers, or uint8 [.., bytes of a row in the
        file] of codes, padded with zeros to whole blocks a unit.

        Raises:
            CheckpointError: the file cannot be read, or holds a scale that is not finite.
        """
        ahead: deque[tuple[Run, Callable[[], list[torch.Tensor]]]] = deque()
        for index, run in enumerate(chain.from_iterable(map(self._split, fillings))):
            ahead.append((run, self._begun(run, self._buffers[index % len(self._buffers)])))
            if len(ahead) > READERS:
                yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())

    def _split(self, filling: Filling) -> Iterator[Run]:
        spec = filling.spec
        step, by_caller = max(1, RUN_BYTES // self._unit_bytes(spec)), not self._is_read_as_wanted(spec)
        for start in range(0, spec.column_units, step):
            yield Run(filling, start, min(start + step, spec.column_units), by_caller)

    def _begun(self, run: Run, buffers: Buffers) -> Callable[[], list[torch.Tensor]]:
        """What gives the rows of a run, which a thread is reading, or the caller then has to read."""
        if run.by_caller:
            return partial(self._units, run, buffers)
        return self._readers.submit(self._units, run, buffers).result

    def _is_read_as_wanted(self, spec: LinearSpec) -> bool:
        """Whether no kernel is called to read it."""
        forms = ((self._form(spec, name, parts)[0], part.tensor) for name, parts in spec.runs for part in parts)
        return all(dtype == self._source.torch_dtype(tensor) for dtype, tensor in forms)

    def _units(self, run: Run, buffers: Buffers) -> list[torch.Tensor]:
        """The rows of a run, in `buffers` or at home."""
        (spec, home, first_unit, _), start, stop, _ = run
        blocks = None
        if home is not None and start >= first_unit and len(spec.runs) == 1:
            blocks = home[(start - first_unit) * spec.unit_rows : (stop - first_unit) * spec.unit_rows]
        found = []
        for name, parts in spec.runs:
            found.append(self._run(spec, name, parts, (start, stop), blocks, buffers))
            buffers = buffers._replace(rows=buffers.rows[found[-1].nbytes :])
        return found

    def _run(
        self,
        spec: LinearSpec,
        name: str,
        parts: tuple[Part, ...],
        units: tuple[int, int],
        home: torch.Tensor | None,
        buffers: Buffers,
    ) -> torch.Tensor:
        start, stop = units
        features = _padded_rows(parts)
        dtype, width = self._form(spec, name, parts)
        shape = (stop - start, features, width)
        if home is not None and PLAIN_DTYPES.get(name) == dtype:
            rows = home.view(dtype).view(shape)
        else:
            rows = _front(buffers.rows, dtype, shape)
        offset = 0
        for part in parts:
            self._lay(part, start, rows[:, offset : offset + part.rows_per_unit], buffers.part)
            offset += part.rows_per_unit
        rows[:, offset:] = 0
        return rows.view(-1, width)

    def _form(self, spec: LinearSpec, name: str, parts: tuple[Part, ...]) -> tuple[torch.dtype, int]:
        """(dtype, items of a row): bytes of the file where all parts are the codes wanted, else numbers."""
        kinds = [self._source.source_type(part.tensor) for part in parts]
        in_order = all(part.reordered or self._source.input_order(part.tensor) is None for part in parts)
        if in_order and all(kind is not None and SOURCE_TYPES[kind].format == name for kind in kinds):
            return torch.uint8, self._source.row_bytes(parts[0].tensor)
        dtypes = {self._source.torch_dtype(part.tensor) for part in parts}
        return torch.float32 if any(kinds) or len(dtypes) > 1 else dtypes.pop(), spec.in_features

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
        rows[here:] = 0
        if not direct:
            if dtype == torch.uint8 and target.dtype != torch.uint8:
                rows = numbers_of(self._source, self._ops, part.tensor, rows)
            _copy(target, rows.reshape(units, rows_per_unit, -1))


def _padded_rows(parts: tuple[Part, ...]) -> int:
    """Rows of these parts in a unit, padded to whole blocks."""
    return -(-sum(part.rows_per_unit for part in parts) // BLOCK_FEATURES) * BLOCK_FEATURES


def _finished(run: Run, rows: Callable[[], list[torch.Tensor]]) -> tuple[Filling, int, int, list[torch.Tensor]]:
    """A run with its rows, once they are there."""
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
