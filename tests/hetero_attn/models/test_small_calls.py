"""The small operations that a model's blocks declare, which the planner charges, are those that a step calls."""

from collections import Counter

import pytest

from hetero_attn import LLM
from tests.support.models.moe import FAMILIES, make_moe

PRODUCTS = ("expert_linear", "decode_attention")  # which have rates of their own


class CountingOps:
    """The CPU kernels, each call counted."""

    def __init__(self, ops):
        self._ops, self.calls = ops, Counter()

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self._ops, name)


def calls_of_layers(engine):
    """The operations of all layers in a step of one token, by name."""
    counting, layers = CountingOps(engine.lanes.host_ops), engine.forward.layers
    with engine.lanes.using(counting, None, engine.lanes.handover, can_replay=False):
        sequence = engine.kv_cache.open()
        engine.prefill(sequence, [1, 2, 3])
        engine.forward.layers = lambda step: (counting.calls.clear(), layers(step), found.update(counting.calls))
        found = Counter()
        engine.decode_step([sequence], [4])
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_declared_small_operations_are_those_of_a_step(tmp_path, family):
    """Gated DeltaNet declared twelve, one for each of its terms, when it calls three; a shared expert one too many.
    Products with a matrix that is no linear, such as DeltaNet's gates, are small operations."""
    with LLM(make_moe(tmp_path, family), device="cpu", num_threads=1, progress=False, max_context=32) as llm:
        calls, workload = calls_of_layers(llm.engine), llm.plan.workload

    linears = sum(not shard.picks and not shard.is_head for shard in workload.linears)
    assert calls.total() - linears - sum(calls[name] for name in PRODUCTS) == workload.small_calls > 0
