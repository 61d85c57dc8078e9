"""The store of compiled kernels: what is stale, damaged or another kernel's is made again, and nothing is trusted.

The files and folders that it lies in are tests/cpu_kernels/team/test_kernel_files.py's.
"""

import hashlib
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.ahead.builders import build_all
from cpu_kernels.team.object_file import NO_BITS, NOTE, RELOCATIONS, SYMBOLS, UNWIND, ObjectError, check_object
from cpu_kernels.team.store import KernelStore, build_key
from tests.support.kernels.kernel_stores import KERNEL, code_of, entry, norm, start

PACKAGE = Path(__file__).resolve().parents[3] / "cpu_kernels"
FIRST_NUMBER = r"""
import ctypes, sys
from pathlib import Path
from cpu_kernels.team.store import KernelStore, as_function

compiled = []
store = KernelStore(Path(sys.argv[1]), compiled.append)
memory = (ctypes.c_int64 * 1)()
as_function(store.address("corner.number_kernel", "number"))(b"\0" * 8, None, ctypes.addressof(memory), 0)
print(memory[0], *compiled)
"""
NUMBER_KERNEL = """
from ..vectors.scalar import store_i64


def number():
    def kernel(arguments, thread):
        store_i64(thread + {number}, arguments)

    return kernel
"""
LOAD_EVERY_MUTANT = """
import sys, warnings
from pathlib import Path
from cpu_kernels.team.store import KernelStore

warnings.simplefilter("ignore")
loaded = 0
for folder in sorted(Path(sys.argv[1]).iterdir()):
    store = KernelStore(folder)
    print(folder.name, flush=True)
    loaded += store._load("rms_norm") is not None
print("loaded", loaded)
"""


