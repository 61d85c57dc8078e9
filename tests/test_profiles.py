"""The kept profile of a machine: written whole, recognised as stale, never fatal when damaged. No speed is asserted."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hetero_attn import measure, profiles, runtime_profile
from hetero_attn.planning import machine_profile
from placement import attention_profiler, linear_profiler, profiler, timing
from placement.fingerprint import kernel_folders, machine_fingerprint, source_digest
from placement.hardware import HardwareProfile
from placement.profiler import best_threads, thread_counts
from placement.rates import ThreadRate

PROFILERS = (attention_profiler, linear_profiler, profiler, timing)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A quick measurement: small buffers, few repetitions, kept in a directory of the test's own."""
    for module in (profiles, measure):
        monkeypatch.setattr(module, "profile_path", lambda: tmp_path / "profiles" / "host.json")
    for name, value in {
        "ROW_COUNTS": (1, 8, 65),
        "SWEEP_BYTES": 1 << 20,
        "CACHES": 0,
        "ATTENTION_BYTES": 1 << 20,
        "CACHED_BYTES": 1 << 16,
        "BETWEEN_BYTES": 1 << 16,
        "MANY_WEIGHTS": 1 << 16,
        "HEADS_PER_GROUP": (2,),
        "HEAD_DIMS": (64,),
        "MANY_ROWS": 16,
        "PREFILL_ROWS": 16,
        "SMALL_ROWS": 16,
        "REPETITIONS": 1,
        "CALLS": 10,
    }.items():
        holders = [module for module in PROFILERS if hasattr(module, name)]
        assert holders, f"no profiler has {name}"
        for module in holders:
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(runtime_profile, "STEPS", 3)
    monkeypatch.setattr(runtime_profile, "COLD_STEPS", 1)
    monkeypatch.setattr(runtime_profile, "SWEEP_BYTES", 1 << 20)
    steps = []
    return measure.profile_machine(steps.append), steps


def test_a_measured_profile_is_kept_and_found_again(measured):
    profile, steps = measured

    assert profiles.stored_profile() == profile
    assert {"linear q4, one row", "linear bf16 by rows", "attention over q4, heads of 64"} <= set(steps)
    assert [rate.rows for rate in profile.cpu_rows] == [1, 8, 65]
    attention = profile.cpu_attention
    assert [(rate.bits, rate.heads_per_group) for rate in attention] == [(32, 2), (16, 2), (8.25, 2), (5, 2)]
    assert all(min(rate.bytes_per_s, rate.ops_per_s, rate.cached_bytes_per_s) > 0 for rate in attention)
    assert [rate.threads for rate in profile.thread_sweep][0] == 1
    assert profile.cores in [rate.threads for rate in profile.thread_sweep]
    assert profile.step_overhead_s > 0


def test_the_fingerprint_names_what_the_rates_depend_on(monkeypatch, tmp_path):
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("580.1\n")
    link = tmp_path / "sys/bus/pci/devices/0000:0a:00.0"
    link.mkdir(parents=True)
    (link / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (link / "max_link_width").write_text("16\n")
    card = SimpleNamespace(name="a GPU", total_memory=8, pci_domain_id=0, pci_bus_id=10, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)

    fields = dict(machine_fingerprint(6, tmp_path))

    assert ("a GPU", "580.1", "32.0 GT/s PCIe x16", "6") == tuple(
        fields[key] for key in ("gpu", "driver", "pcie", "cores")
    )
    assert {"cpu", "torch", "numba", "cuda", "gpu_memory"} <= set(fields)


def test_kernels_that_were_changed_make_a_profile_stale(tmp_path):
    assert {"cpu_kernels", "gpu_kernels"} == {folder.name for folder in kernel_folders()}
    (tmp_path / "attention").mkdir()
    digests = {source_digest([tmp_path])}
    for place in ("kernel.py", "attention/kernel.py"):
        for text in ("before", "after"):
            (tmp_path / place).write_text(text)
            digests.add(source_digest([tmp_path]))
    (tmp_path / "attention/kernel.py").rename(tmp_path / "attention/moved.py")

    assert len(digests | {source_digest([tmp_path])}) == 6
    assert dict(machine_fingerprint(1))["kernels"] == source_digest(kernel_folders())


def test_a_profile_of_another_machine_is_not_used(measured):
    profile, _ = measured
    foreign = replace(profile, fingerprint=(("cpu", "another"),))
    profiles.profile_path().write_text(foreign.to_json())

    assert profiles.stored_profile() is None


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"name": 3}', '{"name": "x", "cores": "many"}'])
def test_a_damaged_profile_is_not_used(measured, text):
    profiles.profile_path().write_text(text)

    assert profiles.stored_profile() is None


