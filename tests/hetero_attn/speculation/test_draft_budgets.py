"""The GPU budget of a model that is loaded with a drafter is the budget of both, wherever it is given, told or offered.

The plan, its report, the page's slider and `resize` mean the same bytes.
"""

import re

import httpx
import pytest

from hetero_attn import LLM, Policy
from hetero_attn.errors import MemoryBudgetError
from tests.support.models.eagle import make_head
from tests.support.models.runtime import THREADS
from tests.support.models.toy import make_checkpoint
from tests.support.server.http_server import RunningServer

BUDGET = 900 << 10


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A model, a small one and an EAGLE-3 head of its vocabulary."""
    folder, shape = tmp_path_factory.mktemp("budgets"), {"max_position_embeddings": 64}
    large = make_checkpoint(folder / "large", "qwen3", num_heads=8, num_kv_heads=4, **shape)
    small = make_checkpoint(folder / "small", "llama", layers=1, num_heads=2, hidden=48, **shape)
    return {"large": large, "small": str(small), "head": str(make_head(folder / "head"))}


def load(paths, drafter, **options):
    fixed = {"device": "emulated", "page_size": 4, "num_threads": THREADS, "max_batch": 2, "progress": False}
    given = {"gpu_memory": BUDGET, "elastic": True, "speculate": paths[drafter]} | options
    return LLM(paths["large"], **fixed, **given)


def taken_bytes(llm):
    """GPU memory that both devices have given out."""
    engines = (llm.engine, llm._scheduler.speculator._model.engine)
    return sum(engine.lanes.device.arena.total_bytes for engine in engines)


@pytest.mark.parametrize("drafter", ["small", "head"])
def test_every_budget_that_the_page_offers_is_accepted_and_is_the_one_in_force(paths, drafter):
    """The slider offered the model's share, from which resize took the drafter's once more."""
    with RunningServer(lambda: load(paths, drafter)) as server, httpx.Client(base_url=server.url) as http:
        curve = http.get("/hetero/plan").json()["curve"]
        offered = {point["gpu_memory_bytes"]: point for point in curve if point["why"] is None}
        assert BUDGET in offered and len(offered) > 3 and len(offered) < len(curve)
        for size, point in offered.items():
            assert http.post("/hetero/resize", json={"gpu_memory_bytes": size}).json() == {"gpu_memory_bytes": size}
            report, plan = http.get("/hetero/report").json(), server.llm.plan
            assert report["gpu_memory_bytes"] == size == plan.gpu_memory_bytes
            assert taken_bytes(server.llm) == sum(report["memory"]["gpu"].values()) <= size
            assert report["predicted"]["decode"] == point["decode_tokens_per_s"]
        for point in curve:
            if point["why"] is not None:
                refused = http.post("/hetero/resize", json={"gpu_memory_bytes": point["gpu_memory_bytes"]})
                assert refused.status_code == 400 and refused.json()["error"]["message"] == point["why"]


@pytest.mark.parametrize("drafter", ["small", "head"])
def test_resize_names_the_smallest_whole_budget_and_takes_it(paths, drafter):
    with load(paths, drafter) as llm:
        with pytest.raises(MemoryBudgetError, match=r"drafter \d") as error:
            llm.resize(1000)
        least = int(re.search(r"smallest that works is (\d+) bytes", str(error.value))[1])
        with pytest.raises(MemoryBudgetError):
            llm.resize(least - 1)
        assert llm.plan.gpu_memory_bytes == BUDGET
        assert llm.resize(least).gpu_memory_bytes == least == taken_bytes(llm)
        assert llm.resize(BUDGET).gpu_memory_bytes == BUDGET >= taken_bytes(llm)


def test_a_plan_written_behind_a_resize_is_the_plan_that_is_loaded_from_it(paths):
    with load(paths, "small") as llm:
        llm.resize(BUDGET - (64 << 10))
        written, plan = llm.plan.to_yaml(), llm.plan
    with load(paths, "small", policy=Policy.parse(written), gpu_memory=None, elastic=False) as again:
        assert again.plan.gpu_memory_bytes == plan.gpu_memory_bytes == BUDGET - (64 << 10)
        assert (again.plan.linears, again.plan.memory) == (plan.linears, plan.memory)
