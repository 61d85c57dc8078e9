"""The kept profile of a machine: written whole, recognised as stale, never fatal when damaged. No speed is asserted."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cpu_kernels import kernels
from cpu_kernels.formats.weights import WEIGHT_DTYPES
from hetero_attn.engine import measure
from hetero_attn.engine import runtime_costs as runtime_profile
from hetero_attn.planning import profiles
from placement import Policy
from placement.explain.explain import explain
from placement.machine.fingerprint import kernel_folders, machine_fingerprint, source_digest
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import ThreadRate
from placement.profilers import (
    ahead,
    neighbours,
    timing,
)
from placement.profilers import (
    cpu as profiler,
)
from placement.profilers import (
    cpu_attention as attention_profiler,
)
from placement.profilers import (
    cpu_linear as linear_profiler,
)
from placement.profilers import (
    cpu_small as small_profiler,
)
from placement.profilers.cpu import best_threads, thread_counts
from tests.support.planning.planning_models import tiny

PROFILERS = (ahead, attention_profiler, linear_profiler, small_profiler, profiler, timing)
ALONE = SimpleNamespace(share=lambda: 0.0)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Measurements are quick, of small buffers and few repetitions, on a machine that nobody else uses, and kept in a
    directory of the test's own."""
    monkeypatch.setattr(neighbours, "Neighbours", lambda: ALONE)
    monkeypatch.setattr(profiles, "profile_path", lambda: tmp_path / "profiles" / "host.json")
    for name, value in {
        "ROW_COUNTS": (1, 8, 65),
        "SWEEP_BYTES": 1 << 20,
        "CACHES": 0,
        "ATTENTION_BYTES": 1 << 20,
        "CACHED_BYTES": 1 << 18,
        "BETWEEN_BYTES": 1 << 16,
        "MANY_WEIGHTS": 1 << 16,
        "SHAPES": dict.fromkeys(("bf16", "q8", "q4"), ((4, 64),)),
        "MANY_ROWS": 16,
        "PREFILL_ROWS": 16,
        "SMALL_ROWS": 16,
        "REPETITIONS": 1,
        "MANY_REPETITIONS": 1,
        "CALLS": 10,
    }.items():
        holders = [module for module in PROFILERS if hasattr(module, name)]
        assert holders, f"no profiler has {name}"
        for module in holders:
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(runtime_profile, "STEPS", 3)
    monkeypatch.setattr(runtime_profile, "COLD_STEPS", 1)
    monkeypatch.setattr(runtime_profile, "SWEEP_BYTES", 1 << 20)


@pytest.fixture
def measured(quick):
    """A quick measurement and its progress."""
    steps = []
    return measure.profile_machine(steps.append), steps


def test_a_measured_profile_is_kept_and_found_again(measured):
    profile, steps = measured

    assert profiles.stored_profile() == profile
    assert {"linear q4, one row", "linear bf16 by rows", "attention over q4, heads of 64"} <= set(steps)
    assert [rate.rows for rate in profile.cpu_rows] == [1, 8, 65]
    attention = profile.cpu_attention
    assert [(rate.bits, rate.heads_per_group) for rate in attention] == [(16, 4), (8.25, 4), (5, 4)]
    assert all(min(rate.bytes_per_s, rate.ops_per_s, rate.cached_bytes_per_s) > 0 for rate in attention)
    assert [rate.threads for rate in profile.thread_sweep][0] == 1
    assert profile.cores in [rate.threads for rate in profile.thread_sweep]
    assert profile.step_overhead_s > 0


def test_formats_that_are_asked_for_are_measured_beside_those_of_every_profile(quick):
    profile = measure.profile_machine(formats=("q4_0", "q8"))

    assert profiles.stored_profile() == profile
    for rates in (profile.cpu_linear_bytes_per_s, profile.cpu_ops_per_s, profile.cpu_rows[-1].ops_per_s):
        assert [*rates.by_format] == ["fp32", "bf16", "q8", "q4", "q4_0"]
        assert rates.of("q4_0") > 0 and rates.stands_for("q4_1") == "q4"
    assert profile.cpu_cached_bytes_per_s.stands_for("q4_0") == "q4_0"


def test_caches_that_are_asked_for_are_measured_beside_those_of_every_profile(quick):
    """A cache in fp32, and heads of which none shares K and V; a profile has no kernel of theirs else."""
    profile = measure.profile_machine(caches=(("q8", 1, 64), ("q8", 4, 64), ("fp32", 2, 64)))
    shapes = [(rate.bits, rate.heads_per_group) for rate in profile.cpu_attention]

    assert shapes == [(16, 4), (8.25, 4), (8.25, 1), (5, 4), (32, 2)]


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


