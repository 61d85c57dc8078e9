"""How many kernels a layer of a decode step is, launched by the real wrappers on a device that runs none."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without the interpreter", allow_module_level=True)

from gpu_kernels import linear_layer
from gpu_kernels.attention import prefill
from placement.plan.plan import Means, build_plan
from tests.examples.test_benchmarks import load
from tests.support.gpu.silent_triton import silent_triton
from tests.support.models.runtime import uniform_plan

HOME = 10  # norm, qkv, rotation, attention, rounding, o; norm, gate_up, activation, down


def plan_of(gpu, stream):
    def plan(workload):
        plan = uniform_plan(workload, gpu=gpu, stream=stream, gpu_kv_heads=2, gpu_tokens=workload.full_tokens)
        return build_plan(
            workload, plan.linears, plan.kv, Means(device="cuda", gpu_memory_bytes=64 << 20, num_threads=1)
        )

    return plan


@pytest.mark.parametrize("gpu,stream", [(1.0, 0.0), (0.5, 0.5)], ids=["home", "streamed"])
def test_a_layer_of_a_decode_step_is_ten_kernels_and_one_for_each_streamed_piece(gpu, stream, monkeypatch, tmp_path):
    """Thirteen when every linear rounded its input in a launch of its own."""
    monkeypatch.setattr(prefill, "is_hopper", lambda device: True)
    launches, counts = load("simulated.launches"), []
    for layers in (1, 2):
        monkeypatch.setattr(launches, "LAYERS", layers)
        with (
            silent_triton(90) as made,
            launches.silent_products(linear_layer),
            launches.queueing_engine(plan_of(gpu, stream), tmp_path / str(layers)) as engine,
        ):
            sequence = engine.kv_cache.open()
            engine.prefill(sequence, [1] * 3)
            before = made.count
            engine.decode_step([sequence], [1])
            counts.append(made.count - before)
            pieces = sum(each.piece_count(0) for each in engine.weights.layer_linears if each.spec.layer == 0)

    assert counts[1] - counts[0] == HOME + pieces
    assert (pieces > 4) == (stream > 0)
