"""Compile what the wrappers would launch, for any NVIDIA architecture, on a machine without a GPU.

A driver that only names its target stands in for CUDA, a launch becomes a compilation, and the wrappers run on meta
tensors; so dtypes, alignments, integer specialisations, warps and stages are exactly those of a real launch. The cubin
then says what a kernel costs.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

KIB = 1024
SHARED_MEMORY_LIMIT = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)", re.M)

_LABEL = re.compile(r"^\s*(\.L_x_\d+):", re.M)
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


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
    return [_resources(name, kernel) for name, kernel in compiled]


@functools.cache
def _resources(name: str, kernel: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", cubin)
    counts = collections.Counter(_INSTRUCTION.findall(code))

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


def _longest_loop(code: str) -> list[str]:
    """The instructions of the longest piece of code that a jump back repeats."""
    labels = {match.group(1): match.start() for match in _LABEL.finditer(code)}
    loops = [
        code[labels[jump.group(1)] : jump.start()]
        for jump in _JUMP.finditer(code)
        if labels[jump.group(1)] < jump.start()
    ]
    return max(map(_INSTRUCTION.findall, loops), key=len, default=[])


def _output(*command: str | Path) -> str:
    """stdout and stderr of a tool of the CUDA tool kit that Triton brings along."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
