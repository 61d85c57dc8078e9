"""Whether an interpreted kernel reads only memory that it was given: on a GPU what lies behind it may not be mapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder

from gpu_kernels.launching import Kernel

Range = tuple[int, int]


@contextmanager
def watched_loads() -> Iterator[None]:
    """Launches inside fail, with an AssertionError, after a load from outside of the memory behind their tensors."""
    ranges: list[Range] = []
    outside: list[int] = []
    launch, load = Kernel.launch, InterpreterBuilder.create_masked_load

    def watched_launch(self: Kernel, grid: Any, tensors: tuple, *rest: Any, **options: Any) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors]
        ranges[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        outside.clear()
        launch(self, grid, tensors, *rest, **options)
        assert not any(outside), f"{sum(outside)} numbers are read from outside of the tensors given"

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        item_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.uint64)
        inside = np.zeros(first.shape, dtype=bool)
        for start, stop in ranges:
            inside |= (first >= start) & (first + np.uint64(item_bytes) <= stop)
        outside.append(int((~inside).sum()))
        return load(self, pointers, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", watched_launch)
        patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        yield
