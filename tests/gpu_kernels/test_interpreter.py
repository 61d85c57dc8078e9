"""Runs the kernel tests of this folder under Triton's interpreter, in a process of its own.

Triton decides when a kernel is decorated whether it is interpreted, so one process cannot both interpret and compile.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.processes.quick_python import quick_python

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

HERE = Path(__file__).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the tensors are tiny; idle threads of torch only disturb the neighbours


# An ordinary run takes every kernel, format and shape of a tile once; what proves that these tests bite comes after it.
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
@pytest.mark.parametrize(
    ("names", "cells"),
    [
        pytest.param("kernels", "not matrix", id="kernels"),
        pytest.param("mutants", "not matrix", id="mutants", marks=pytest.mark.matrix),
        pytest.param("", "matrix", id="matrix", marks=pytest.mark.matrix),
    ],
)
def test_kernels_pass_under_the_interpreter(names, cells):
    files = sorted(
        str(path)
        for path in HERE.glob("test_triton_*.py")
        if not names or ("mutants" in path.stem) == (names == "mutants")
    )
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-m", cells]
    command = quick_python("-m", "pytest", *options, *files)

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parents[1],
        env=os.environ | ONE_THREAD | {"TRITON_INTERPRET": "1"},
    )

    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    assert " skipped" not in done.stdout, f"a kernel test was skipped under the interpreter:\n{done.stdout[-5_000:]}"
