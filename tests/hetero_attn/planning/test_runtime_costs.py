"""What the profiler runs to learn what queueing costs: prompts as they are queued, beside steps that wake the CPU team."""

import tempfile

import pytest

from hetero_attn.engine import runtime_costs
from hetero_attn.engine.runtime_costs import AT_HOME, CHUNK, CHUNKS, STREAMED
from hetero_attn.errors import HeteroError
from placement import HardwareProfile
from placement.plan.workload import row_tier

PROFILE = HardwareProfile.named("emulated").with_threads(2)


@pytest.fixture
def toys(tmp_path):
    return {layers: runtime_costs.write_toy(tmp_path / str(layers), layers) for layers in (2, 10)}


@pytest.mark.parametrize("policy,streamed,on_cpu", [(AT_HOME, 0, 0), (STREAMED, 4, 4)], ids=["at home", "streamed"])
def test_toys_queue_four_products_a_layer_or_eight_and_decode_on_the_cpu(toys, policy, streamed, on_cpu):
    with runtime_costs._engine(toys[2], policy, PROFILE, "emulated", None) as engine:
        many, one, layer = row_tier(CHUNK), row_tier(1), [w for w in engine.weights.layer_linears if w.spec.layer == 1]
        pieces = sum(linear.piece_count(many) for linear in layer)
        homes = sum(linear.gpu is not None for linear in layer)
        by_cpu = [sum(linear.has_host_features(tier) for linear in layer) for tier in (many, one)]
        assert (homes, pieces, by_cpu) == (4, streamed, [0, on_cpu])
        assert engine.weights.linear("head").has_host_features(one), "a decode step wakes the team"
        assert engine.prefill_chunk >= CHUNK


def test_where_no_temporary_file_can_be_is_said(tmp_path, monkeypatch):
    """After a minute of measuring, `profile` said that its output could not be written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))

    with pytest.raises(HeteroError, match=r"small models .* temporary files in .*absent .*another folder by TMPDIR"):
        runtime_costs.with_runtime_costs(PROFILE, "cpu")


def test_what_a_layer_and_a_product_add_comes_from_prompts_left_running(toys, monkeypatch):
    """By a clock that knows both: 3 ms a layer and chunk, 0.5 more for each of four products, 7 whatever there is."""
    prompts = []

    def seconds(engine, work, cold=False, before=None):
        sequence = engine.kv_cache.open()
        before(engine, sequence)
        engine.prefill, kept = (lambda *a, logits: prompts.append(logits)), engine.prefill
        work(engine, sequence)
        engine.prefill = kept
        layers = engine.weights.layers
        products = sum(
            linear.piece_count(row_tier(CHUNK)) for linear in engine.weights.layer_linears if linear.spec.layer == 0
        )
        return 7e-3 + CHUNKS * len(layers) * (3e-3 + 0.5e-3 * products)

    monkeypatch.setattr(runtime_costs, "_seconds", seconds)
    costs = runtime_costs.queueing_costs(toys, PROFILE, "emulated", None)

    assert costs == pytest.approx({"gpu_layer_overhead_s": 3e-3, "gpu_product_overhead_s": 0.5e-3})
    assert prompts == [*[False] * (CHUNKS - 1), True] * 4
