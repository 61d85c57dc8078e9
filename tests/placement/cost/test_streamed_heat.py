"""Experts that are streamed by heat, as the planner sees them: what a profile says of the rows of either lane."""

from dataclasses import replace

import pytest

from placement.cost.experts import rows_of_lanes
from placement.plan.heat import ExpertHeat
from placement.plan.memory import LinearPlacement
from placement.plan.shards import LinearShard

EXPERTS, ROWS = 8, 512
FIXED = (0.0, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
HEAT = ExpertHeat(FIXED, FIXED, (3, 1, 0, 2, 4, 5, 6, 7))
SHARD = LinearShard(
    "layers.0.experts", "experts", 0, EXPERTS, 1000, 16, 64, 2000, picks=2, same_bits=True, heat=HEAT, block="experts"
)


def placed(stream, gpu=0, slots=0):
    return LinearPlacement(SHARD.name, gpu, (0, 0, 0, 0, stream), EXPERTS, slots)


@pytest.mark.parametrize(
    "shard,placement",
    [
        pytest.param(replace(SHARD, heat=None), placed(4), id="no profile"),
        pytest.param(replace(SHARD, same_bits=False), placed(4), id="a lane of its own by id"),
        pytest.param(SHARD, placed(4, slots=2), id="slots"),
        pytest.param(SHARD, placed(0), id="nothing streamed"),
        pytest.param(SHARD, placed(6, gpu=2), id="all of DRAM streamed"),
    ],
)
def test_an_expert_counts_as_any_where_nothing_is_known(shard, placement):
    assert rows_of_lanes(shard, placement, ROWS) == (ROWS, ROWS)


def test_a_tier_that_streams_nothing_has_no_heat():
    assert rows_of_lanes(SHARD, placed(4), 16) == (16, 16)


@pytest.mark.parametrize("stream,gpu", [(1, 0), (4, 0), (7, 0), (3, 2), (1, 6)])
def test_both_lanes_have_all_rows_together(stream, gpu):
    cpu, on_gpu = rows_of_lanes(SHARD, placed(stream, gpu), ROWS)
    left = EXPERTS - gpu - stream

    assert cpu * left + on_gpu * (EXPERTS - left) == pytest.approx(ROWS * EXPERTS)
    assert cpu < ROWS < on_gpu


def test_half_of_what_the_profile_has_above_chance_is_counted():
    """The four most popular of eight had 80 %, 30 % above chance, so they count as 65 % and the others as 35 %."""
    assert rows_of_lanes(SHARD, placed(4), ROWS) == pytest.approx((0.7 * ROWS, 1.3 * ROWS))
