"""What is in the way of the GPU lane is named, with the way out, by `doctor` and when a model is loaded."""

import ctypes
from types import SimpleNamespace

import pytest

from hetero_attn.devices import machine, probes, readiness
from hetero_attn.devices.libcuda import CudaError
from hetero_attn.devices.readiness import Obstacle, check_ready, obstacles
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.tools import gpu_findings


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
    findings = list(gpu_findings._in_the_way())

    assert [(each.name, each.verdict) for each in findings] == [
        ("cuda:1 compute capability", "problem"),
        ("cuda:1 C compiler", "note"),
    ]


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    "name,own,expected",
    [(H100, None, 300), (H100, 120, 120), (f"{H100} MIG 3g.40gb", None, 500), (f"{H100} MIG 3g.40gb", 120, 500)],
)
def test_a_context_is_what_the_driver_counts_of_this_process_or_on_a_slice_what_cuda_counts(
    monkeypatch, name, own, expected
) -> None:
    """The driver counts what every slice of the GPU uses; and other processes may start while this one does."""
    used = iter([1000, 1300])
    cuda = SimpleNamespace(
        is_initialized=lambda: False,
        device=lambda index: machine.torch.inference_mode(),
        synchronize=lambda: None,
        get_device_name=lambda index: name,
        mem_get_info=lambda: (9500, 10_000),
        memory_reserved=lambda: 0,
        get_device_properties=lambda index: SimpleNamespace(uuid="of it"),
    )
    monkeypatch.setattr(machine, "_used_bytes", lambda index: next(used))
    monkeypatch.setattr(machine, "_own_bytes", {"of it": own}.get)
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


class LimitedLibrary:
    """A driver that page-locks up to a limit and whose streams do what a test says with flags."""

    def __init__(self, limit_bytes: int, writes: int | None = 1) -> None:
        self.limit_bytes, self.writes = limit_bytes, writes
        self.locked: dict[int, int] = {}

    def register(self, address: int, count: int) -> bool:
        if sum(self.locked.values()) + count > self.limit_bytes:
            return False
        self.locked[address] = count
        return True

    def unregister(self, address: int) -> None:
        del self.locked[address]

    def device_address(self, address: int) -> int:
        return address

    def write_value(self, stream: int, address: int, value: int) -> None:
        if self.writes is None:
            raise CudaError("cuStreamWriteValue32_v2 failed: CUDA_ERROR_NOT_SUPPORTED (801)")
        ctypes.c_int32.from_address(address).value = self.writes

    def wait_value(self, stream: int, address: int, value: int) -> None:
        assert ctypes.c_int32.from_address(address).value == value


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(probes, "FIRST_STEP_BYTES", 64 << 10)
    monkeypatch.setattr(probes, "LAST_STEP_BYTES", 4 << 10)


@pytest.mark.parametrize("limit_kib,expected", [(1000, (1000, True)), (1 << 20, (1024, False)), (0, (0, True))])
def test_how_much_can_be_page_locked_is_found_in_steps_and_given_back(small_steps, limit_kib, expected) -> None:
    library = LimitedLibrary(limit_kib << 10)

    assert (probes.lockable(library, 1 << 20)) == (expected[0] << 10, expected[1])
    assert library.locked == {}


def test_doctor_says_where_page_locking_ends_and_what_to_do(small_steps) -> None:
    little, enough = (gpu_findings.page_locking(LimitedLibrary(limit), 1 << 20) for limit in (512 << 10, 1 << 30))

    assert enough.verdict == "ok" and "at least" in enough.value
    assert little.verdict == "note" and "more is refused (ulimit -l is" in little.value
    assert all(word in little.advice for word in ("ulimit -l", ".wslconfig", "pinned_memory"))


@pytest.mark.parametrize(
    "library,reason",
    [
        (LimitedLibrary(1 << 20), None),
        (LimitedLibrary(1 << 20, writes=None), "NOT_SUPPORTED"),
        (LimitedLibrary(0), "not one page"),
    ],
    ids=["works", "refused", "nothing locked"],
)
def test_doctor_tries_whether_streams_wait_for_flags(library, reason) -> None:
    found = gpu_findings.memory_operations(library, 1, lambda: None)

    assert (found.verdict == "ok") == (reason is None)
    assert reason is None or (reason in found.value and "by events" in found.advice)
    assert library.locked == {}


def test_a_flag_that_stays_as_it_was_is_no_memory_operation() -> None:
    library = LimitedLibrary(1 << 20)
    library.write_value = lambda stream, address, value: None
    library.wait_value = lambda stream, address, value: None

    assert "holds 0" in probes.why_no_memory_operations(library, 1, lambda: None)


def test_slices_of_a_gpu_are_listed_with_their_own_memory() -> None:
    class NVMLError(Exception):
        pass

    def slice_of(handle, number):
        if number == 1:
            raise NVMLError("no slice here")
        return number

    def nvml(enabled):
        return SimpleNamespace(
            NVMLError=NVMLError,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetMigMode=lambda handle: (enabled, enabled),
            nvmlDeviceGetMaxMigDeviceCount=lambda handle: 3,
            nvmlDeviceGetMigDeviceHandleByIndex=slice_of,
            nvmlDeviceGetMemoryInfo=lambda part: SimpleNamespace(free=9 << 30, total=(10 + part) << 30),
        )

    found = list(gpu_findings._slices(nvml(1), 0))

    assert [each.name for each in found] == ["cuda:0 MIG slice 0", "cuda:0 MIG slice 2"]
    assert "12.0 GiB" in found[1].value
    assert list(gpu_findings._slices(nvml(0), 0)) == []
