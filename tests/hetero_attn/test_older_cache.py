"""Keys and values that moved to DRAM: a prompt's chunks stream them to the GPU, a decode step attends them in place."""

from dataclasses import replace

import pytest

from placement import HardwareProfile
from placement.cost.terms import Call, attention_cost
from placement.plan.memory import kv_staging_bytes, kv_staging_pages
from tests.support.planning_models import llama_8b
from tests.support.runtime import make_engine, toy_workload, uniform_plan
from tests.support.toy import make_checkpoint

PAGE, CHUNK = 4, 32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("older"), "qwen3", layers=2, sliding_window=24)


def test_a_prompt_streams_what_its_layers_still_see_and_decode_streams_nothing(path):
    workload = toy_workload(path, page_size=PAGE, prefill_chunk=CHUNK, max_batch=1)
    plan = uniform_plan(workload, gpu=1.0, stream=0.0, gpu_groups=2)  # a chunk and a page stay on the GPU
    engine = make_engine(path, plan)
    stream, sequence = engine.lanes.pages, engine.kv_cache.open()
    per_page = PAGE * 2 * workload.kv[0].bytes_per_token
    seen = []
    for start in range(0, 96, CHUNK):
        before = stream.copied_bytes
        engine.prefill(sequence, range(4 + start, 4 + start + CHUNK))
        seen.append((stream.copied_bytes - before) // per_page)
    full, windowed = engine.kv_cache.layer_groups
    before = stream.copied_bytes
    engine.decode_step([sequence], [5])
    engine.close()

    # The chunk [32, 64) sees page 0 to 6 of the older tokens, [64, 96) those up to 14; the window reaches 23 back.
    assert (full.window, windowed.window) == (0, 24)
    assert seen[0] == 0
    assert seen[1] == 7 + 5 and seen[2] == 15 + 5
    assert stream.copied_bytes == before


def test_the_buffers_are_counted_and_small():
    workload = llama_8b(context=65536, chunk=512)
    pages = kv_staging_pages(workload)

    assert pages * workload.page_size == 128
    assert kv_staging_bytes(workload) == 2 * 128 * 8 * workload.kv[0].bytes_per_token + 4 * 8 * pages
    assert kv_staging_pages(replace(workload, prefill_chunk=16)) == 1


def test_a_chunk_pays_the_bus_and_a_decode_step_the_cpu():
    workload, machine = llama_8b(context=65536), HardwareProfile.named("emulated")
    chunk, step = (
        attention_cost(workload.kv[0], call, 1024, workload, machine, True)
        for call in (Call(1, 512, 16384), Call(1, 1, 16384))
    )

    assert chunk.spilled_s_per_group == 0 and chunk.streamed_bytes_per_group == chunk.spilled_bytes_per_group > 0
    assert step.streamed_bytes_per_group == 0 and step.spilled_s_per_group > 0
    assert step.spilled_bytes_per_group == pytest.approx((16385 - 1024) * workload.kv[0].bytes_per_token)
