"""numba as a front end alone: what is compiled inside `linked_code` becomes LLVM code and nothing more.

By itself numba optimises every helper, makes machine code of it and of the kernel for this process to run, and links
its run-time library of reference counts into each of them. Here a kernel is optimised once, with all that it calls;
only the object file is ever run, and kernels own no objects.
"""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cpu_kernels.vectors.numba_parts import expect_members, part

JITCodeLibrary: Any = part("numba.core.codegen", "JITCodeLibrary")
JITCPUCodegen: Any = part("numba.core.codegen", "JITCPUCodegen")
cpu_target = part("numba.core.registry", "cpu_target")
rtsys = part("numba.core.runtime", "rtsys")
# Members that are replaced below: under another name numba's own would run in their place.
REPLACED_OF_LIBRARY = "add_linking_library", "_optimize_final_module", "_finalize_final_module"
REPLACED_OF_CODEGEN = "_library_class", "set_env"


class _LinkedLibrary(JITCodeLibrary):
    """The code of a function and of what it calls, to be linked into its callers."""

    def add_linking_library(self, library):
        if library is not rtsys.library:
            super().add_linking_library(library)

    def _optimize_final_module(self):
        """Do nothing: see `optimise`."""

    def _finalize_final_module(self):
        self._verify_declare_only_symbols()
        self._finalized = True

    def optimise(self):
        """Optimise the function with everything that is linked into it."""
        super()._optimize_final_module()


class _LinkedCodegen(JITCPUCodegen):
    """Makes such libraries. Functions in them have no address, so Python can call none."""

    _library_class = _LinkedLibrary

    def set_env(self, env_name, env):
        """Do nothing: a variable without machine code has no address either."""


@functools.cache
def _codegen() -> _LinkedCodegen:
    return _LinkedCodegen("cpu_kernels")


@contextmanager
def linked_code() -> Iterator[None]:
    """Compile like this inside. The caller holds numba's lock, so that nobody else compiles meanwhile.

    Python collects no garbage inside: it would look through all that numba has made, time and again. Raises
    CompileError where this numba lacks what is replaced or used here.
    """
    context, collects = cpu_target.target_context, gc.isenabled()
    expect_members(JITCodeLibrary, *REPLACED_OF_LIBRARY, "_verify_declare_only_symbols")
    expect_members(JITCPUCodegen, *REPLACED_OF_CODEGEN)
    expect_members(context, "_internal_codegen", "refresh")
    context.refresh()  # what numba makes once for everybody is made as ever
    before = context._internal_codegen
    context._internal_codegen = _codegen()
    gc.disable()
    try:
        yield
    finally:
        context._internal_codegen = before
        if collects:
            gc.enable()
