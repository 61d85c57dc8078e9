"""Kernels for another machine's CPU: numba's LLVM code of a kernel, emitted by that machine's code generator.

numba compiles every function that it has typed, kernels and their helpers alike, for the machine it runs on, where an
arm64 instruction cannot be selected. So in a process that uses this module numba's engine compiles nothing, and nothing
can be run: use it in a process of its own, `python -m tests.support.cross_compile`, which reads kernels as JSON lines,
[triple, cpu, isa, module, factory, *parameters] ("ISA" is the isa), and answers each with a line: assembly and object.
"""

import base64
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm

from cpu_kernels.vectors.isa import Isa, named
from cpu_kernels.vectors.target import Target

ROOT = Path(__file__).resolve().parents[2]


def compiled(*kernels: tuple[str | int, ...]) -> list[tuple[str, bytes]]:
    """(assembly, object) of kernels, compiled by another process."""
    requests = "\n".join(json.dumps(kernel) for kernel in kernels)
    command = [sys.executable, "-m", "tests.support.cross_compile"]
    run = subprocess.run(command, input=requests, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    return [(answer["assembly"], base64.b64decode(answer["object"])) for answer in answers]


def _compile_nothing() -> None:
    from numba.core import codegen
    from numba.core.registry import cpu_target

    engine = cpu_target.target_context.codegen()._engine
    assert isinstance(engine, codegen.JitEngine)
    engine.add_module = engine._load_defined_symbols
    engine.finalize_object = lambda: None
    engine.get_function_address = engine.get_global_value_address = lambda name: 0
    cpu_target.target_context.codegen().set_env = lambda name, environment: None


def _compile(triple: str, cpu: str, isa: Isa, module: str, factory: str, *parameters: str | int) -> dict[str, str]:
    from numba.core.compiler_lock import global_compiler_lock

    from cpu_kernels.vectors.compiler import compile_module

    given = (isa if parameter == "ISA" else parameter for parameter in parameters)
    with global_compiler_lock:
        kernel = getattr(importlib.import_module(f"cpu_kernels.{module}"), factory)(*given)
        code, _ = compile_module(kernel, "kernel")
        target = Target(triple, cpu, "")
        # A spin loop's hint is the only instruction of its own machine that a kernel asks for by name.
        code = llvm.parse_assembly(re.sub(r"(?m)^.* call void @llvm\.x86\.sse2\.pause\(\).*$", "", str(code)))
        machine, own = target.machine(), target.retargeted(code)
        return {
            "assembly": machine.emit_assembly(own),
            "object": base64.b64encode(machine.emit_object(own)).decode(),
        }


def main() -> None:
    """Answer every line of stdin."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    _compile_nothing()
    for line in sys.stdin:
        triple, cpu, isa, *kernel = json.loads(line)
        print(json.dumps(_compile(triple, cpu, named(isa), *kernel)), flush=True)


if __name__ == "__main__":
    main()
