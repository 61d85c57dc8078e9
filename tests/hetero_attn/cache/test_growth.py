"""A context that grows far beyond what its GPU budget holds stays exact, and the budget holds at every moment."""

from itertools import pairwise

import pytest
import torch

from tests.support.models.runtime import cpu_plan, make_engine, nmse, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint

CONTEXT, CHUNK, CHECKPOINTS = 2048, 32, 20
LENGTHS = (CONTEXT // 2, pytest.param(CONTEXT, marks=pytest.mark.matrix))
LIMITS = {"fp32": 1e-10, "bf16": 1e-4}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    shape = {"layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "hidden": 32, "intermediate": 64}
    return make_checkpoint(tmp_path_factory.mktemp("growth"), "llama", max_position_embeddings=CONTEXT, **shape)


def logits_along(engine, token_ids):
    """Logits of 20 decode steps between the first token and the last, the prompt between them in chunks."""
    places = [1 + round((len(token_ids) - 1) * step / (CHECKPOINTS - 1)) for step in range(CHECKPOINTS)]
    sequence = engine.kv_cache.open()
    rows = [engine.decode_step([sequence], [token_ids[0]])[0].clone()]
    for before, place in pairwise(places):
        for start in range(before, place - 1, engine.prefill_chunk):
            engine.prefill(sequence, token_ids[start : min(start + engine.prefill_chunk, place - 1)])
        rows.append(engine.decode_step([sequence], [token_ids[place - 1]])[0].clone())
    engine.kv_cache.close(sequence)
    return torch.stack(rows)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("weight_dtype", LIMITS)
def test_logits_are_exact_and_the_budget_holds_from_one_token_to_thousands(path, weight_dtype, length):
    token_ids = torch.randint(300, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    workload = toy_workload(path, weight_dtype, max_context=length, max_batch=1, page_size=16, prefill_chunk=CHUNK)
    alone = make_engine(path, cpu_plan(workload))
    expected = logits_along(alone, token_ids)
    alone.close()
    plan = uniform_plan(workload, gpu=0.4, stream=0.3, gpu_kv_heads=1)
    engine = make_engine(path, plan)
    actual = logits_along(engine, token_ids)
    arena = engine.lanes.device.arena
    engine.close()

    assert plan.kv[0].gpu_tokens <= 0.03 * CONTEXT
    assert arena.peak_bytes <= plan.gpu_memory_bytes == arena.budget_bytes
    for place, (row, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert nmse(row, wanted) <= LIMITS[weight_dtype], place
