"""The kept profile of a machine: written whole, recognised as stale, never fatal when damaged. No speed is asserted."""

from dataclasses import replace

import pytest

from hetero_attn import profiles
from placement import profiler
from placement.hardware import HardwareProfile
from placement.profiler import ThreadRate, best_threads, thread_counts


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A quick measurement: small buffers, one repetition, kept in a directory of the test's own."""
    monkeypatch.setattr(profiles, "profile_path", lambda: tmp_path / "profiles" / "host.json")
    monkeypatch.setattr(profiler, "MANY_ROWS", 16)
    monkeypatch.setattr(profiler, "SWEEP_BYTES", 1 << 20)
    monkeypatch.setattr(profiler, "CONTEXT", 256)
    monkeypatch.setattr(profiler, "MANY_FEATURES", 64)
    monkeypatch.setattr(profiler, "REPETITIONS", 1)
    steps = []
    return profiles.profile_machine(steps.append), steps


def test_a_measured_profile_is_kept_and_found_again(measured):
    profile, steps = measured

    assert profiles.stored_profile() == profile
    assert profile.fingerprint == profiler.machine_fingerprint()
    assert {"few q4", "many bf16", "decode attention", "prefill attention", "1 threads"} <= set(steps)


def test_a_profile_of_another_machine_is_not_used(measured):
    profile, _ = measured
    foreign = replace(profile, fingerprint=(("cpu", "another"),))
    profiles.profile_path().write_text(foreign.to_json())

    assert profiles.stored_profile() is None


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"name": 3}', '{"name": "x", "cores": "many"}'])
def test_a_damaged_profile_is_not_used(measured, text):
    profiles.profile_path().write_text(text)

    assert profiles.stored_profile() is None


def test_without_a_profile_plans_use_the_catalogue(monkeypatch, tmp_path):
    monkeypatch.setattr(profiles, "profile_path", lambda: tmp_path / "none.json")
    from hetero_attn.planning import machine_profile

    assert machine_profile("cpu").name == HardwareProfile.named("generic-cpu").name


def test_thread_counts_are_powers_of_two_and_the_maximum():
    assert thread_counts(1) == (1,)
    assert thread_counts(6) == (1, 2, 4, 6)
    assert thread_counts(16) == (1, 2, 4, 8, 16)


def test_a_thread_that_gains_nothing_is_left_out():
    sweep = (ThreadRate(1, 10e9, 1.0), ThreadRate(2, 19e9, 1.0), ThreadRate(4, 19.3e9, 1.0), ThreadRate(8, 15e9, 1.0))

    assert best_threads(sweep) == 2
