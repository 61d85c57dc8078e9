"""Keys and values that moved to DRAM: a prompt's chunks stream them to the GPU, a decode step attends them in place."""

from dataclasses import replace

import pytest

from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.pages import runs
from hetero_attn.cache.stream import PageStream
from hetero_attn.devices import Device, EmulatedDriver
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.ops.older_pages import older_blocks
from hetero_attn.ops.step import make_step
from hetero_attn.ops.step_rows import Rows
from placement import HardwareProfile
from placement.cost.attention import attention_cost
from placement.cost.terms import Call
from placement.plan.memory import KvPlacement, LinearPlacement, kv_staging_bytes, kv_staging_pages
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.models.runtime import emulated_plan, make_engine, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint
from tests.support.planning.planning_models import llama_8b

PAGE, CHUNK = 4, 32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("older"), "qwen3", layers=2, sliding_window=24)


def test_a_prompt_streams_what_its_layers_still_see_and_decode_streams_nothing(path):
    workload = toy_workload(path, page_size=PAGE, prefill_chunk=CHUNK, max_batch=1)
    plan = uniform_plan(workload, gpu=1.0, stream=0.0, gpu_kv_heads=2)  # a chunk and a page stay on the GPU
    engine = make_engine(path, plan)
    stream, sequence = engine.lanes.pages, engine.kv_cache.open()
    per_page = PAGE * 2 * workload.kv[0].bytes_per_token
    seen = []
    for start in range(0, 96, CHUNK):
        before = stream.copied_bytes
        engine.prefill(sequence, range(4 + start, 4 + start + CHUNK))
        seen.append((stream.copied_bytes - before) // per_page)
    full, windowed = engine.kv_cache.pools
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

    assert pages * workload.page_size == 512
    assert kv_staging_bytes(workload) == 2 * 512 * 8 * workload.kv[0].bytes_per_token + 4 * 8 * pages
    assert kv_staging_pages(replace(workload, prefill_chunk=16)) == 1


class CountedCopies(EmulatedDriver):
    """Copies are counted and not made, so that no page of a large cache is touched."""

    def __init__(self) -> None:
        self.copies = 0

    def copy(self, target, source, stream) -> None:
        """As a driver copies: of one shape, contiguous or in rows."""
        assert target.shape == source.shape and (target.is_contiguous() or target.dim() == 2)
        self.copies += 1


def queued_for_older_tokens(prompt: int) -> tuple[int, int]:
    """Copies and launches for the older tokens of a prompt to the 8B shape with 2112 of its tokens in GPU memory."""
    workload = replace(llama_8b(context=4352, chunk=1024), max_batch=1)
    linears = [LinearPlacement(s.name, s.units, (0,) * NUM_ROW_TIERS, s.units) for s in workload.linears]
    kv = [KvPlacement(s.name, s.kv_heads, 2112, s.kv_heads) for s in workload.kv]
    device = Device(CountedCopies())
    cache = KVCache(emulated_plan(workload, linears, kv), device)
    pages, lanes = PageStream(device, workload), Lanes(None)
    before, launches, sequence = device.driver.copies, 0, cache.open()
    for _ in range(0, prompt, 1024):
        step = make_step(lanes, cache, [Rows(sequence, range(1024), is_chunk=True)])
        blocks = list(older_blocks(cache, step, pages.block_pages))
        pages.announce(blocks)
        for _ in blocks:
            pages.take()
            pages.give_back()
        launches += 2 * len(blocks)  # attention and merge
        sequence.length += 1024
    return device.driver.copies - before, launches


def test_older_tokens_of_a_long_prompt_cross_the_bus_in_runs():
    """Page by page they were 4928 copies and 768 launches, a quarter of the time of 4096 tokens on an H100."""
    copies, launches = queued_for_older_tokens(4096)

    assert (copies, launches) == (320, 192)


def test_runs_are_broken_where_pages_are_not_neighbours_in_both_stores():
    """Numbers that go up together are one run; a page that goes down, jumps, or goes up on one side only begins
    another."""
    pages = [(4, 0), (5, 1), (6, 3), (7, 4), (2, 5), (1, 6), (1, 7)]

    assert list(runs(pages)) == [((4, 0), 2), ((6, 3), 2), ((2, 5), 1), ((1, 6), 1), ((1, 7), 1)]
    assert list(runs([])) == []


def test_pages_freed_in_any_order_are_taken_in_runs_again(path):
    workload = toy_workload(path, page_size=PAGE, prefill_chunk=CHUNK, max_batch=1)
    store = KVCache(uniform_plan(workload, gpu=1.0, stream=0.0, gpu_kv_heads=2), Device(EmulatedDriver())).pools[0]
    taken = [store.spilled.acquire() for _ in range(6)]
    for page in (taken[3], taken[0], taken[5], taken[1], taken[2], taken[4]):
        store.spilled.free(page)

    assert [store.spilled.acquire() for _ in range(6)] == sorted(taken)


def test_a_chunk_pays_the_bus_and_a_decode_step_the_cpu():
    workload, machine = llama_8b(context=65536), HardwareProfile.named("emulated")
    chunk, step = (
        attention_cost(workload.kv[0], call, 1024, workload, machine, True)
        for call in (Call(1, 512, 16384), Call(1, 1, 16384))
    )

    assert chunk.spilled_s_per_kv_head == 0 and chunk.streamed_bytes_per_kv_head == chunk.spilled_bytes_per_kv_head > 0
    assert step.streamed_bytes_per_kv_head == 0 and step.spilled_s_per_kv_head > 0
    assert step.spilled_bytes_per_kv_head == pytest.approx((16385 - 1024) * workload.kv[0].bytes_per_token)
