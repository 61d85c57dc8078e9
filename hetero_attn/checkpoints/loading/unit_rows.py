"""The rows of a linear's units, read a run at a time through buffers that are reused until the load is over.

Fresh memory for every run is not given back evenly by the C library: a load then held up to half of the packed weights
beside them as holes in its heap.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch

from cpu_kernels import CpuKernels, fresh_memory
from hetero_attn.checkpoints.loading.packer import Packers
from hetero_attn.checkpoints.loading.run_rows import Form, Memory, Rows, Run, RunRows, buffer_bytes
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.spec.weights import LinearSpec

# Of rows that are read together: what they cost beside their bytes, in Python, in the disk's turns and in kernels that
# begin and end, is paid 170 times a GB. Two experts of a layer fit, whose tensors lie side by side.
# With what lies beside them they fill three huge pages.
RUN_BYTES = (6 << 20) - (128 << 10)
BATCH_RUNS = 16  # at most, of small linears
# Threads that read, and do nothing else: a virtual disk may tell of what it has read only once it has done all that was
# asked of it, and stood still while those who had waited all packed.
READERS = 3


class Filling(NamedTuple):
    """A linear to be read.

    place(start, stop, rows, packer): what is to be done with each run of its units; packer: of the calling thread, None
    for the team's. is_in_host: it brings all of them to host memory, so that any thread may call it.
    """

    spec: LinearSpec
    place: Callable[..., None]
    is_in_host: bool = False


class Who(Enum):
    """Who reads and places a run: the caller does both, as kernels are called to read; it places what a thread has
    read; threads do both."""

    CALLER, READERS, PACKERS = range(3)


class Batch(NamedTuple):
    """Runs of units that are read together."""

    runs: list[tuple[Filling, Run]]
    who: Who


class UnitRows:
    """Reads runs of units of `linears`; what a run returns is overwritten some runs later.

    While a run is packed, threads read the next ones, also of the next linears. With `packers` threads also pack, what
    goes to host memory. The team is called by one thread only, so codes that are made into numbers are read by the
    caller. Close it before the source.
    """

    def __init__(
        self,
        source: WeightSource,
        linears: tuple[LinearSpec, ...],
        ops: CpuKernels,
        packers: Packers | None = None,
    ) -> None:
        self._source, self._packers, self._rows = source, packers, RunRows(source, ops)
        self._linears = linears
        size = max(RUN_BYTES, *(self._unit_bytes(spec) for spec in linears))
        parts = BATCH_RUNS * max(len(spec.parts) for spec in linears)
        self._ahead = READERS + (0 if packers is None else packers.count - 1)
        self._buffers = [fresh_memory((buffer_bytes(size, parts),), torch.uint8) for _ in range(self._ahead + 1)]
        # Their threads begin with the first run.
        self._readers = ThreadPoolExecutor(READERS, "hetero-attn-reader")
        self._placers = ThreadPoolExecutor(1 if packers is None else packers.count, "hetero-attn-packer")

    def close(self) -> None:
        """Wait for what is being read and placed, and end the threads; may be called twice."""
        for pool in (self._readers, self._placers):
            pool.shutdown(cancel_futures=True)

    @property
    def packed_bytes(self) -> int:
        """The most that a run takes once it is packed."""
        each = ((spec, self._unit_bytes(spec)) for spec in self._linears)
        return max(-(-max(RUN_BYTES, size) * spec.unit_bytes // size) for spec, size in each)

    def _unit_bytes(self, spec: LinearSpec) -> int:
        return self._rows.unit_bytes(spec, self._rows.forms(spec))

    def runs(self, fillings: Iterable[Filling]) -> Iterator[tuple[Filling, int, int, list[Rows] | None]]:
        """Of each linear runs of units [start, stop) with the rows of every run of parts of one format
        (`LinearSpec.runs`), None where they have been placed already.

        Raises:
            CheckpointError: the file cannot be read, or holds a number that is not finite.
        """
        ahead: deque[tuple[Batch, Callable[[], list[list[Rows]] | None]]] = deque()
        for index, batch in enumerate(self._batches(fillings)):
            ahead.append((batch, self._begun(batch, self._buffers[index % len(self._buffers)])))
            if len(ahead) > self._ahead:
                yield from _finished(*ahead.popleft())
        while ahead:
            yield from _finished(*ahead.popleft())

    def _batches(self, fillings: Iterable[Filling]) -> Iterator[Batch]:
        """Runs one behind the other, small ones together."""
        runs, size, before = [], 0, Who.CALLER
        for filling, run, nbytes, who in chain.from_iterable(map(self._split, fillings)):
            if runs and (who is not before or size + nbytes > RUN_BYTES or len(runs) == BATCH_RUNS):
                yield Batch(runs, before)
                runs, size = [], 0
            runs.append((filling, run))
            size, before = size + nbytes, who
        if runs:
            yield Batch(runs, before)

    def _split(self, filling: Filling) -> Iterator[tuple[Filling, Run, int, Who]]:
        """Each run of a linear with its bytes and who reads and places it."""
        spec = filling.spec
        forms = self._rows.forms(spec)
        unit_bytes, who = self._rows.unit_bytes(spec, forms), self._who(filling, forms)
        step = max(1, RUN_BYTES // unit_bytes)
        for start in range(0, spec.column_units, step):
            stop = min(start + step, spec.column_units)
            yield filling, Run(spec, start, stop, forms), (stop - start) * unit_bytes, who

    def _who(self, filling: Filling, forms: tuple[Form, ...]) -> Who:
        each = [(parts, form) for (_, parts), form in zip(filling.spec.runs, forms, strict=True)]
        if not all(self._rows.is_as_wanted(parts, form) for parts, form in each):
            return Who.CALLER
        # Sums are made of numbers that the file has in codes, in order.
        numbers = [part.tensor for parts, form in each if form.dtype != torch.uint8 for part in parts]
        is_left = self._packers is None or not filling.is_in_host or any(map(self._source.is_coded, numbers))
        return Who.READERS if is_left else Who.PACKERS

    def _begun(self, batch: Batch, buffer: torch.Tensor) -> Callable[[], list[list[Rows]] | None]:
        """What gives the rows of each run, which threads are reading and placing, or the caller then has to read."""
        read = partial(self._rows.read, [run for _, run in batch.runs])
        if batch.who is Who.CALLER:
            return lambda: read(Memory(buffer))
        reading = self._readers.submit(read, Memory(buffer))
        if batch.who is Who.READERS:
            return reading.result
        return self._placers.submit(self._place, batch, reading).result

    def _place(self, batch: Batch, reading: Future[list[list[Rows]]]) -> None:
        """Bring runs to their places once they are read."""
        assert self._packers is not None
        found = reading.result()
        with self._packers.one() as packer:
            for (filling, run), rows in zip(batch.runs, found, strict=True):
                filling.place(run.start, run.stop, rows, packer)


def _finished(
    batch: Batch, rows: Callable[[], list[list[Rows]] | None]
) -> Iterator[tuple[Filling, int, int, list[Rows] | None]]:
    """The runs of a batch with their rows, once they are there or placed."""
    found = rows()
    for index, (filling, run) in enumerate(batch.runs):
        yield filling, run.start, run.stop, None if found is None else found[index]
