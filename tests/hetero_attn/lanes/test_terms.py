"""The terms of a step, predicted beside measured: what they count, and that measuring them changes no answer."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from hetero_attn.engine.timed_steps import decode_terms, prefill_terms
from hetero_attn.lanes.stopwatch import Stopwatch, time_recorded
from hetero_attn.llm import LLM
from hetero_attn.tools import bench as benchmark
from hetero_attn.tools.bench import BenchReport, BenchRow
from hetero_attn.tools.drafts.passes import PassTime
from hetero_attn.tools.drafts.report import DraftsReport
from hetero_attn.tools.drafts.runs import DraftsRow
from hetero_attn.tools.terms import Term, compare_terms, term_lines
from placement.plan.columns import Column, fitting_table
from placement.plan.phase import TERMS, PhaseCost
from tests.support.models.runtime import cpu_plan, make_engine, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("terms"), "llama")


@pytest.mark.parametrize("lanes", ["cpu", "emulated"])
def test_taking_a_step_apart_changes_no_answer(path, lanes):
    workload = toy_workload(path, "bf16")
    plan = cpu_plan(workload) if lanes == "cpu" else uniform_plan(workload, 0.25, 0.25, 1, 24)
    engine = make_engine(path, plan)
    try:
        plain, watched = engine.kv_cache.open(), engine.kv_cache.open()
        expected = [engine.prefill(plain, [5, 6, 7]), engine.decode_step([plain], [8])[0].clone()]
        found = [engine.prefill(watched, [5, 6, 7])]
        in_decode = decode_terms(engine, watched, 8)
        found.append(engine.decode_step([watched], [8])[0].clone())
        in_prefill = prefill_terms(engine, watched, [9, 10])
    finally:
        engine.close()

    assert all(torch.equal(left, right) for left, right in zip(expected, found, strict=True))
    lanes_terms = {"gpu_linears", "gpu_attention", "copies", "handovers"} if lanes == "emulated" else set()
    terms = {"cpu_linears", "cpu_attention", "small_ops"} | lanes_terms
    assert {name for name in in_prefill if in_prefill[name] > 0} == terms
    # Replayed, what a kind of work takes is the difference of two replays, and in a toy too little to stand out.
    assert {name for name in in_decode if lanes == "cpu" or name == "small_ops" or in_decode[name] > 0} == terms


def test_older_keys_and_values_of_a_prompt_count_as_copies(path):
    """They were not timed at all: only the staging ring's copies were, and here no weight streams."""
    engine = make_engine(path, uniform_plan(toy_workload(path), gpu=1.0, stream=0.0, gpu_kv_heads=2))
    sequence = engine.kv_cache.open()
    for start in range(0, 48, 16):
        engine.prefill(sequence, range(start, start + 16))
    before = engine.lanes.pages.copied_bytes
    seconds = prefill_terms(engine, sequence, range(16))
    copied_bytes = engine.lanes.pages.copied_bytes - before
    engine.close()

    assert copied_bytes > 0
    assert seconds["copies"] > 0


def test_a_recorded_step_is_replayed_for_each_kind_of_work_alone():
    calls = []

    def replay_of(term):
        calls.append(term)
        return lambda: calls.append(term)

    seconds = time_recorded(replay_of)

    assert {"cpu_linears", "cpu_attention", "small_ops"} == set(seconds)
    assert all(value >= 0 for value in seconds.values()) and {None, *seconds} == set(calls)


def test_a_stopwatch_counts_the_time_of_work_and_returns_its_result():
    watch = Stopwatch()

    assert watch.time("copies", lambda: 7) == 7
    assert watch.seconds["copies"] > 0 and set(watch.seconds) == set(TERMS)


def test_queued_work_counts_as_long_as_the_device_takes_and_no_launch_does():
    """The marks enclose the work alone, behind something that keeps the stream busy."""
    order = []

    def noted(name, result=None):
        return lambda *arguments: order.append(name) or result

    driver = SimpleNamespace(delay=noted("delay"), mark=noted("mark"), seconds_between=noted("between", 0.25))
    device = SimpleNamespace(driver=driver, record=noted("record"), synchronize=noted("synchronize"))
    watch = Stopwatch()

    result = watch.time_queued("gpu_linears", noted("work", 7), device, "compute")

    assert (7, 0.25) == (result, watch.seconds["gpu_linears"])
    assert ["delay", "mark", "work", "mark", "record", "synchronize", "between"] == order


