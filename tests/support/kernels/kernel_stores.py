"""Starts of a store of compiled kernels, and its entries."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.team import store as cache
from cpu_kernels.team.store import KernelStore
from cpu_kernels.vectors import compiler
from cpu_kernels.vectors.isa import Isa

KERNEL = "rms_norm"
compile_object = compiler.compile_object
_known: dict[tuple[str, str, Isa | None], bytes] = {}


def _compiled_once(kernel: Callable, name: str, isa: Isa | None) -> bytes:
    """What the compiler gives, which is asked once for each kernel: the store is what is tested."""
    key = (kernel.__module__, name, isa)
    if key not in _known:
        _known[key] = compile_object(kernel, name, isa)
    return _known[key]


def norm(ops: CpuKernels) -> torch.Tensor:
    """An op that needs one kernel beside those of the team."""
    x, out = torch.arange(8.0)[None], torch.empty(1, 8)
    ops.rms_norm(x, torch.ones(8), 0.0, out)
    return out


def start(parent: Path | None) -> tuple[list[str], list[str]]:
    """(kernels compiled, lines said) of one start, whose result must be right and which leaves no temporary folder."""
    compiled, before = [], set(os.listdir(tempfile.gettempdir()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with (
            mock.patch.object(compiler, "compile_object", _compiled_once),
            CpuKernels(num_threads=1, cache_dir=parent, on_compile=compiled.append) as ops,
        ):
            out = norm(ops)
    x = torch.arange(8.0)[None]

    assert torch.allclose(out, x / x.pow(2).mean().sqrt())
    assert not [name for name in set(os.listdir(tempfile.gettempdir())) - before if "kernels" in name]
    return compiled, [str(warning.message) for warning in caught]


def entry(name: str, code: bytes) -> bytes:
    """An entry as the store writes it: whatever the content, its checksum is right."""
    return KernelStore._checksum(name, code) + code


def code_of(store: Path, name: str = KERNEL) -> bytes:
    return (store / f"{name}.o").read_bytes()[cache.CHECKSUM_BYTES :]
