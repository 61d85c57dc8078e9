"""Where the Triton tests run: under the interpreter (TRITON_INTERPRET=1, a process of its own) or on a CUDA device.

`test_interpreter.py` starts the interpreter process; in an ordinary run the same tests are marked `gpu`, and skipped
where there is no CUDA device.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.support.gpu import interpreter

    interpreter.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Outside of the interpreter the kernel tests are GPU tests."""
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        if item.path.name.startswith("test_triton_") and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device; test_interpreter.py runs it interpreted"))


@pytest.fixture
def device() -> str:
    """Where tensors of a kernel test live."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def only_interpreted(device: str) -> None:
    """For planted faults: under the interpreter a wrong address cannot hurt the device."""
    if device != "cpu":
        pytest.skip("mutants run under the interpreter, where a wrong address cannot hurt the device")
