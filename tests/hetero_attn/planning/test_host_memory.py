"""Host memory: what does not fit is said before a load, and what runs out all the same has one name and exit code 4.

| situation                                                        | now                                                   |
|------------------------------------------------------------------|-------------------------------------------------------|
| 13 and 18 GB models under an address-space limit, cpu, emulated  | MemoryBudgetError before anything is read              |
| max_context=2**40, max_batch=10**9, page_size=10**9, 10**6 threads | ConfigError: beyond what is allowed, test_arguments.py |
| max_context=2**25 under a limit of 10 GB                         | the model's own limit, or MemoryBudgetError            |
| num_threads that the system refuses                              | MemoryBudgetError, the threads that started are joined |
| plan of a model larger than the machine                          | a note on stderr                                       |
"""

import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cpu_kernels import HUGE_PAGE_BYTES
from cpu_kernels.team.cgroups import cpu_quota, free_memory_bytes, memory_limit_bytes
from hetero_attn import LLM, cli, plan_model
from hetero_attn.cache.pages import host_empty
from hetero_attn.cli import app
from hetero_attn.engine import host_memory
from hetero_attn.engine.host_memory import memory_named, why_too_large
from hetero_attn.errors import MemoryBudgetError, PromptError
from tests.support.models.toy import make_checkpoint

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "examples" / "tiny")
LIMITED = """
import resource, sys
from hetero_attn.cli import main
limit = int(sys.argv.pop(1))
import torch, hetero_attn.llm
from pathlib import Path
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
sys.argv[0] = "hetero-attn"
main()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("memory"), "llama", layers=1)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_weights_larger_than_free_memory_are_refused_before_they_are_read(path, monkeypatch, device):
    plan = plan_model(path, device=device, max_context=64)
    assert why_too_large(plan) == ""
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda root: plan.workload.weight_bytes // 2)
    monkeypatch.setattr("hetero_attn.engine.build.make_lanes", lambda *arguments: pytest.fail("loading has begun"))

    with pytest.raises(
        MemoryBudgetError, match=r"its weights need .* of host memory, and .* are free; use a smaller"
    ) as caught:
        LLM(path, device=device, max_context=64, progress=False)
    assert caught.value.exit_code == 4


def test_an_address_space_too_small_is_said(path, monkeypatch):
    plan = plan_model(path, device="cpu", max_context=512)
    monkeypatch.setattr(host_memory, "free_address_space", lambda: 1000)

    assert "of address space, and the limit of this process leaves 1000 B" in why_too_large(plan)


def test_plan_says_that_a_model_would_not_load(monkeypatch):
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda root: 1000)
    result = CliRunner().invoke(app, ["plan", TINY, "--device", "cpu", "--no-explain"])

    assert result.exit_code == 0 and "note: this would not load now: its weights need" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("limit_mb", [0, pytest.param(8, marks=pytest.mark.matrix), 60])
def test_a_real_limit_ends_in_a_named_error_or_an_answer(limit_mb):
    """OSError 12, MemoryError and a RuntimeError of torch came out before, whatever ran out first."""
    command = ["generate", TINY, "-p", "def", "-n", "2", "--device", "cpu", "--context", "64", "--threads", "1"]
    run = [sys.executable, "-c", LIMITED, str(limit_mb << 20), *command]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)

    assert done.returncode in (0, 4), done.stderr
    assert done.returncode == 0 or done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("error", [MemoryError(), SystemError("error return without exception set")])
def test_memory_that_runs_out_before_a_command_runs_is_said(monkeypatch, capsys, error):
    def fails(**options):
        raise error

    monkeypatch.setattr(cli, "app", fails)
    for of_a_process in ("settle_streams", "leave_quietly", "leave_garbage"):
        monkeypatch.setattr(cli, of_a_process, lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4 and capsys.readouterr().err.startswith("error: memory ran out")


OUT_OF_MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_whatever_runs_out_has_one_name(error):
    with pytest.raises(MemoryBudgetError, match="while loading x"), memory_named("loading x"):
        raise error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "x"), RuntimeError("x"), PromptError("x"), MemoryBudgetError("x")], ids=repr
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, memory_named("loading"):
        raise error
    assert caught.value is error


def test_memory_that_runs_out_while_the_machine_is_measured_is_not_said_of_planning(path, tmp_path, monkeypatch):
    kept = tmp_path / "profile.json"
    kept.write_text("damaged")
    monkeypatch.setattr("hetero_attn.planning.profiles.profile_path", lambda: kept)

    def runs_out(*_, **__):
        raise MemoryError

    monkeypatch.setattr("placement.profilers.cpu.measure", runs_out)
    with (
        pytest.warns(UserWarning, match="measuring this machine again"),
        pytest.raises(MemoryBudgetError, match="memory ran out while measuring this machine"),
    ):
        LLM(path, device="cpu", max_context=64, progress=False)


def threads_but_of_bars() -> set[threading.Thread]:
    """What runs beside tqdm's monitors, of which the first bar of a kind begins one."""
    return {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"}


def test_threads_that_the_system_refuses_leave_none_behind(path, monkeypatch):
    before, start, started = threads_but_of_bars(), threading.Thread.start, []

    def refuse(thread):
        if thread.name.startswith("cpu_kernels"):
            if len(started) == 3:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MemoryBudgetError, match="can't start new thread"):
        LLM(path, device="cpu", num_threads=64, max_context=64, progress=False)

    assert len(started) == 3 and not any(thread.is_alive() for thread in started)
    assert threads_but_of_bars() <= before


