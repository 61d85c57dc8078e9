"""What a plan prints fits 80 columns, with no number cut or parted from its unit, for the widest models there are."""

import re

import pytest

from placement import HardwareProfile, Policy, make_plan
from placement.explain.explain import explain
from placement.plan.table import opening_lines
from placement.plan.words import wrapped
from tests.support.planning.planning_models import decoder, llama_8b, with_row_cuts

SHAPE = {"layers": 126, "hidden": 16384, "intermediate": 53248, "heads": 128, "kv_heads": 8, "head_dim": 128}
WIDEST = with_row_cuts(
    decoder("Llama-3.1-405B-Instruct", **SHAPE, vocab=128256, dtype="q4", context=131072, page_size=64)
)
NARROW = 80


@pytest.mark.parametrize("workload", [WIDEST, llama_8b(dtype="q4", context=131072)], ids=("405b", "8b"))
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_plan_opens_with_four_lines_and_fits_80_columns(workload, device):
    plan = make_plan(workload, HardwareProfile.named("rtx3090-epyc"), Policy(), device=device)
    opening, table = opening_lines(plan), plan.table(NARROW).splitlines()

    assert [line.partition(":")[0] for line in opening] == ["fits", "speed", "where", "to change it"]
    assert [line for line in (*opening, *table) if len(line) > NARROW or "…" in line] == []
    assert [line for line in table if re.match(r"\s*([KMGT]iB|tokens/s)", line)] == []


@pytest.mark.parametrize("width", [80, 98, 100, 110])
def test_at_no_width_is_a_number_cut_and_both_phases_stand_below_each_other(width):
    """Tables of 100 columns cut "640.00 MiB" where sizes were long; at 80 columns the speeds lost their alignment."""
    table = make_plan(WIDEST, HardwareProfile.named("laptop-8gb-ddr5"), Policy(), device="cuda").table(width)
    speeds = re.findall(r"^  (?:decode|prefill) +[\d.]+ tokens/s", table, re.MULTILINE)

    assert "…" not in table and max(map(len, table.splitlines())) <= width
    assert len(speeds) == 2 and len(speeds[0]) == len(speeds[1])


def test_an_explanation_has_rows_of_80_columns():
    machine = HardwareProfile.named("laptop-8gb-ddr5")
    found = explain(llama_8b(), machine, Policy(), device="cuda", gpu_memory_bytes=machine.gpu_memory_bytes // 2)
    rows = [line for line in found.lines() if line.startswith("  ")]

    assert len(rows) > 10 and max(map(len, rows)) <= NARROW


def test_a_plan_that_does_not_fit_does_not_open_with_that_it_fits():
    plan = make_plan(llama_8b(), HardwareProfile.named("generic-cpu"), Policy(), device="cpu")

    assert [opening_lines(plan, fits)[0].partition(":")[0] for fits in (True, False)] == ["fits", "needs"]


def test_a_line_is_broken_between_words_never_between_a_number_and_its_unit():
    line = "  speeds at 8192: 283.50 MiB + 3.66 GiB, then 12 tokens/s and a-long-word"

    for width in range(30, 80):
        broken = wrapped(line, width).splitlines()
        assert all(len(part) <= width for part in broken)
        assert re.sub(r"\s+", " ", " ".join(broken)) == re.sub(r"\s+", " ", line)
        assert not any(re.search(r"(\d|\d:)$", part) for part in broken), broken
