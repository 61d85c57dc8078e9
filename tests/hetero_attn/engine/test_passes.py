"""What a pass over the layers costs in Python: how often it calls, and what it does not make anew."""

import cProfile
import pstats

import pytest

from hetero_attn.engine.engine import Engine
from hetero_attn.models.block import Norm
from tests.support.models.runtime import cpu_plan, make_engine, toy_workload
from tests.support.models.toy import make_checkpoint

ROWS, FEW, MANY = 12, 2, 6
# Python and built-in functions called a layer and pass with one CPU lane, of which the kernels' calls are 7.
MOST_CALLS = 720


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[int, Engine]:
    """By layers; each has run prompts of so many rows."""
    made = {}
    for layers in (FEW, MANY):
        path = make_checkpoint(tmp_path_factory.mktemp("toy"), layers=layers)
        made[layers] = make_engine(path, cpu_plan(toy_workload(path)))
        for _ in range(2):
            prompt(made[layers])
    return made


def prompt(engine: Engine, profile: cProfile.Profile | None = None) -> None:
    sequence = engine.kv_cache.open()
    if profile is not None:
        profile.enable()
    engine.prefill(sequence, [7] * ROWS)
    if profile is not None:
        profile.disable()
    engine.kv_cache.close(sequence)


def calls(engine: Engine) -> int:
    profile = cProfile.Profile()
    prompt(engine, profile)
    return pstats.Stats(profile).total_calls


def test_a_layer_of_a_prompt_calls_no_more_than_it_did(engines):
    """A toy's prompt waits for Python: every view, norm or check that is made anew for each block shows here."""
    a_layer = (calls(engines[MANY]) - calls(engines[FEW])) / (MANY - FEW)

    assert a_layer <= MOST_CALLS


def test_steps_of_as_many_rows_use_the_same_views(engines):
    work = engines[FEW].forward.work
    part = work.rows(0, ROWS)

    assert work.rows(0, ROWS) is part and part.of("query", 16) is part.of("query", 16)
    assert part.of("query", 16).main.shape == (ROWS, 16)
    assert work.rows(0, ROWS - 1) is not part and work.rows(1, ROWS).residual.main.shape[0] == ROWS - 1


def test_a_workspace_keeps_the_views_of_few_sizes(engines):
    work = engines[FEW].forward.work
    first = work.rows(0, 1)
    for rows in range(2, 8):
        work.rows(0, rows)

    assert work.rows(0, 1) is not first


def test_a_block_makes_its_norm_once(engines):
    weights = engines[FEW].weights.layers[0][0]
    config = engines[FEW].weights.spec.layers[0][0]._config

    assert Norm.of(config, weights) is Norm.of(config, weights)
