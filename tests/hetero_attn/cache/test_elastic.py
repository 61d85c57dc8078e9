"""Elastic GPU memory: budgets change while sequences are in flight, and no token, byte or page is lost."""

import random
from dataclasses import replace

import pytest

from hetero_attn import LLM, Policy, SamplingParams
from hetero_attn.engine.replan import Replanner
from hetero_attn.errors import MemoryBudgetError
from placement.machine.hardware import HardwareProfile
from tests.support.models.runtime import THREADS, nmse
from tests.support.models.toy import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
PROMPTS = ["a first prompt that is fairly long, so that pages are spilled", "second", "the third one"]
LARGE, SMALL = "1000KiB", "350KiB"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("elastic"), "llama", layers=2, num_heads=8, num_kv_heads=4, max_position_embeddings=256
    )


EMULATED = replace(HardwareProfile.named("emulated").with_threads(THREADS), staging_piece_bytes=8192)


def load(path, gpu_memory, **options):
    """A toy in pieces of toy size: whole linears of it in every staging slot would take most of these budgets."""
    policy = Policy(prefill_chunk=16)
    options = {"hardware": EMULATED, "policy": policy, "max_batch": 3, "page_size": 4, "elastic": True} | options
    options.setdefault("num_threads", THREADS)
    return LLM(path, dtype="fp32", device="emulated", gpu_memory=gpu_memory, progress=False, **options)


def smallest(llm):
    with pytest.raises(MemoryBudgetError) as error:
        llm.resize("1KiB")
    return int(str(error.value).split("smallest that works is ")[1].split()[0])


def stores(llm):
    return [store for pool in llm.engine.kv_cache.pools for store in pool.stores.values()]


def assert_counts_are_true(llm):
    """What the arena counts is what exists, kind by kind, and no more than the plan said and the budget allows."""
    arena, weights = llm.engine.lanes.device.arena, llm.engine.weights
    used = {kind: count for kind, count in arena.used_bytes.items() if count}
    ring = llm.engine.lanes.ring

    assert used.get("weights", 0) == sum(linear.gpu.nbytes for linear in weights.linears)
    assert used.get("weights", 0) == llm.plan.memory.gpu["weights"]
    assert used.get("staging", 0) == llm.plan.memory.gpu["staging"]
    assert (ring is None) == (llm.plan.memory.gpu["staging"] == 0)
    recent = [pool.recent for pool in llm.engine.kv_cache.pools if pool.recent is not None]
    assert used.get("kv", 0) == sum(pages.nbytes for store in recent for pages in (*store.k, *store.v))
    assert used.get("kv", 0) == llm.plan.memory.gpu["kv"]
    assert arena.total_bytes <= arena.budget_bytes == llm.plan.gpu_memory_bytes
    pinned = llm.engine.lanes.device.pinned.used_bytes
    assert {kind: pinned.get(kind, 0) for kind in llm.plan.memory.pinned} == llm.plan.memory.pinned
    assert llm.plan.memory.pinned["kv"] > 0


def test_a_resize_changes_the_cuts_and_not_the_logits(path):
    token_ids = list(range(4, 100))
    with load(path, LARGE) as llm:
        before, expected = llm.plan, llm.logits(token_ids)
        for budget in (SMALL, smallest(llm), "600KiB", LARGE):
            plan = llm.resize(budget)
            assert_counts_are_true(llm)

            assert nmse(llm.logits(token_ids), expected) <= 1e-11
            assert budget == LARGE or plan.linears != before.linears


def test_tokens_in_flight_are_those_of_a_model_never_resized(path):
    """Three sequences decode together while the budget goes down and up between their tokens."""
    with load(path, LARGE) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
    budgets = {2: SMALL, 6: "500KiB", 9: LARGE, 13: SMALL, 16: "700KiB"}
    with load(path, LARGE) as llm:
        arena, kinds = llm.engine.lanes.device.arena, set()
        requests = [llm.add(prompt, GREEDY) for prompt in PROMPTS]
        for step in range(100):
            if step in budgets:
                arena.peak_bytes = 0
                kept = max(arena.budget_bytes, llm.resize(budgets[step]).gpu_memory_bytes)
                assert arena.peak_bytes <= kept
                assert_counts_are_true(llm)
                kinds |= {store.num_pages for store in stores(llm)}
            llm.step()
            if all(request.finish_reason for request in requests):
                break

        assert [request.output().token_ids for request in requests] == expected
        assert len(kinds) > 2
        llm.engine.kv_cache.forget_prefixes()
        assert all(store.free_pages == store.num_pages for store in stores(llm))


