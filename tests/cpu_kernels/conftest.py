"""A store of compiled kernels to be spoiled."""

import shutil
from pathlib import Path

import pytest

from cpu_kernels import CpuKernels
from cpu_kernels.team.store import build_key
from tests.support.kernels.kernel_stores import norm


@pytest.fixture(scope="session")
def filled(tmp_path_factory) -> Path:
    """A store with three kernels, as one start leaves it; to be copied."""
    path = tmp_path_factory.mktemp("filled")
    with CpuKernels(num_threads=1, cache_dir=path) as ops:
        norm(ops)
    return path


@pytest.fixture
def store(filled, tmp_path) -> Path:
    """A copy of the filled store that a test may spoil; the folder of this build inside it."""
    shutil.copytree(filled, tmp_path / "store")
    return tmp_path / "store" / build_key()
