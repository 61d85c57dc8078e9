"""What LLVM emits code for: this CPU, cut down to the instructions of an Isa, or a CPU of another kind.

A path that is forced on a better CPU must not profit from it: its speed is to be that of the CPU it stands for.
"""

import re
from dataclasses import dataclass

import llvmlite.binding as llvm

from cpu_kernels.vectors.isa import Isa

WIDTH = "min-legal-vector-width"  # of a function: LLVM keeps 512-bit registers unless it says that fewer bits will do
X86 = "x86_64"
WHOLE_LINES = "alignstack(64)"  # of a function: where it begins to use the stack


@dataclass(frozen=True, slots=True)
class Target:
    """A CPU as LLVM knows it: triple, name and features ("+avx2,-avx512f").

    register_bits: of the widest vector register to use, 0 where the features say it.
    """

    triple: str
    cpu: str
    features: str
    register_bits: int = 0

    def machine(self, opt: int = 3) -> llvm.TargetMachine:
        """LLVM's emitter of code for this CPU, which a JIT may load."""
        target = llvm.Target.from_triple(self.triple)
        return target.create_target_machine(
            cpu=self.cpu, features=self.features, opt=opt, reloc="static", codemodel="jitdefault", jit=True
        )

    def retargeted(self, module: llvm.ModuleRef) -> llvm.ModuleRef:
        """A copy of a module for this target."""
        machine, text = self.machine(), str(module)
        text = re.sub(r"(?m)^target triple = .*$", f'target triple = "{self.triple}"', text)
        text = re.sub(r"(?m)^target datalayout = .*$", f'target datalayout = "{machine.target_data}"', text)
        if self.register_bits:
            text = _with_attribute(text, f'"{WIDTH}"="{self.register_bits}"')
        return llvm.parse_assembly(_with_attribute(text, WHOLE_LINES) if self.triple.startswith(X86) else text)

    def emit_object(self, module: llvm.ModuleRef) -> bytes:
        """Object code of a module."""
        return self.machine().emit_object(self.retargeted(module))


def _with_attribute(text: str, attribute: str) -> str:
    """A module's text, each of its functions with one attribute more."""
    return re.sub(r"(?m)^(define .*?)((?: !\S+ !\d+)* \{)$", rf"\1 {attribute}\2", text)


def in_whole_lines(module: llvm.ModuleRef) -> llvm.ModuleRef:
    """A copy of a module for this CPU whose functions, on x86, begin to use the stack at a line of the cache.

    Callers promise 16 bytes. By chance, process by process, registers that are laid down would lie across two lines
    each, and prompts on AVX2 run at 0.7 to 0.8 of their speed.
    """
    if not llvm.get_process_triple().startswith(X86):
        return module
    return llvm.parse_assembly(_with_attribute(str(module), WHOLE_LINES))


def target_of(isa: Isa) -> Target | None:
    """This CPU without the vector instructions that `isa` does not name; None where that is the CPU as it is.

    Where 256-bit vpdpbusd exists in the encoding of AVX-512 alone, the path "avxvnni" has that and 256-bit registers.
    """
    host = dict(llvm.get_host_cpu_features()) if isa.name in ("avx512vnni", "avxvnni", "avx2") else {}
    borrows = isa.name == "avxvnni" and not host.get("avxvnni")
    kept = {"avx512f", "avx512vl", "avx512vnni"} if borrows else set()
    if isa.name == "avx512vnni":
        kept = set(host) - {"avx512bf16"}
    features = {
        name: on and (name in kept or not name.startswith(("avx512", "avx10", "amx"))) for name, on in host.items()
    }
    if features == host:
        return None
    if borrows:
        features["prefer-256-bit"] = True
    listed = ",".join(("+" if on else "-") + name for name, on in sorted(features.items()))
    return Target(llvm.get_process_triple(), llvm.get_host_cpu_name(), listed, 256 if borrows else 0)
