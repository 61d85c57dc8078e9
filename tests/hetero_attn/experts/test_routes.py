"""Routes of a plan beside those of its reference: agreement, gaps, replay, and faults that only they show."""

import pytest
import torch

from cpu_kernels.contract import Scoring
from hetero_attn.engine.build import build_engine
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from hetero_attn.tools import verify
from hetero_attn.tools.forced_runs import forced
from hetero_attn.tools.routes.watch import Routes, agreement, replayed, watched
from placement.machine.hardware import HardwareProfile
from tests.support.models.moe import make_moe
from tests.support.models.runtime import cpu_plan, make_engine, nmse, toy_workload, uniform_plan
from tests.support.planted.planted_experts import Planted, with_router, without_best

TOKENS = torch.randint(307, (24,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_moe(tmp_path_factory.mktemp("moe"), "qwen3_moe")


def report(path, weight_dtype, plan, change=None):
    """`verify` of a plan on the tokens and 4 more; change(engine): a fault that is planted in it."""
    planned = PlannedModel(
        path, ModelConfig.from_dir(path), weight_dtype, plan.device, HardwareProfile.named("emulated"), plan
    )
    engine = build_engine(planned)
    try:
        if change is not None:
            change(engine)
        return verify.compare(planned, engine, TOKENS, 3)
    finally:
        engine.close()


@pytest.mark.table
@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16", "q4"])
@pytest.mark.parametrize("split", [True, False], ids=["three lanes", "cpu"])
def test_a_plan_passes_whatever_near_scores_do(path, weight_dtype, split):
    workload = toy_workload(path, weight_dtype)
    found = report(path, weight_dtype, uniform_plan(workload, 0.3, 0.4, 1) if split else cpu_plan(workload))

    assert found.passed, found.table()
    assert found.routes.agreement > 0.9 and found.routes.wrong == 0
    assert 0 < found.routes.smallest_gap
    assert "of the picks alike" in found.table() and max(map(len, found.table().splitlines())) <= 80
    if weight_dtype == "fp32":
        assert found.routes.agreement == 1 and found.routes.widest_flip == 0


def second_best(engine):
    """A router that leaves out the best expert of the rows."""
    engine.lanes.host_ops = Planted(engine.lanes.host_ops, *with_router(without_best))


def test_a_router_that_chooses_wrongly_does_not_pass(path):
    """The reference's routes are replayed, so nothing else shows it."""
    found = report(path, "fp32", cpu_plan(toy_workload(path)), second_best)

    assert found.routes.wrong > 0 and not found.passed
    assert "NOT COMPUTED BY THEIR BEST" in found.table()
    assert found.nmse <= found.nmse_limit


def test_replayed_routes_are_taken_row_by_row_whatever_the_chunks(path):
    """Chunks of 16 watched, chunks of 5 replayed with every route turned to other experts, and back."""
    engine, small = (make_engine(path, cpu_plan(toy_workload(path, prefill_chunk=size))) for size in (16, 5))
    try:
        own, again = Routes(), Routes()
        with watched(engine, own):
            expected = forced(engine, TOKENS, 4)
        with replayed(small, own):
            same = forced(small, TOKENS, 4)
        turned = Routes(ids=[[(part + 1).remainder(12).sort(-1).values for part in parts] for parts in own.ids])
        with replayed(small, turned):
            other = forced(small, TOKENS, 4)
        with watched(small, again):
            forced(small, TOKENS, 4)
    finally:
        engine.close()
        small.close()

    assert nmse(same, expected) < 1e-11 < 1e-3 < nmse(other, expected)
    assert agreement(again, own).agreement == 1
    assert agreement(turned, own).agreement < 1


def test_what_flips_is_measured_by_the_gap():
    """Three experts of which two are chosen; the second row is decided by 0.01 of about one deviation."""
    x = torch.eye(2)
    router = torch.tensor([[2.0, 1.00], [1.0, 1.01], [0.0, 2.0]])
    mine, other = Routes(), Routes()
    other.add(0, x, router, Scoring(), torch.tensor([[0, 1], [1, 2]]))
    mine.add(0, x, router, Scoring(), torch.tensor([[0, 1], [0, 2]]))
    found = agreement(mine, other)

    assert found.agreement == 0.75 and found.wrong == 1
    assert found.widest_flip == found.smallest_gap == pytest.approx(0.01 / 0.4690, rel=1e-2)


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss", "qwen3_next"])
def test_plans_of_other_scores_pass_too(family, tmp_path):
    """Corrected sigmoids in groups; biases and sinks; layers with a state of fixed size: q8 on three lanes."""
    path = make_moe(tmp_path, family)
    found = report(path, "q8", uniform_plan(toy_workload(path, "q8"), 0.3, 0.4, 1))

    assert found.passed, found.table()
    assert found.routes.agreement > 0.9 and found.routes.wrong == 0