def test_what_no_term_explains_is_python_around_the_step():
    cost = PhaseCost("decode", 1, 0, 1.0, (), (("cpu_linears", 0.5), ("handovers", 0.0), ("step", 0.2)))

    terms = {term.name: term for term in compare_terms(cost, {"cpu_linears": 0.4}, 1.0, 0.0, on_cpu=True)}
    lines = term_lines("tg1", tuple(terms.values()))

    assert pytest.approx((0.6, 0.25)) == (terms["step"].measured_s, terms["cpu_linears"].error)
    assert "handovers" not in terms
    assert "linears on the CPU" in lines[2] and "+25%" in lines[2]
    assert max(map(len, lines)) <= 80


def test_beside_a_gpu_waiting_counts_as_hand_over_and_python_is_unknown():
    cost = PhaseCost("decode", 1, 0, 1.0, (), (("handovers", 0.3), ("step", 0.2)))

    handovers, step = compare_terms(cost, {"handovers": 0.1}, 1.0, 0.05, on_cpu=False)

    assert (pytest.approx(0.15), None, None) == (handovers.measured_s, step.measured_s, step.error)


def test_bench_carries_the_terms_of_every_row(path):
    with LLM(path, device="cpu", max_context=64, num_threads=2, progress=False) as llm:
        report = benchmark.run(llm, prompt_tokens=8, gen_tokens=4, repetitions=1)
    rows = json.loads(json.dumps(report.to_dict()))["rows"]

    for row in rows:
        names = [term["name"] for term in row["terms"]]
        assert {"cpu_linears", "cpu_attention", "small_ops", "step"} == set(names)
        total = sum(term["measured_s"] for term in row["terms"])
        assert total >= 0.99 * (8 if row["name"].startswith("pp") else 1) / row["tokens_per_s"]
    assert "linears on the CPU" in report.table() and "once per step" in report.table()


def test_the_tables_of_bench_cut_no_number_in_a_narrow_terminal():
    """At 80 columns `1601.3` was shown as `1601`, and headings as `tok...`."""
    terms = (Term("cpu_attention", 1.234567, 2.345678, 0.5), Term("step", 0.5, None, 0.25))
    benched = BenchReport(
        "some-model", "bf16", "emulated (hand-over: events)", 16, "a machine of the catalogue",
        (BenchRow("tg128 @ d131072", 16012.34, 15987.65, 16234.56, 16001.23, 10**6, 20123.45, terms, (0.5, 0.4)),),
    )  # fmt: skip
    row = DraftsRow(
        "repeats", "models/tiny-eagle3", 16012.3, 12.34, 11.52, 9, 1, 0.87, 10.01, 15987.6, 11.11, {2: 9}, "", True
    )
    passes = (PassTime(1, 12.34567, 12.34567, 12.0), PassTime(16, 100.0, 100.0, 99.0))
    drafts = DraftsReport("LLM('some-model')", passes, (row, replace(row, drafts="oracle:0.8", tokens_per_s=1.5)))
    least = {"16012.34", "20123.45", "16001.23", "16012.3", "12.34", "10.01", "87%", "tiny-eagle3", "1234.567"}
    whole = least | {"15987.65-16234.56", "16.0", "80%", "11.52", "15987.6"}

    for width, wanted in ((80, least), (120, whole)):
        text = benched.table(width) + drafts.table(width)
        assert wanted <= set(text.split()) and "\u2026" not in text
        assert max(map(len, text.splitlines())) <= width
        assert "an emulated GPU is no GPU" in text
    assert "15987.6" not in drafts.table(80).split(), "what error and tokens/s tell goes first"


def test_names_are_broken_where_nothing_is_left_to_spare_and_numbers_are_not():
    columns = [Column("name", ["some-model-with-a-long-name"], is_name=True), Column("n", ["123456"], spared=1)]
    console = Console(file=io.StringIO(), width=20)
    console.print(fitting_table([*columns, Column("m", ["654321"])], 20))

    assert "654321" in console.file.getvalue() and "12345" not in console.file.getvalue()
    assert "some-model-with-a-long-name" in "".join(console.file.getvalue().replace("654321", "").split())
