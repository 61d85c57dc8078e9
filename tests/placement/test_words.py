"""What a plan prints fits 80 columns, with no number cut or parted from its unit, for the widest models there are."""

import re

import pytest

from placement import HardwareProfile, Policy, make_plan
from placement.plan.table import opening_lines
from placement.plan.words import wrapped
from tests.support.planning_models import decoder, llama_8b, with_row_cuts

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


def test_a_line_is_broken_between_words_never_between_a_number_and_its_unit():
    line = "  speeds at 8192: 283.50 MiB + 3.66 GiB, then 12 tokens/s and a-long-word"

    for width in range(30, 80):
        broken = wrapped(line, width).splitlines()
        assert all(len(part) <= width for part in broken)
        assert re.sub(r"\s+", " ", " ".join(broken)) == re.sub(r"\s+", " ", line)
        assert not any(re.search(r"(\d|\d:)$", part) for part in broken), broken