def test_sources_and_versions_are_read_once_a_process(monkeypatch):
    """Every load asks for them, some twice: it was a quarter of a small model's."""
    known = machine_fingerprint(1)
    monkeypatch.setattr("placement.machine.fingerprint.source_digest", lambda folders: pytest.fail("read again"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail("asked again"))

    assert machine_fingerprint(1) == known


def test_nothing_is_left_to_compile_when_measuring_begins(quick, monkeypatch, tmp_path):
    """One by one, by the measurement that needed it, compiling took three quarters of a profile's time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepared, asked = set(), set()
    monkeypatch.setattr(kernels, "build_all", lambda store, missing, processes: prepared.update(missing))
    with kernels.CpuKernels(1) as ops:
        ops.prepare(lambda: ahead.call_all(ops, WEIGHT_DTYPES))
        asked.update(ops._team.missing(lambda: measured_calls(ops)))

    assert prepared >= asked and {"decode", "prefill", "linear_q", "rope_append"} <= {key[1] for key in asked}


def measured_calls(ops):
    """Some of the calls that the measurements make, with the sizes that they have there."""
    memory = timing.host_memory(linear_profiler.SWEEP_BYTES)
    for kv_dtype, shapes in attention_profiler.SHAPES.items():
        for heads, head_dim in shapes:
            pages = attention_profiler.kv_pages(kv_dtype, head_dim, memory)
            attention_profiler.decode_call(ops, pages, heads, head_dim)()
            pages = attention_profiler.pages_of_many(kv_dtype, head_dim, memory)
            attention_profiler.prefill_call(ops, pages, attention_profiler.PREFILL_HEADS, head_dim, 64, 64)()
    for dtype in ("fp32", "bf16", "q8", "q4"):
        for rows in linear_profiler.ROW_COUNTS:
            weight = linear_profiler.packed(dtype, memory)
            linear_profiler.linear_call(ops, weight, dtype, rows)()
    for call in small_profiler.small_calls(ops, small_profiler.SMALL_ROWS)[0]:
        call()


def test_of_calls_that_another_program_delays_the_shortest_counts(monkeypatch):
    clock = iter([0, 5, 5, 6, 6, 13])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    assert timing.least_seconds(lambda: None) == 1


@pytest.mark.parametrize("taken_s,parts", [(0.001, 1), (0.006, 2), (0.011, 4), (10.0, 8)])
def test_a_call_that_takes_long_is_made_over_a_part_of_its_memory(monkeypatch, taken_s, parts):
    """Of an eighth; parts take PART_SECONDS or longer, and there are at most MOST_PARTS."""
    clock = iter([0.0, taken_s])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    assert timing.parts_for(lambda: None) == parts
    assert parts == 1 or timing.MOST_PARTS * taken_s / parts >= timing.PART_SECONDS


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_parts_come_in_turn_and_the_yardstick_is_half_a_turn_ahead(parts):
    """So that neither finds in a cache what the other has just read."""
    memory, read = timing.host_memory(1 << 20), []
    weight, pages = linear_profiler.packed("bf16", memory), attention_profiler.kv_pages("bf16", 64, memory)
    blocks = [part.data_ptr() for part in linear_profiler.cut(weight, parts)]
    of_pages = attention_profiler.cut_pages(pages, parts)
    work, yardstick = (timing.in_rotation([partial(read.append, at) for at in blocks], k) for k in (0, parts // 2))
    for _ in range(2 * parts):
        work()
        yardstick()

    assert read[::2] == 2 * blocks and read[1::2] == 2 * (blocks[parts // 2 :] + blocks[: parts // 2])
    assert len({k.data_ptr() for k, _, _ in of_pages} | {v.data_ptr() for _, v, _ in of_pages}) == 2 * len(of_pages)
    assert all(int(table.max()) + 1 == len(k) == len(v) for k, v, table in of_pages)


@pytest.mark.parametrize("repetitions,times", [(None, 4), (2, 2)])
def test_a_measurement_ends_after_a_while_but_not_before_some_repetitions(monkeypatch, repetitions, times):
    """On a slow machine nine repetitions of everything took minutes."""
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    assert timing.seconds(lambda: calls.append(1), repetitions) == 1.0
    assert len(calls) == 1 + min(times, timing.LEAST_REPETITIONS)
    assert len(timing.turns(lambda: None, lambda: None)) == 2 * timing.LEAST_REPETITIONS


class FakeSystem:
    """Stands in for psutil and the clock: on four CPUs this process and its children use one, others `others`."""

    def __init__(self, others, steal=0.0):
        self.others, self.steal, self.now = others, steal, 100.0

    def perf_counter(self):
        self.now += 10.0
        return self.now

    def cpu_count(self):
        return 4

    def cpu_times(self):
        own, others = self.now, self.others * self.now
        times = {
            "user": own + others,
            "system": 0.0,
            "idle": 99 * self.now,
            "iowait": 9.0,
            "steal": self.steal * self.now,
        }
        return SimpleNamespace(_asdict=lambda: times)

    def Process(self):
        half = self.now / 2
        times = SimpleNamespace(user=half, system=0.0, children_user=half / 2, children_system=half / 2)
        return SimpleNamespace(cpu_times=lambda: times)


@pytest.mark.parametrize(
    "others,steal,share", [(0.0, 0.0, 0.0), (2.0, 0.0, 0.5), (1.0, 1.0, 0.5), (9.0, 0.0, 1.0), (-3.0, 0.0, 0.0)]
)
def test_what_others_use_of_the_cpus_is_known(monkeypatch, others, steal, share):
    system = FakeSystem(others, steal)
    monkeypatch.setattr(neighbours, "psutil", system)
    monkeypatch.setattr(neighbours, "time", system)

    assert neighbours.Neighbours().share() == pytest.approx(share)


def test_a_profile_of_a_busy_machine_says_so_and_is_not_kept_unless_asked(quick, monkeypatch):
    """Half the rates were kept without a word, and every plan after them was wrong."""
    monkeypatch.setattr(neighbours, "Neighbours", lambda: SimpleNamespace(share=lambda: 0.43))
    monkeypatch.setattr(profiler, "measure", lambda *_, **__: HardwareProfile.named("generic-cpu"))
    monkeypatch.setattr(runtime_profile, "with_runtime_costs", lambda profile, device: profile)
    with pytest.warns(UserWarning, match=r"other programs used 43% of the CPUs .* not kept: .*--keep"):
        profile = measure.profile_machine()

    assert not profiles.is_kept() and profile.busy_share == 0.43
    with pytest.warns(UserWarning, match="43% of the CPUs .* kept all the same"):
        measure.profile_machine(keep_when_busy=True)
    assert profiles.is_kept()


def test_a_profile_of_another_machine_is_not_used(measured):
    profile, _ = measured
    foreign = replace(profile, fingerprint=(("cpu", "another"),))
    profiles.profile_path().write_text(foreign.to_json())

    assert profiles.stored_profile() is None


def test_a_stale_profile_is_measured_again_on_request_and_a_missing_one_is_not(measured, monkeypatch):
    profile, _ = measured
    made = []
    monkeypatch.setattr(measure, "profile_machine", lambda **_: made.append(1))
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
    monkeypatch.setattr(measure, "profile_machine", lambda **_: pytest.fail("planning has measured the machine"))
    profiles.profile_path().write_text(replace(profile, fingerprint=(("torch", "0.1"),)).to_json())

    with pytest.warns(UserWarning, match="is not used; `hetero-attn profile` measures this machine again"):
        used = profiles.machine_profile("cpu")

    assert used.source.startswith("not measured but those of generic-cpu, ")


def test_a_profile_that_was_kept_before_all_caches_were_measured_is_stale(measured):
    profile, _ = measured
    older = tuple(pair for pair in profile.fingerprint if pair[0] != "measurements")
    profiles.profile_path().write_text(replace(profile, fingerprint=older, cpu_attention=()).to_json())

    assert len(older) + 1 == len(profile.fingerprint)
    assert profiles.stored_profile() is None


def test_without_a_profile_plans_use_the_catalogue_and_call_the_machine_what_its_user_does(monkeypatch, tmp_path):
    """An explanation said that generic-cpu had too little memory, of a machine that nobody had named so."""
    monkeypatch.setattr(profiles, "profile_path", lambda: tmp_path / "none.json")
    machine, stand_in = profiles.machine_profile("cpu"), HardwareProfile.named("generic-cpu")
    found = explain(replace(tiny(), embed_bytes=1 << 50), machine, Policy(), device="cpu")

    assert machine.cpu_ops_per_s == stand_in.with_threads(machine.cores).cpu_ops_per_s
    assert found.plan.predicted.hardware == "this machine"
    rates, memory = found.notes
    assert rates.startswith(f"The rates of this machine are not measured but those of generic-cpu, {stand_in.source}")
    assert "of host memory; this machine has " in memory


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
