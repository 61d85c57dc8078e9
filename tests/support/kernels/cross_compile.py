"""Kernels for another machine's CPU: numba's LLVM code of a kernel, emitted by that machine's code generator.

A process of its own compiles them, which knows all machines that LLVM has. `_compiled` starts it; it answers each line of
JSON, [form, isa, CPUs, module, factory, *parameters] ("ISA" stands for the isa), with a line. The form is what is asked
for, "assembly" or "object": each takes the code generator once. Answers are kept as long as sources and compilers are
the same, like the kernels of this machine.
"""

import base64
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import llvmlite.binding as llvm

from cpu_kernels.team.store import build_key
from cpu_kernels.vectors.isa import named
from cpu_kernels.vectors.target import Target
from hetero_attn.tools.whole_file import write_whole

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / ".pytest_cache" / "cross_compiled"
Cpu = tuple[str, str]  # (triple, name)
Kernel = tuple[str | int, ...]  # (module, factory, *parameters)


def assembly_of(isa: str, wanted: Mapping[Kernel, Sequence[Cpu]]) -> dict[tuple[Kernel, Cpu], str]:
    """The assembly of every kernel for its CPUs; the kernel's function is `kernel`."""
    return _compiled("assembly", isa, wanted)


def objects_of(isa: str, wanted: Mapping[Kernel, Sequence[Cpu]]) -> dict[tuple[Kernel, Cpu], bytes]:
    """The object file of every kernel for its CPUs; the kernel's function is `kernel`."""
    found = _compiled("object", isa, wanted)
    return {which: base64.b64decode(code) for which, code in found.items()}


def _compiled(form: str, isa: str, wanted: Mapping[Kernel, Sequence[Cpu]]) -> dict[tuple[Kernel, Cpu], str]:
    answers = _answers([json.dumps([form, isa, cpus, *kernel]) for kernel, cpus in wanted.items()])
    return {
        (kernel, cpu): code
        for (kernel, cpus), answer in zip(wanted.items(), answers, strict=True)
        for cpu, code in zip(cpus, answer, strict=True)
    }


def _answers(requests: Sequence[str]) -> list[list[str]]:
    """What the other process answers to each request, or has answered before."""
    folder = KEPT / hashlib.sha256(build_key().encode() + Path(__file__).read_bytes()).hexdigest()
    places = {request: folder / hashlib.sha256(request.encode()).hexdigest() for request in requests}
    if missing := [request for request, place in places.items() if not place.exists()]:
        command = [sys.executable, "-m", "tests.support.kernels.cross_compile"]
        given = "\n".join(missing)
        run = subprocess.run(command, input=given, capture_output=True, text=True, cwd=ROOT, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        if not folder.exists():
            shutil.rmtree(KEPT, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        for request, answer in zip(missing, run.stdout.splitlines(), strict=True):
            write_whole(places[request], answer)
    return [json.loads(places[request].read_text()) for request in requests]


def _code_of(isa: str, module: str, factory: str, *parameters: str | int) -> llvm.ModuleRef:
    from numba.core.compiler_lock import global_compiler_lock

    from cpu_kernels.vectors.compiler import compile_module

    given = (named(isa) if parameter == "ISA" else parameter for parameter in parameters)
    with global_compiler_lock:
        kernel = getattr(importlib.import_module(f"cpu_kernels.{module}"), factory)(*given)
        text = str(compile_module(kernel, "kernel")[0])
    # A spin loop's hint is the only instruction of its own machine that a kernel asks for by name.
    return llvm.parse_assembly(re.sub(r"(?m)^.* call void @llvm\.x86\.sse2\.pause\(\).*$", "", text))


def _emitted(code: llvm.ModuleRef, cpu: Cpu, form: str) -> str:
    target = Target(*cpu, "")
    if form == "assembly":
        return target.machine().emit_assembly(target.retargeted(code))
    return base64.b64encode(target.emit_object(code)).decode()


def main() -> None:
    """Answer every line of stdin."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    for line in sys.stdin:
        form, isa, cpus, *kernel = json.loads(line)
        code = _code_of(isa, *kernel)
        print(json.dumps([_emitted(code, cpu, form) for cpu in cpus]), flush=True)


if __name__ == "__main__":
    main()
