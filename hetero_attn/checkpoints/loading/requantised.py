"""What it changes to hold a file's codes in another dtype: weights before and after, some rows of every run."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import format_of
from hetero_attn.checkpoints.loading.run_rows import PLAIN_DTYPES
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.models.requantised import Requantised

COMPARED_ROWS = 64  # the first of a run, which has hundreds: looking at all would take as long as packing them


class Comparison:
    """Gathers how far weights of codes are from what they were packed into."""

    def __init__(self, source: WeightSource, ops: CpuKernels) -> None:
        self._source, self._ops = source, ops
        self._sums: dict[str, tuple[float, float]] = {}  # of squared changes and squared weights, by tensors
        self._formats: tuple[dict[str, None], dict[str, None]] = ({}, {})
        self._weights = 0

    def add(self, tensors: Sequence[str], rows: torch.Tensor, name: str, blocks: torch.Tensor) -> None:
        """Compare numbers of these tensors with the blocks of format `name` that they were packed into, if they are
        codes in the file."""
        coded = [tensor for tensor in tensors if self._source.is_coded(tensor)]
        if not coded or name == "fp32":
            return
        wanted = rows[:COMPARED_ROWS].float()
        # By numpy: torch's threads go on spinning after what they have shared, on the cores that pack.
        found, true = self._unpacked(blocks, name, wanted.shape).numpy(), wanted.numpy()
        key, change, size = _named(tensors), np.square(found - true).sum(), np.square(true).sum()
        changes, sizes = self._sums.get(key, (0.0, 0.0))
        self._sums[key] = changes + float(change), sizes + float(size)
        self._weights += true.size
        self._formats[0].update(dict.fromkeys(map(self._format, coded)))
        self._formats[1][name] = None

    def _format(self, tensor: str) -> str:
        """In which a file's codes would be held; "codes" where none holds them."""
        return self._source.dtype(tensor) if self._source.source_type(tensor) else "codes"

    def _unpacked(self, blocks: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
        if format_of(name).is_row_major:
            return blocks.view(PLAIN_DTYPES[name]).view(-1, shape[1])[: shape[0]].float()
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        self._ops.unpack_rows(blocks, name, torch.arange(shape[0], device="cpu"), values)
        return values

    def result(self) -> Requantised | None:
        """What was found; None where no codes are held otherwise than in the file."""
        if not self._sums:
            return None
        errors = {key: sqrt(change / size) if size else 0.0 for key, (change, size) in self._sums.items()}
        changes, sizes = map(sum, zip(*self._sums.values(), strict=True))
        worst = max(errors, key=errors.__getitem__)
        source, held_as = (", ".join(formats) for formats in self._formats)
        return Requantised(
            source, held_as, sqrt(changes / sizes) if sizes else 0.0, worst, errors[worst], self._weights
        )


def _named(tensors: Sequence[str]) -> str:
    """Tensors whose rows lie together, the parts of one linear."""
    first, *others = (tensor.removesuffix(".weight") for tensor in tensors)
    return "/".join([first, *(other.rpartition(".")[2] for other in others)])
