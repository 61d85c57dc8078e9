"""Compile what the wrappers would launch, for any NVIDIA architecture, on a machine without a GPU.

A driver that only names its target stands in for CUDA, a launch becomes a compilation, and the wrappers run on meta
tensors; so dtypes, alignments, integer specialisations, warps and stages are exactly those of a real launch. The cubin
then says what a kernel costs. The disassembler takes half a second to start and a hundredth for a kernel, so it is
given the code of many together.
"""

from __future__ import annotations

import bisect
import collections
import functools
import hashlib
import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

KEPT = Path(__file__).resolve().parents[3] / ".pytest_cache" / "cuda_tools"
KIB = 1024
SHARED_MEMORY_LIMIT = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(([A-Z0-9_]+(?:\.[A-Z0-9_]+)*).*)", re.M)
_JUMP = re.compile(r"BRA\b.*?\b0x([0-9a-f]+)")


class Instruction(NamedTuple):
    """One of a kernel's machine code; target: where a jump to a fixed place goes."""

    address: int
    name: str
    target: int | None


class Resources(NamedTuple):
    """What one compiled kernel uses; a spilled register shows as stack bytes and local accesses. Loads and products are
    counted as instructions in the machine code; exchanges between threads, by shuffles or shared memory, in its longest
    loop. int8_products: of the PTX, products of int8 tensor cores."""

    kernel: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_accesses: int
    loads: int
    wide_loads: int
    tensor_core: int
    dp4a: int
    loop_exchanges: int
    int8_products: int


_known: dict[bytes, list[Instruction]] = {}  # machine code, by the cubin that has it


class _NamedTarget:
    """The part of a Triton driver that compilation asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # a compilation cache for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def compile_launches(call: Callable[[], None], architecture: int) -> list[Resources]:
    """Compile every kernel that `call` would launch; raises what the compiler raises."""
    compiled = _compiled(call, architecture)
    _disassemble([kernel.asm["cubin"] for _, kernel in compiled], architecture)
    return [_resources(name, kernel) for name, kernel in compiled]


def compile_together(calls: Iterable[Callable[[], None]], architecture: int) -> None:
    """Do for many calls what `compile_launches` then finds done; what does not compile is raised there."""
    cubins = []
    for call in calls:
        with suppress(Exception):
            cubins += [kernel.asm["cubin"] for _, kernel in _compiled(call, architecture)]
    _disassemble(cubins, architecture)


def _compiled(call: Callable[[], None], architecture: int) -> list[tuple[str, Any]]:
    """The names and the compiled kernels of what `call` would launch."""
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
        return compiled[-1][1]

    active = driver._active
    driver.set_active(_NamedTarget(architecture))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            call()
    finally:
        driver._active = active
    return compiled


@functools.cache
def _resources(name: str, kernel: Any) -> Resources:
    code = _known[kernel.asm["cubin"]]
    usage = _said(kernel.asm["cubin"], knobs.nvidia.cuobjdump.path, "-res-usage")
    counts = collections.Counter(instruction.name for instruction in code)

    def count(*families: str, having: str = "") -> int:
        return sum(n for op, n in counts.items() if op.split(".")[0] in families and having in op)

    return Resources(
        kernel=name,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        shared_bytes=kernel.metadata.shared,
        stack_bytes=int(re.search(r"STACK:(\d+)", usage).group(1)),
        local_accesses=count("LDL", "STL"),
        loads=count("LDG", "LDGSTS"),
        wide_loads=count("LDG", "LDGSTS", having="128"),
        tensor_core=count("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA"),
        dp4a=count("IDP", having="4A"),
        loop_exchanges=sum(op.split(".")[0] in ("SHFL", "LDS", "LDSM", "STS", "BAR") for op in _longest_loop(code)),
        int8_products=len(re.findall(r"^\s+w?g?mma\S*\.s8\.s8", kernel.asm["ptx"], re.M)),
    )


def _longest_loop(code: list[Instruction]) -> list[str]:
    """The instructions of the longest piece of code that a jump back repeats."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    loops = [
        code[places[jump.target] : place + 1]
        for place, jump in enumerate(code)
        if jump.target is not None and jump.target <= jump.address
    ]
    return [instruction.name for instruction in max(loops, key=len, default=[])]


def _disassemble(cubins: list[bytes], architecture: int) -> None:
    """Learn the machine code of those that are not known, all from one run of the disassembler."""
    new = [cubin for cubin in dict.fromkeys(cubins) if cubin not in _known]
    if not new:
        return
    pieces = list(map(_machine_code, new))
    kind = f"SM{architecture}{'a' if architecture >= 90 else ''}"
    text = _said(b"".join(pieces), knobs.nvidia.nvdisasm.path, "-b", kind)
    instructions = [
        Instruction(int(match[1], 16), match[3], int(jump[1], 16) if (jump := _JUMP.match(match[2])) else None)
        for match in _INSTRUCTION.finditer(text)
    ]
    addresses = [instruction.address for instruction in instructions]
    edges = [bisect.bisect_left(addresses, edge) for edge in itertools.accumulate(map(len, pieces), initial=0)]
    for cubin, (first, last) in zip(new, itertools.pairwise(edges), strict=True):
        _known[cubin] = instructions[first:last]


def _machine_code(cubin: bytes) -> bytes:
    """The only section of an ELF file that has a kernel's instructions."""
    table, entry_bytes, entries, names = (*struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HHH", cubin, 58))
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + entry_bytes * entry) for entry in range(entries)]
    names_at = sections[names][4]
    (code,) = [each for each in sections if cubin.startswith(b".text.", names_at + each[0])]
    return cubin[code[4] : code[4] + code[5]]


def _said(content: bytes, *command: str) -> str:
    """stdout and stderr of a tool of the CUDA tool kit that Triton brings along, of a file that has this content. Kept
    for later runs: the tools of one release say the same of the same bytes."""
    asked = repr((triton.__version__, *command)).encode()
    place = KEPT / hashlib.sha256(hashlib.sha256(asked).digest() + content).hexdigest()
    if place.exists():
        return place.read_text("utf-8")
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    said = done.stdout.replace(file.name, "FILE") + done.stderr
    KEPT.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(f".{os.getpid()}")
    part.write_text(said, "utf-8")
    part.replace(place)
    return said
