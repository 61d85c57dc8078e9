"""Where the packed rows of a linear go: which of its units lie in GPU memory and which in host memory.

Each kind of home takes what `UnitRows` reads, a run of units at a time, and the packer of a thread that packs alone;
None: the team packs.
"""

from dataclasses import dataclass

import torch

from cpu_kernels.formats import BLOCK_FEATURES
from hetero_attn.checkpoints.loading.landing import Landing
from hetero_attn.checkpoints.loading.packer import Packer
from hetero_attn.checkpoints.loading.run_rows import Rows
from hetero_attn.spec.weights import LinearSpec


@dataclass(frozen=True, slots=True)
class RowCut:
    """Both memories have every output feature; that of the GPU the first `gpu_inputs` input features."""

    landing: Landing
    spec: LinearSpec
    gpu: torch.Tensor | None
    dram: torch.Tensor
    gpu_inputs: int

    def place(self, start: int, stop: int, runs: list[Rows], packer: Packer | None = None) -> None:
        """Units [start, stop) of output features."""
        (rows,), spec, inputs = runs, self.spec, self.gpu_inputs
        assert isinstance(rows, torch.Tensor), f"{spec.name} is cut by inputs and has parts side by side"
        run = slice(start * spec.unit_rows, stop * spec.unit_rows)
        split = inputs * rows.shape[1] // spec.in_features  # of bytes, where rows are the file's
        if inputs:
            assert self.gpu is not None, spec.name
            self.landing.place(spec, [rows[:, :split]], inputs, self.gpu[run], on_device=True)
        if inputs < spec.in_features:
            rest = spec.in_features - inputs
            self.landing.place(spec, [rows[:, split:]], rest, self.dram[run], False, packer)


@dataclass(frozen=True, slots=True)
class ColumnCut:
    """Units before `first_dram_unit` lie in GPU memory, the others in host memory."""

    landing: Landing
    spec: LinearSpec
    gpu: torch.Tensor | None
    dram: torch.Tensor
    first_dram_unit: int

    def place(self, start: int, stop: int, runs: list[Rows], packer: Packer | None = None) -> None:
        """Units [start, stop)."""
        cut = self.first_dram_unit
        for first, last, target, offset in (
            (start, min(stop, cut), self.gpu, 0),
            (max(start, cut), stop, self.dram, cut),
        ):
            if first < last:
                assert target is not None, self.spec.name
                rows = [_of_units(run, stop - start, first - start, last - start) for run in runs]
                blocks = slice((first - offset) * self.spec.unit_rows, (last - offset) * self.spec.unit_rows)
                on_device = target is self.gpu
                self.landing.place(self.spec, rows, self.spec.in_features, target[blocks], on_device, packer)


@dataclass(frozen=True, slots=True)
class Uncut:
    """All units lie in one memory."""

    landing: Landing
    spec: LinearSpec
    blocks: torch.Tensor
    on_device: bool

    def place(self, start: int, stop: int, runs: list[Rows], packer: Packer | None = None) -> None:
        """Units [start, stop)."""
        run = self.blocks[start * self.spec.unit_rows : stop * self.spec.unit_rows]
        self.landing.place(self.spec, runs, self.spec.in_features, run, self.on_device, packer)


def _of_units(rows: Rows, units: int, start: int, stop: int) -> Rows:
    """Rows of units [start, stop) of a run's, as `UnitRows.runs` gives them."""
    if isinstance(rows, tuple):
        return tuple(part[start * BLOCK_FEATURES : stop * BLOCK_FEATURES] for part in rows)
    return rows.view(units, -1, rows.shape[1])[start:stop].flatten(0, 1)
