"""The rows of a linear's units, read a run at a time through buffers that are reused until the load is over.

Fresh memory for every run is not given back evenly by the C library: a load then held up to half of the packed weights
beside them as holes in its heap.
"""

import math
from collections.abc import Iterator

import torch

from cpu_kernels import fresh_memory
from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.spec.weights import LinearSpec, Part

RUN_BYTES = 16 << 20  # of a run's rows in float32


def units_at_once(spec: LinearSpec) -> int:
    """Units in a run: as many as fit in RUN_BYTES, at least one."""
    return max(1, RUN_BYTES // (spec.unit_features * spec.in_features * 4))


class UnitRows:
    """Reads runs of units of `linears`; what a run returns is overwritten by the next."""

    def __init__(self, checkpoint: Checkpoint, linears: tuple[LinearSpec, ...]) -> None:
        size = max(units_at_once(spec) * spec.unit_features * spec.in_features * 4 for spec in linears)
        self._checkpoint = checkpoint
        self._rows, self._part = (fresh_memory((size,), torch.uint8) for _ in range(2))

    def runs(self, spec: LinearSpec) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Runs of units [start, stop) with their rows, [(stop - start) * unit_features, in_features], padding zero.

        The rows have the dtype of the first part's tensor.

        Raises:
            CheckpointError: see Checkpoint.read.
        """
        step = units_at_once(spec)
        for start in range(0, spec.column_units, step):
            stop = min(start + step, spec.column_units)
            yield start, stop, self._run(spec, start, stop)

    def _run(self, spec: LinearSpec, start: int, stop: int) -> torch.Tensor:
        dtype = self._checkpoint.torch_dtype(spec.parts[0].tensor)
        rows = _front(self._rows, dtype, (stop - start, spec.unit_features, spec.in_features))
        offset = 0
        for part in spec.parts:
            self._lay(part, start, rows[:, offset : offset + part.rows_per_unit])
            offset += part.rows_per_unit
        rows[:, offset:] = 0
        return rows.view(-1, spec.in_features)

    def _lay(self, part: Part, start: int, target: torch.Tensor) -> None:
        """Rows of one part into `target`, [units from `start` on, rows_per_unit, in_features]; none left: zeros."""
        units, rows_per_unit, in_features = target.shape
        first, wanted = start * rows_per_unit, units * rows_per_unit
        here = min(wanted, part.rows - first)
        dtype = self._checkpoint.torch_dtype(part.tensor)
        direct = target.is_contiguous() and dtype == target.dtype
        rows = target.view(-1, in_features) if direct else _front(self._part, dtype, (wanted, in_features))
        self._checkpoint.read(part.tensor, slice(first, first + here), out=rows[:here])
        rows[here:] = 0
        if not direct:
            target.copy_(rows.view(units, rows_per_unit, in_features))


def _front(buffer: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
