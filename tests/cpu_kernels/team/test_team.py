"""The thread team, the kernel cache and the choice of instruction set."""

import os
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch

from cpu_kernels import CpuKernels, advise_huge_pages, fresh_memory
from cpu_kernels.small.memory import HUGE_PAGE_BYTES
from cpu_kernels.team.topology import default_threads, physical_cpus
from tests.support.kernels.cpu_oracles import ISAS, kernels, pack


def norm(ops: CpuKernels, rows: int = 8) -> torch.Tensor:
    """A small op's result."""
    out = torch.empty(rows, 64)
    ops.rms_norm(torch.arange(64.0).expand(rows, 64), torch.ones(64), 1e-5, out)
    return out


def test_two_threads_may_call_at_once():
    ops, weight = kernels(), pack(torch.randn(640, 256), "q4")
    x = torch.randn(4, 256)
    expected = torch.empty(4, 640)
    ops.linear(x, weight, "q4", None, expected)
    wrong = []

    def call():
        out = torch.empty(4, 640)
        for _ in range(200):
            ops.linear(x, weight, "q4", None, out)
            if not torch.equal(out, expected):
                wrong.append(out)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert not wrong


def test_ops_alone_share_the_kernels_and_do_not_wait_for_the_team():
    """Threads that pack what they have read would else take turns, with each other and with the team."""
    with CpuKernels(num_threads=2) as ops:
        expected, apart = norm(ops), [ops.alone() for _ in range(2)]
        taken, done, found = threading.Event(), threading.Event(), []

        def hold(store):
            taken.set()
            assert done.wait(30)

        def call(alone):
            found.extend(torch.equal(norm(alone), expected) for _ in range(200))

        callers = [threading.Thread(target=call, args=(alone,)) for alone in apart]
        holder = threading.Thread(target=ops._team.locked, args=(hold,))
        holder.start()
        assert taken.wait(30)
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        done.set()
        holder.join()

        assert found == [True] * 400
        assert [alone.num_threads for alone in apart] == [1, 1]


def test_threads_that_ask_for_a_kernel_at_once_compile_it_once(tmp_path):
    compiled = []
    with CpuKernels(num_threads=1, cache_dir=tmp_path, on_compile=compiled.append) as ops:
        callers = [threading.Thread(target=norm, args=(ops.alone(),)) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

        assert len([name for name in compiled if name.startswith("rms_norm")]) == 1, compiled


def test_an_idle_team_parks_and_wakes():
    with CpuKernels(num_threads=2) as ops:
        expected = norm(ops)
        deadline = time.monotonic() + 20
        while not ops._team._shared.parked and time.monotonic() < deadline:
            time.sleep(0.01)

        assert len(ops._team._shared.parked) == 1
        assert torch.equal(norm(ops), expected)


def test_close_joins_the_members_and_ends_the_ops():
    ops = CpuKernels(num_threads=3)
    norm(ops)
    names = {f"cpu_kernels-{thread}" for thread in (1, 2)}
    before = sum(thread.name in names for thread in threading.enumerate())

    ops.close()
    ops.close()

    assert sum(thread.name in names for thread in threading.enumerate()) == before - 2
    with pytest.raises(RuntimeError, match="closed"):
        norm(ops)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_gets_an_error_and_the_parent_goes_on():
    ops = kernels()
    expected = norm(ops)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            norm(ops)
            os.write(write, b"no error")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)

    assert b"fork" in os.read(read, 1000)
    assert torch.equal(norm(ops), expected)


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_thread_counts(num_threads, pin):
    with CpuKernels(num_threads=num_threads, pin=pin) as ops:
        assert ops.num_threads == num_threads
        assert torch.equal(norm(ops, 64), norm(kernels(), 64))


def test_default_threads_are_usable_cores():
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    assert 1 <= default_threads(physical_cpus()) <= usable