def test_a_stream_goes_on_through_a_resize(path):
    with load(path, LARGE) as llm:
        expected = llm.generate(PROMPTS[0], GREEDY)[0].token_ids
        tokens = []
        for count, piece in enumerate(llm.stream(PROMPTS[0], GREEDY)):
            tokens += piece.token_ids
            llm.resize((SMALL, LARGE)[count % 2])

    assert tuple(tokens) == expected


def test_repeated_resizes_leak_nothing(path):
    generator = random.Random(7)
    with load(path, LARGE) as llm:
        expected, least = llm.generate("leak", GREEDY)[0].token_ids, smallest(llm)
        for _ in range(8):
            llm.resize(generator.randrange(least, 1_100_000))
            assert_counts_are_true(llm)

        assert llm.generate("leak", GREEDY)[0].token_ids == expected
        arena, pinned = llm.engine.lanes.device.arena, llm.engine.lanes.device.pinned
    assert arena.total_bytes == pinned.total_bytes == 0


def test_a_budget_too_small_names_the_smallest_and_changes_nothing(path):
    with load(path, LARGE) as llm:
        plan, expected = llm.plan, llm.generate("small", GREEDY)[0].token_ids
        least = smallest(llm)

        assert llm.plan is plan
        assert llm.engine.lanes.device.arena.budget_bytes == plan.gpu_memory_bytes
        assert llm.generate("small", GREEDY)[0].token_ids == expected
        llm.resize(least)
        with pytest.raises(MemoryBudgetError):
            llm.resize(least - 1)
        assert llm.generate("small", GREEDY)[0].token_ids == expected


@pytest.mark.parametrize("device", ["emulated", "cpu"])
def test_a_rigid_model_says_how_to_load_an_elastic_one(path, device):
    with LLM(path, device=device, gpu_memory=LARGE, progress=False) as llm:
        with pytest.raises(MemoryBudgetError, match="elastic=True"):
            llm.resize(SMALL)


def test_the_cache_takes_memory_from_the_weights_and_gives_it_back(path):
    """On a machine whose CPU attends slowly, weights leave the GPU while a sequence grows and return when it ends.

    Nothing streams: a toy's weights would cross the bus as fast as they are read where they are.
    """
    policy = Policy(prefill_chunk=16, staging_slots=0)
    slow = replace(EMULATED, cpu_attention_bytes_per_s=2e6)
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    with load(path, "600KiB", hardware=slow, policy=policy, elastic=False, max_batch=1) as llm:
        expected = llm.generate("grow", params)[0].token_ids
    with load(path, "600KiB", hardware=slow, policy=policy, max_batch=1) as llm:
        arena, seen = llm.engine.lanes.device.arena, []
        for _ in llm.stream("grow", params):
            seen.append((llm.plan.memory.gpu["kv"], llm.plan.memory.gpu["weights"]))
            assert_counts_are_true(llm)
        tokens = llm.generate("grow", params)[0].token_ids

        assert tokens == expected
        assert seen[-1][0] > seen[0][0] and seen[-1][1] < seen[0][1], seen[:: len(seen) // 5]
        llm.generate("x", SamplingParams(max_tokens=2, ignore_eos=True))
        assert llm.plan.memory.gpu["kv"] < seen[-1][0]
        assert arena.peak_bytes <= arena.budget_bytes


def test_cuda_memory_does_not_grow_beyond_what_was_taken_at_load(path):
    with load(path, SMALL) as llm:
        planned = replace(llm.planned, plan=replace(llm.plan, device="cuda"))
        with pytest.raises(MemoryBudgetError, match="one piece of 350.00 KiB.*load it with that much"):
            Replanner(llm.engine, planned).resize(2**20)
