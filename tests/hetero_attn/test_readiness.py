"""What is in the way of the GPU lane is named, with the way out, by `doctor` and when a model is loaded."""

from types import SimpleNamespace

import pytest

from hetero_attn.devices import machine, readiness
from hetero_attn.devices.libcuda import CudaError
from hetero_attn.devices.readiness import Obstacle, check_ready, obstacles
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.tools import doctor


def gpu(*capability: int) -> SimpleNamespace:
    return SimpleNamespace(get_device_capability=lambda index: capability, get_device_name=lambda index: "Tesla T4")


@pytest.fixture(autouse=True)
def a_machine_with_nothing_in_the_way(monkeypatch, tmp_path):
    header = tmp_path / "Python.h"
    header.touch()
    monkeypatch.setattr(readiness.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "made" / "yet"))
    monkeypatch.delenv("CC", raising=False)


def found(cuda=None, find=lambda name: "/usr/bin/cc", library=lambda: None) -> list[Obstacle]:
    return list(obstacles(0, cuda or gpu(8, 0), find, library))


def test_nothing_is_in_the_way_of_a_machine_that_has_all() -> None:
    assert found() == []
    assert found(gpu(12, 0)) == []


def test_an_old_gpu_is_refused_by_name_with_what_to_do(monkeypatch) -> None:
    (old,) = found(gpu(7, 5))
    with pytest.raises(UnsupportedModelError, match=r"7.5 of Tesla T4, where the kernels need 8.0 .* device='cpu'"):
        check_ready(0, lambda index: iter([old]))


def test_a_missing_compiler_and_missing_headers_are_said_before_the_first_kernel(tmp_path) -> None:
    (tmp_path / "Python.h").unlink()
    compiler, headers = found(find=lambda name: None)

    assert compiler.name == "C compiler" and "apt install gcc" in compiler.way_out and not compiler.stops
    assert headers.name == "Python headers" and str(tmp_path) in headers.found
    with pytest.warns(UserWarning, match="Triton builds its launchers in C; install one"):
        check_ready(0, lambda index: iter([compiler]))


def test_a_compiler_named_in_cc_is_the_one_that_is_looked_for(monkeypatch) -> None:
    monkeypatch.setenv("CC", "icx")

    assert found(find=lambda name: "/opt/icx" if name == "icx" else None) == []
    assert "none of icx" in found(find=lambda name: None)[0].found


def test_a_kernel_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(readiness.os, "access", lambda folder, mode: False)
    (cache,) = found()

    assert str(tmp_path) in cache.found and "TRITON_CACHE_DIR" in cache.way_out


def test_a_driver_without_memory_operations_is_named() -> None:
    def library():
        raise CudaError("undefined symbol: cuStreamWaitValue32_v2")

    (missing,) = found(library=library)

    assert missing.stops and "cuStreamWaitValue32_v2" in missing.found and "update the NVIDIA driver" in missing.way_out


def test_doctor_shows_what_is_in_the_way(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    things = {
        0: [],
        1: [Obstacle("compute capability", "7.5", "use another GPU", True), Obstacle("C compiler", "no", "a")],
    }
    monkeypatch.setattr(readiness, "obstacles", lambda index: iter(things[index]))
    findings = list(doctor._in_the_way())

    assert [(each.name, each.verdict) for each in findings] == [
        ("cuda:1 compute capability", "problem"),
        ("cuda:1 C compiler", "note"),
    ]


@pytest.mark.parametrize("name,expected", [("NVIDIA H100 80GB HBM3", 300), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 500)])
def test_a_slice_of_a_gpu_is_measured_by_cuda_and_not_by_the_driver_of_the_whole(monkeypatch, name, expected) -> None:
    """The driver counts what every slice of the GPU uses."""
    used = iter([1000, 1300])
    cuda = SimpleNamespace(
        is_initialized=lambda: False,
        device=lambda index: machine.torch.inference_mode(),
        synchronize=lambda: None,
        get_device_name=lambda index: name,
        mem_get_info=lambda: (9500, 10_000),
        memory_reserved=lambda: 0,
    )
    monkeypatch.setattr(machine, "_used_bytes", lambda index: next(used))
    fake = SimpleNamespace(
        cuda=cuda,
        ones=lambda *a, **k: None,
        mm=lambda *a, **k: None,
        bfloat16=None,
        float32=None,
        inference_mode=machine.torch.inference_mode,
    )
    monkeypatch.setattr(machine, "torch", fake)

    assert machine.context_bytes.__wrapped__(0) == expected
