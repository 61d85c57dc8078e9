"""`profile` and `doctor`: what they say of a machine, and what they read of it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hetero_attn
import hetero_attn.tools
from cpu_kernels.team.cgroups import cpu_quota, memory_limit_bytes
from hetero_attn.tools import doctor
from placement import HardwareProfile
from tests.support.processes.command import TINY, run


def test_profile_prints_rates_with_units(measured: HardwareProfile) -> None:
    result = run("profile")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]

    assert (result.exit_code, lines[0]) == (0, "imagined (measured)")
    assert f"copy to the GPU {measured.h2d_bytes_per_s / 1e9:.1f} GB/s" in lines


def test_profile_for_a_model_asks_for_the_formats_of_its_weights_and_its_cache(monkeypatch, tmp_path: Path) -> None:
    asked: list[tuple[tuple, tuple]] = []
    profile = HardwareProfile.named("generic-cpu")
    monkeypatch.setitem(
        vars(hetero_attn), "profile_machine", lambda formats, caches, **_: asked.append((formats, caches)) or profile
    )
    written = run("quantize", TINY, "--recipe", "q4_m", "--out", str(tmp_path / "model.gguf"))
    results = [run("profile", "--for", str(tmp_path / "model.gguf")), run("profile")]

    assert [result.exit_code for result in (written, *results)] == [0, 0, 0]
    assert set(asked[0][0]) >= {"iq4_xs", "q6_k"} and asked[0][1] == (("bf16", 2, 32),)
    assert asked[1] == ((), ())


def test_profile_without_a_gpu_has_no_gpu_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = HardwareProfile.named("generic-cpu")
    monkeypatch.setitem(vars(hetero_attn), "profile_machine", lambda **_: profile)
    lines = run("profile").stdout.splitlines()

    assert lines[-1] == "no GPU was found: the plan uses the CPU lane only"
    assert not any("GPU" in line for line in lines[:-1])


def test_saved_profile_is_a_machine_to_plan_for(measured: HardwareProfile, tmp_path: Path) -> None:
    file, picture = tmp_path / "machine.json", tmp_path / "machine.png"
    result = run("profile", "--save", str(file), "--plot", str(picture), "--json")
    wishes = ("--device", "emulated", "--gpu-memory", "12MiB", "--no-explain", "--json")
    planned = run("plan", TINY, "--hardware", str(file), *wishes)

    assert HardwareProfile.from_dict(json.loads(result.stdout)) == measured
    assert json.loads(planned.stdout)["predicted"]["hardware"] == "imagined"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_file_that_is_no_profile_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text("rates: 3")
    result = run("plan", TINY, "--hardware", str(tmp_path / "machine.json"))

    assert result.exit_code == 2
    assert "hetero-attn profile --save" in " ".join(result.stderr.replace("│", " ").split())


def test_doctor_is_ready_here_and_says_so_twice() -> None:
    table, machine = run("doctor"), json.loads(run("doctor", "--json").stdout)

    assert (table.exit_code, machine["usable"]) == (0, True)
    assert "verdict: ready" in table.stdout
    assert set(machine["sections"]) == {"versions", "cpu", "memory", "gpu", "settings", "caches", "threads"}


def test_doctor_says_what_to_do_about_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("a-package-that-nobody-wrote",))
    result = run("doctor")

    assert result.exit_code == 5
    assert "verdict: not ready, 1 problem(s)" in result.stdout
    assert "pip install a-package-that-nobody-wrote" in result.stdout


def test_doctor_reports_a_gpu_with_half_of_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlSystemGetDriverVersion=lambda: "600.1",
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "Imagined GPU",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=6 * 2**30, total=8 * 2**30),
        nvmlDeviceGetMaxPcieLinkGeneration=lambda handle: 4,
        nvmlDeviceGetCurrPcieLinkWidth=lambda handle: 8,
        nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 16,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    card, torch_build = doctor.gpus()

    assert card.value == "Imagined GPU, 6.0 GiB free of 8.0 GiB, driver 600.1, PCIe 4.0 x8"
    assert (card.verdict, "x8 of x16" in card.advice) == ("note", True)
    assert torch_build.name == "torch"


def machine_with(root: Path, files: dict[str, str]) -> Path:
    """Lay out files of /proc and /sys below `root`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_limits_of_cgroup_version_2_count_from_the_group_and_its_parents(tmp_path: Path) -> None:
    root = machine_with(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": "4294967296\n",
            "sys/fs/cgroup/pod/container/cpu.max": "150000 100000\n",
        },
    )

    assert (memory_limit_bytes(root), cpu_quota(root)) == (4 * 2**30, 1.5)


def test_limits_of_cgroup_version_1_ignore_the_number_for_none(tmp_path: Path) -> None:
    root = machine_with(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/job\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1073741824\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
    )

    assert (memory_limit_bytes(root), cpu_quota(root)) == (2**30, None)


def test_doctor_reads_limits_and_huge_pages_of_the_machine(tmp_path: Path) -> None:
    root = machine_with(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/cpuinfo": "processor : 0\nmodel name : Imagined CPU\n",
            "sys/fs/cgroup/memory.max": str(2**29),
            "sys/fs/cgroup/cpu.max": "50000 100000",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
        },
    )
    notes = {item.name: item for item in doctor.examine(root).findings if item.verdict == "note"}

    assert {"cgroup limit", "cgroup quota", "transparent huge pages"} <= set(notes)
    assert notes["cgroup limit"].value == "0.5 GiB"
    assert doctor.examine(tmp_path / "nothing").usable