@pytest.mark.parametrize(("version", "free"), [(2, 700), (1, 700)])
def test_a_control_group_counts_what_is_used_but_files(tmp_path, version, free):
    line, names = (
        ("0::/g", ("memory.max", "memory.current"))
        if version == 2
        else ("3:memory:/g", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    )
    folder = tmp_path / ("sys/fs/cgroup/g" if version == 2 else "sys/fs/cgroup/memory/g")
    folder.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line)
    for name, text in zip(names, ("1000", "400"), strict=True):
        (folder / name).write_text(text)
    (folder / "memory.stat").write_text("anon 300\ninactive_file 60\nactive_file 40\n")

    assert free_memory_bytes(tmp_path) == free
    assert free_memory_bytes(tmp_path / "nothing") is None
    assert host_memory.free_host_bytes(tmp_path) == free


LINES = [
    "0::/",
    "0::/g",
    "0::/../../g",
    "nonsense",
    "1:cpu:/g",
    "2:memory:/g/h",
    "::",
    "3:name=x:/",
    "4:memory:/a:b",
    "",
]
VALUES = ["", "max", "0", "1000", "-5", "9" * 30, "\u00b2", "1e9", "100000 100000", "max 1", "0 0", "a b c", "1\n2"]
STATISTICS = ["anon 300\ninactive_file 60", "inactive_file x", "a b c", "inactive_file", "active_file 1 2"]
NAMES = ("memory.max", "memory.current", "memory.limit_in_bytes", "memory.usage_in_bytes", "cpu.max", "memory.stat")


@pytest.mark.parametrize("seed", range(40))
def test_files_of_control_groups_that_nobody_expects_are_no_limit(tmp_path, seed):
    """A group with a name that is no UTF-8, a line without colons or a digit of another script ended every command."""
    draw = random.Random(seed)
    (tmp_path / "proc/self").mkdir(parents=True)
    groups = b"\n".join(draw.choice(LINES).encode() + draw.choice([b"", b"\xff"]) for _ in range(4))
    (tmp_path / "proc/self/cgroup").write_bytes(groups)
    for folder in ("", "g", "memory/g", "cpu/g", "g\udcff"):
        place = tmp_path / "sys/fs/cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            (place / name).write_text(draw.choice(STATISTICS if name == "memory.stat" else VALUES))

    for function in (memory_limit_bytes, free_memory_bytes, cpu_quota):
        found = function(tmp_path)
        assert found is None or found >= 0


def test_a_group_whose_name_is_no_text_counts(tmp_path):
    folder = tmp_path / "sys/fs/cgroup/g\udcff"
    folder.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/g\xff")
    (folder / "memory.max").write_text("1000")

    assert memory_limit_bytes(tmp_path) == 1000


def resident_bytes() -> int:
    """What this process holds of the machine's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_first_tokens_of_a_cache_take_no_huge_page_in_every_layer():
    layers = [host_empty((8 << 20,), torch.uint8, "kv") for _ in range(24)]
    before = resident_bytes()
    for pages in layers:
        pages[:2048] = 1
    assert resident_bytes() - before < len(layers) << 18, "of huge pages it would be 2 MiB a layer"


class WithoutHugePages:
    """The C library of a system that was built without them."""

    def __init__(self, *arguments, **options):
        self.madvise = lambda *advice: -1


def test_a_system_without_huge_pages_has_caches_too(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", WithoutHugePages)
    pages = host_empty((3 << 20, 2), torch.float32, "kv")
    pages[-1] = 1.0

    assert pages[-2:].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_a_system_that_knows_no_such_advice_has_caches_too(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.delattr(mmap, "MADV_NOHUGEPAGE", raising=False)
    assert host_empty((3 << 20, 2), torch.float32, "kv").shape == (3 << 20, 2)


def test_a_cache_begins_at_a_huge_page_so_that_advice_is_of_all_of_it():
    assert host_empty((5 << 20,), torch.uint8, "kv").data_ptr() % HUGE_PAGE_BYTES == 0
