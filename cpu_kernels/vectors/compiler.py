"""From a Python function void(arguments, thread) to one object file with one exported symbol, through numba.

The exported function keeps numba's native convention, int32(void *result, void **exception, int64, int64), without
numba's C wrapper: the wrapper's error path would need numba loaded, and kernels never raise (no exceptions, numpy's
error model), so the object needs nothing but libc. No fastmath: the kernels spell out their vectors and their fma.
"""

from typing import Any

import llvmlite.binding as llvm
from numba import config, njit, types

from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.linked_code import cpu_target, linked_code
from cpu_kernels.vectors.numba_parts import CompileError, expect_members, part
from cpu_kernels.vectors.target import in_whole_lines, target_of

Compiler = part("numba.core.compiler", "Compiler")
FunctionCompiler: Any = part("numba.core.dispatcher", "_FunctionCompiler")
global_compiler_lock = part("numba.core.compiler_lock", "global_compiler_lock")

if config.DISABLE_JIT:  # the functions below would be plain Python, which has no machine code
    raise CompileError(
        "a CPU kernel must be compiled, but the environment variable NUMBA_DISABLE_JIT forbids it; unset it, at least "
        "for the first run on this machine"
    )

OPTIONS = {"nogil": True, "error_model": "numpy"}
helper = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)  # for functions that kernels call
# For those that take or give many registers, which a real call would pass through memory.
inlined = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, inline="always", **OPTIONS)


class _ObjectCompiler(FunctionCompiler):
    """numba's function compiler, told to make neither wrapper."""

    def _customize_flags(self, flags):
        expect_members(flags, "no_cpython_wrapper", "no_cfunc_wrapper", "no_compile", "enable_pyobject")
        flags.no_cpython_wrapper = True
        flags.no_cfunc_wrapper = True
        flags.no_compile = True
        flags.enable_pyobject = False
        return flags


def compile_module(kernel, name: str) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """`kernel(arguments: int64, thread: int64)` as optimised LLVM code, exported as `name`, and what emits it for this
    CPU; raises numba's errors. The caller holds numba's lock."""
    kernel.__name__ = kernel.__qualname__ = name
    expect_members(FunctionCompiler, "_customize_flags", "compile")
    compiler = _ObjectCompiler(kernel, cpu_target, {"nopython": True, **OPTIONS}, {}, Compiler)
    with linked_code():
        result = compiler.compile((types.int64, types.int64), types.void)
        library = result.library
        library.finalize()
        library.optimise()
        expect_members(library, "_final_module")
        expect_members(library.codegen, "_tm")
    module = library._final_module
    for function in module.functions:
        # numba numbers helper functions per process, so another process's object may hold a different function of
        # the same name: only the kernel itself may be visible to the loader.
        if function.name == result.fndesc.llvm_func_name:
            function.name = name
        elif not function.is_declaration:
            function.linkage = "internal"
    return module, library.codegen._tm


def compile_object(kernel, name: str, isa: Isa | None = None) -> bytes:
    """Object code of `kernel(arguments: int64, thread: int64)`, exported as `name`; raises numba's errors.

    With an `isa` the code keeps to its instructions, whatever more this CPU has; without, to those of this CPU.
    """
    with global_compiler_lock:
        module, machine = compile_module(kernel, name)
        target = None if isa is None else target_of(isa)
        return machine.emit_object(in_whole_lines(module)) if target is None else target.emit_object(module)