def test_an_edited_kernel_in_a_subfolder_is_built_again(tmp_path):
    """Only the files beside the store were hashed: an edited kernel below them would have run as it was before."""
    shutil.copytree(PACKAGE, tmp_path / "cpu_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    corner = tmp_path / "cpu_kernels" / "corner"
    corner.mkdir()
    (corner / "__init__.py").touch()

    def run(number: int) -> list[str]:
        (corner / "number_kernel.py").write_text(NUMBER_KERNEL.format(number=number))
        command = [sys.executable, "-B", "-c", FIRST_NUMBER, str(tmp_path / "cache")]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert [run(3), run(3), run(4)] == [["3", "number"], ["3"], ["4", "number"]]


CONTENTS = {
    "nothing": lambda store: b"",
    "garbage": lambda store: random.Random(0).randbytes(5000),
    "another kernel": lambda store: code_of(store, "member"),
    "first half": lambda store: code_of(store)[: len(code_of(store)) // 2],
    "another machine": lambda store: code_of(store)[:18] + b"\x28\0" + code_of(store)[20:],
    "calls what is nowhere": lambda store: code_of(store, "member").replace(b"sched_yield\0", b"sched_yielb\0"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="objects of other systems have other forms")
@pytest.mark.parametrize("content", CONTENTS)
def test_an_object_with_a_right_checksum_is_not_executed_unless_it_is_that_kernel(store, content):
    """Content that nobody looked at beyond its checksum ended the process in the loader or in the first call."""
    name = "member" if content.startswith("calls") else KERNEL
    (store / f"{name}.o").write_bytes(entry(name, CONTENTS[content](store)))

    compiled, lines = start(store.parent)

    assert compiled == [name]
    assert len(lines) == 1 and f"{name}.o is not used" in lines[0]
    assert start(store.parent) == ([], [])


def test_a_checksum_of_content_alone_is_not_enough(store):
    """An entry that was renamed, or copied from another build, had a right checksum too."""
    shutil.copy(store / "member.o", store / f"{KERNEL}.o")
    compiled, (line,) = start(store.parent)
    assert compiled == [KERNEL] and "checksum" in line

    code = code_of(store)
    (store / f"{KERNEL}.o").write_bytes(hashlib.sha256(code).digest() + code)

    assert start(store.parent)[0] == [KERNEL]


@pytest.mark.skipif(sys.platform != "linux", reason="objects of other systems have other forms")
def test_no_mutation_of_an_object_ends_the_process(filled, tmp_path):
    """Every field that the loader follows is checked before: bytes of headers and tables changed at random, with a
    right checksum, load or are refused."""
    store, draw = filled / build_key(), random.Random(7)
    code = code_of(store)
    table = int.from_bytes(code[40:48], "little")
    for number in range(300):
        changed = bytearray(code)
        for _ in range(draw.choice((1, 1, 2, 8))):
            place = draw.choice(
                (draw.randrange(64), draw.randrange(table, len(code)), draw.randrange(len(code) // 2, len(code)))
            )
            changed[place] = draw.choice((0, 1, 255, draw.randrange(256), changed[place] ^ 1 << draw.randrange(8)))
        if number % 2:
            section, field = draw.choice(list(sections_of(code))), draw.choice(list(FIELDS))
            change(changed, section, field, draw.choice((0, 1, 2, 3, 4, 8, 9, 24, section.size - 8, section.size + 8)))
        folder = tmp_path / f"{number:03}" / build_key()
        folder.mkdir(mode=0o700, parents=True)
        (folder / f"{KERNEL}.o").write_bytes(entry(KERNEL, bytes(changed)))

    done = subprocess.run([sys.executable, "-c", LOAD_EVERY_MUTANT, str(tmp_path)], capture_output=True, text=True)

    assert done.returncode == 0, f"mutant {done.stdout.split()[-1]} ended the process: {done.stderr[-2000:]}"
    assert int(done.stdout.split()[-1]) > 0, "everything is refused, so nothing was tried"


SMALL_KERNELS = [("small.elementwise_kernel", name) for name in ("rms_norm", "silu_mul")] + [("team.kernel", "drive")]


def test_kernels_that_are_missing_are_compiled_by_several_processes(tmp_path):
    """The first start compiled a dozen kernels one after another on one of the cores."""
    said, store = [], KernelStore(tmp_path)
    store._on_compile = said.append
    kept = tmp_path / build_key()
    build = store._build

    def build_slowly(*kernel: object) -> int:
        """Until another process has compiled one."""
        for _ in range(1200):
            if list(kept.glob("*.o")):
                break
            time.sleep(0.1)
        return build(*kernel)

    store._build = build_slowly
    build_all(store, SMALL_KERNELS, processes=2)

    assert sorted(said) == sorted(name for _, name in SMALL_KERNELS)
    assert sorted(path.stem for path in kept.glob("*.o")) == sorted(said)
    assert len(store._addresses) < len(SMALL_KERNELS), "nothing was compiled elsewhere"
    assert KernelStore(tmp_path, said.append).address(*SMALL_KERNELS[0]) and len(said) == len(SMALL_KERNELS)


@pytest.fixture
def beside(monkeypatch):
    """Kernels are compiled in other processes too, as for a user."""
    monkeypatch.setattr("cpu_kernels.kernels.build_all", build_all)


@pytest.mark.parametrize("executable", ["/bin/false", "/nowhere/python", ""])
def test_without_other_processes_all_kernels_are_compiled_here(tmp_path, monkeypatch, beside, executable):
    monkeypatch.setattr(sys, "executable", executable)
    with CpuKernels(num_threads=2, cache_dir=tmp_path) as ops:
        ops.prepare(lambda: norm(ops))
        x = torch.arange(8.0)[None]

        assert torch.allclose(norm(ops), x / x.pow(2).mean().sqrt())


def test_a_damaged_object_is_said_once_when_kernels_are_prepared(store, beside):
    (store / f"{KERNEL}.o").write_bytes(b"damaged")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with CpuKernels(num_threads=2, cache_dir=store.parent) as ops:
            ops.prepare(lambda: (norm(ops), ops.silu_mul(torch.ones(1, 32), torch.empty(1, 16))))
            norm(ops)
            x, weight, out = torch.arange(8.0)[None], torch.ones(8), torch.empty(1, 8)
            ops.record(lambda: ops.rms_norm(x, weight, 0.0, out)).run()

    assert len(caught) == 1
    assert torch.allclose(out, x / x.pow(2).mean().sqrt())


@pytest.mark.skipif(sys.platform != "linux", reason="objects of other systems have other forms")
def test_a_sound_object_passes_and_a_cut_one_does_not(filled):
    code = code_of(filled / build_key())
    check_object(code, KERNEL, platform.machine(), lambda name: True)

    for length in range(0, len(code), 7):
        with pytest.raises(ObjectError):
            check_object(code[:length], KERNEL, platform.machine(), lambda name: True)


FIELDS = {"kind": (4, 4), "flags": (8, 8), "size": (32, 8), "link": (40, 4), "info": (44, 4), "entry_size": (56, 8)}
# What random mutations found: each ended the process in the loader.
FATAL = {
    "an unwind table without memory": (UNWIND, "flags", lambda was: 0),
    "an unwind table of notes": (UNWIND, "kind", lambda was: NOTE),
    "an unwind table of zeros": (UNWIND, "kind", lambda was: NO_BITS),
    "relocations without symbols": (RELOCATIONS, "link", lambda was: 0),
    "half a relocation": (RELOCATIONS, "size", lambda was: was - 8),
    "half a symbol": (SYMBOLS, "size", lambda was: was - 8),
    "relocations of names": (RELOCATIONS, "info", lambda was: 1),
}


class Place(NamedTuple):
    """A section of an object, and where its entry in the section table begins."""

    at: int
    kind: int
    size: int


def sections_of(code: bytes) -> Iterator[Place]:
    table, count = int.from_bytes(code[40:48], "little"), int.from_bytes(code[60:62], "little")
    for at in range(table, table + 64 * count, 64):
        kind, size = code[at + 4 : at + 8], code[at + 32 : at + 40]
        yield Place(at, int.from_bytes(kind, "little"), int.from_bytes(size, "little"))


def change(code: bytearray, section: Place, field: str, value: int) -> None:
    start, width = FIELDS[field]
    code[section.at + start : section.at + start + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines have other sections")
@pytest.mark.parametrize("case", FATAL)
def test_what_ended_the_process_in_the_loader_is_refused(filled, case):
    kind, field, changed_to = FATAL[case]
    code = code_of(filled / build_key(), "member")
    for section in [section for section in sections_of(code) if section.kind == kind]:
        changed, (start, width) = bytearray(code), FIELDS[field]
        was = int.from_bytes(code[section.at + start : section.at + start + width], "little")
        change(changed, section, field, changed_to(was))

        with pytest.raises(ObjectError):
            check_object(bytes(changed), "member", platform.machine(), lambda name: True)
        check_object(code, "member", platform.machine(), lambda name: True)


def test_where_compiling_is_forbidden_the_error_names_the_variable(tmp_path):
    """numba without its compiler gives plain Python functions, and failed with a typing error of its own."""
    code = f"from cpu_kernels import CpuKernels; from pathlib import Path; CpuKernels(1, cache_dir=Path({str(tmp_path)!r}))"
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)

    assert done.returncode == 1 and "unset it" in done.stderr and "NUMBA_DISABLE_JIT" in done.stderr.splitlines()[-1]