def test_a_quota_of_the_control_group_bounds_the_threads(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/inner")
    (tmp_path / "sys/fs/cgroup/inner").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/inner/cpu.max").write_text("250000 100000")

    assert default_threads([0, 1, 2, 3], tmp_path) == 2
    assert default_threads([0], tmp_path) == 1


def test_isa_is_named_and_unknown_names_list_the_known():
    assert kernels().isa == ISAS[0]
    assert kernels("portable").isa == "portable"
    with pytest.raises(ValueError, match="portable"):
        CpuKernels(isa="avx1024")
    with pytest.raises(ValueError, match="num_threads"):
        CpuKernels(num_threads=0)


def test_compiled_kernels_are_kept_privately_and_damage_is_repaired(tmp_path):
    compiled = []

    def run() -> torch.Tensor:
        with CpuKernels(num_threads=1, cache_dir=tmp_path, on_compile=compiled.append) as ops:
            return norm(ops)

    expected = run()
    directory = next(tmp_path.iterdir())
    entries = {entry.name: entry.read_bytes() for entry in directory.iterdir()}
    assert sorted(entries) == ["drive.o", "member.o", "rms_norm.o"] and len(compiled) == 3
    assert directory.stat().st_mode & 0o777 == 0o700

    assert torch.equal(run(), expected) and len(compiled) == 3

    for damage in (b"", b"x" * 100, entries["rms_norm.o"][:-200], entries["rms_norm.o"][:200] + b"\0" * 300):
        compiled.clear()
        (directory / "rms_norm.o").write_bytes(damage)
        assert torch.equal(run(), expected) and compiled == ["rms_norm"]
        assert (directory / "rms_norm.o").read_bytes()[:32] != damage[:32] or not damage


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no file owners on this platform")
def test_a_directory_that_others_may_write_is_not_used(tmp_path):
    with CpuKernels(num_threads=1, cache_dir=tmp_path) as ops:
        norm(ops)
    directory = next(tmp_path.iterdir())
    directory.chmod(0o777)
    compiled = []

    with CpuKernels(num_threads=1, cache_dir=tmp_path, on_compile=compiled.append) as ops:
        norm(ops)

    assert compiled == ["drive", "member", "rms_norm"]


def test_a_warm_start_imports_no_compiler():
    """numba costs more to import than all kernels to load; only compiling may need it."""
    norm(kernels())
    script = (
        "import sys, torch; before = 'numba' in sys.modules; from cpu_kernels import CpuKernels\n"
        "ops = CpuKernels(num_threads=1); ops.rms_norm(torch.ones(1, 8), torch.ones(8), 0.0, torch.empty(1, 8))\n"
        "ops.close(); print(before, 'numba' in sys.modules)"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)

    before, after = result.stdout.split()
    assert after == before


def test_huge_pages_and_sweep_change_nothing():
    tensor = torch.arange(3 << 20, dtype=torch.int32)
    before = tensor.clone()

    advise_huge_pages(tensor)
    kernels().sweep(tensor)
    kernels().sweep(tensor[:3])

    assert torch.equal(tensor, before)
    assert advise_huge_pages(torch.zeros(4)) is False


@pytest.mark.parametrize("shape", [(0, 64), (3, 5), (1 << 20, 3), ((1 << 20) + 7,)])
def test_fresh_memory_holds_what_is_written_and_begins_on_a_huge_page_where_it_is_large(shape):
    tensor, other = fresh_memory(shape, torch.float32), fresh_memory(shape, torch.float32)
    tensor.fill_(1.5)
    other.fill_(2.5)

    assert tensor.shape == shape and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.nbytes < HUGE_PAGE_BYTES or tensor.data_ptr() % HUGE_PAGE_BYTES == 0
    assert torch.all(tensor == 1.5) and torch.all(other == 2.5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the system's list of mappings")
def test_fresh_memory_is_private_to_the_process():
    """The system gives huge pages to private memory; shared memory, Python's default, took small ones."""
    tensor = fresh_memory((4 << 20,), torch.uint8)

    with open("/proc/self/maps", encoding="utf-8") as lines:
        fields = [line.split() for line in lines]
    ranges = [(*(int(end, 16) for end in field[0].split("-")), field[1]) for field in fields]
    assert ["rw-p"] == [mode for start, stop, mode in ranges if start <= tensor.data_ptr() < stop]


def exported_symbols(code: bytes) -> set[str]:
    """Names that an ELF64 object defines for others: global or weak, in a section of its own."""
    (section_table,) = struct.unpack_from("<Q", code, 40)
    size, count = struct.unpack_from("<HH", code, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, section_table + size * index) for index in range(count)]
    symbols = next(section for section in sections if section[1] == 2)
    names = sections[symbols[6]][4]
    found = set()
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info, _, section = struct.unpack_from("<IBBH", code, at)
        if info >> 4 in (1, 2) and 0 < section < 0xFF00:
            found.add(code[names + name : code.index(b"\0", names + name)].decode())
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF objects")
def test_a_kernel_exports_nothing_but_itself(tmp_path):
    """numba numbers helpers per process: two cached objects exported different helpers under one name, and the loader
    took the first for both, so that a kernel compiled later computed half of its rows."""
    with CpuKernels(num_threads=1, cache_dir=tmp_path) as ops:
        norm(ops)
        ops.silu_mul(torch.zeros(1, 32), torch.empty(1, 16))

    for entry in next(tmp_path.iterdir()).iterdir():
        assert exported_symbols(entry.read_bytes()[32:]) == {entry.stem}