def test_a_stale_profile_is_measured_again_on_request_and_a_missing_one_is_not(measured, monkeypatch):
    profile, _ = measured
    made = []
    monkeypatch.setattr(measure, "profile_machine", lambda: made.append(1))
    measure.refresh_profile()
    assert not made

    profiles.profile_path().write_text(replace(profile, fingerprint=(("torch", "0.1"),)).to_json())
    with pytest.warns(UserWarning, match="of another machine or version: measuring this machine again"):
        measure.refresh_profile()
    profiles.profile_path().unlink()
    measure.refresh_profile()

    assert [1] == made


def test_planning_never_measures(measured, monkeypatch):
    """A plan was made only after seconds of measuring, unseen, where a kept profile had become stale."""
    profile, _ = measured
    monkeypatch.setattr(measure, "profile_machine", lambda: pytest.fail("planning has measured the machine"))
    profiles.profile_path().write_text(replace(profile, fingerprint=(("torch", "0.1"),)).to_json())

    with pytest.warns(UserWarning, match="is not used; `hetero-attn profile` measures this machine again"):
        used = machine_profile("cpu")

    assert used.name == HardwareProfile.named("generic-cpu").name


def test_a_profile_that_was_kept_before_all_caches_were_measured_is_stale(measured):
    profile, _ = measured
    older = tuple(pair for pair in profile.fingerprint if pair[0] != "measurements")
    profiles.profile_path().write_text(replace(profile, fingerprint=older, cpu_attention=()).to_json())

    assert len(older) + 1 == len(profile.fingerprint)
    assert profiles.stored_profile() is None


def test_without_a_profile_plans_use_the_catalogue(monkeypatch, tmp_path):
    monkeypatch.setattr(profiles, "profile_path", lambda: tmp_path / "none.json")

    assert machine_profile("cpu").name == HardwareProfile.named("generic-cpu").name


def test_thread_counts_are_powers_of_two_and_the_maximum():
    assert thread_counts(1) == (1,)
    assert thread_counts(6) == (1, 2, 4, 6)
    assert thread_counts(16) == (1, 2, 4, 8, 16)


def test_threads_that_slow_the_others_are_left_out_and_idle_memory_leaves_none_out():
    """One row that memory limits is as fast with one thread; prompts are not."""
    slowing = (ThreadRate(1, 10e9, 1.0), ThreadRate(2, 19e9, 1.0), ThreadRate(4, 19.3e9, 1.0), ThreadRate(8, 15e9, 1.0))
    saturated = (ThreadRate(1, 33e9, 1.0), ThreadRate(2, 32.5e9, 1.0))

    assert (best_threads(slowing), best_threads(saturated)) == (4, 2)


@pytest.mark.parametrize("cores,has_gpu,threads", [(16, False, 16), (16, True, 15), (4, True, 3), (2, True, 2)])
def test_a_core_is_left_to_the_thread_that_feeds_a_gpu(monkeypatch, cores, has_gpu, threads):
    monkeypatch.setattr(profiles, "default_threads", lambda cpus: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)

    assert profiles.lane_threads() == threads
