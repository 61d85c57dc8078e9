"""A numba whose inside is another than kernels are compiled with is told by name, with the versions that will do."""

import importlib.util
from pathlib import Path

import numba.core.codegen
import pytest
from numba.core import cpu

from cpu_kernels.vectors import linked_code
from cpu_kernels.vectors.compiler import compile_object
from cpu_kernels.vectors.numba_parts import CompileError

WAY_OUT = r"which compiling a CPU kernel needs; numba 0\.62 to 0\.68 have it: .*pip install"


def kernel(arguments, thread):
    return


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (numba.core.codegen.JITCodeLibrary, "_optimize_final_module"),
        (numba.core.codegen.JITCodeLibrary, "_verify_declare_only_symbols"),
        (numba.core.codegen.JITCPUCodegen, "set_env"),
        (cpu.CPUContext, "refresh"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_member_that_numba_lacks(monkeypatch, owner, name):
    for base in owner.__mro__:
        if name in vars(base):
            monkeypatch.delattr(base, name)

    with pytest.raises(CompileError, match=rf"numba [\d.]+ has no .*\.{name}, {WAY_OUT}"):
        compile_object(kernel, "kernel")


@pytest.mark.parametrize(
    ("module", "name"), [(numba.core.codegen, "JITCPUCodegen"), (numba.core.registry, "cpu_target")]
)
def test_a_name_that_numba_lacks(monkeypatch, module, name):
    """As at the import of a fresh process."""
    monkeypatch.delattr(module, name)
    spec = importlib.util.spec_from_file_location("linked_code_again", Path(linked_code.__file__))

    with pytest.raises(CompileError, match=rf"has no {module.__name__}\.{name}, {WAY_OUT}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
