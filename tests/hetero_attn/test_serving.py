"""Prompts that begin alike, requests that come and go, and pages reserved in advance: same tokens, less work."""

import pytest

from hetero_attn import LLM, Policy, SamplingParams, plan_model
from hetero_attn.errors import ConfigError, MemoryBudgetError
from tests.support.runtime import THREADS, nmse
from tests.support.toy import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SYSTEM = [4 + (7 * position) % 300 for position in range(40)]
PROMPTS = [[*SYSTEM, 9, 8], [*SYSTEM, 20], [*SYSTEM[:30], 50, 51, 52], [*SYSTEM, 9, 8, 7], SYSTEM[:3]]
SHAPES = {
    "cpu": {"device": "cpu"},
    "spilling": {"device": "emulated", "gpu_memory": "700KiB"},
}


@pytest.fixture(scope="module", params=["full", "windows"])
def path(request, tmp_path_factory):
    """A model that sees everything, and one whose later layers see 11 tokens."""
    window = {} if request.param == "full" else {"sliding_window": 11}
    family = "llama" if request.param == "full" else "qwen3"
    return make_checkpoint(
        tmp_path_factory.mktemp(request.param),
        family,
        num_heads=8,
        num_kv_heads=4,
        max_position_embeddings=128,
        **window,
    )


def load(path, shape="cpu", **options):
    options = {"max_batch": 3, "page_size": 4, "num_threads": THREADS, "policy": Policy(prefill_chunk=16)} | options
    return LLM(path, dtype="fp32", progress=False, **SHAPES[shape], **options)


def tokens(outputs):
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shared_beginning_is_computed_once_and_changes_nothing(path, shape):
    with load(path, shape, prefix_cache=False) as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
    with load(path, shape) as llm:
        first = llm.generate(PROMPTS, GREEDY)
        again = llm.generate(PROMPTS, GREEDY)
        logits = llm.logits(PROMPTS[0])
        computed = llm.report().to_dict()["prefill"]["tokens"]

    assert tokens(first) == tokens(again) == expected
    assert [output.metrics.cached_prompt_tokens for output in first] == [0, 40, 28, 40, 0]
    assert all(output.metrics.cached_prompt_tokens > 0 for output in again[:4])
    reused = sum(output.metrics.cached_prompt_tokens for output in (*first, *again))
    assert computed == 2 * sum(map(len, PROMPTS)) - reused
    with load(path, prefix_cache=False) as llm:
        assert nmse(logits, llm.logits(PROMPTS[0])) <= 1e-11


def test_an_answer_is_known_when_it_comes_back_in_a_prompt(path):
    with load(path) as llm:
        output = llm.generate([SYSTEM], GREEDY)[0]
        turn = [*SYSTEM, *output.token_ids, 5, 6]
        following = llm.generate([turn], GREEDY)[0]
    with load(path, prefix_cache=False) as llm:
        assert following.token_ids == llm.generate([turn], GREEDY)[0].token_ids

    assert following.metrics.cached_prompt_tokens == 44  # 40 and 7 of the answer are stored, in pages of 4


def test_what_runs_is_never_given_up_for_what_is_remembered(path):
    """Remembered pages fill the cache; requests that need it all take it, and get the right tokens."""
    prompts = [[seed, *SYSTEM] for seed in range(4, 20)]
    with load(path, max_context=64, kv_tokens=128) as llm:
        actual = tokens(llm.generate(prompts, GREEDY))
        groups = llm.engine.kv_cache.layer_groups
        assert all(group.free_pages == group.capacity for group in groups)
        assert any(group.idle for group in groups)
        llm.engine.kv_cache.forget_prefixes()
        assert all(store.free_pages == store.num_pages for group in groups for store in group.stores.values())
    with load(path, prefix_cache=False) as llm:
        assert actual == tokens(llm.generate(prompts, GREEDY))


def test_requests_come_and_go_at_any_step(path):
    with load(path) as llm:
        alone = tokens(llm.generate(PROMPTS, GREEDY))
        llm.engine.kv_cache.forget_prefixes()
        requests = [llm.add(prompt, GREEDY) for prompt in PROMPTS[:2]]
        for step in range(100):
            if step in (1, 5, 6):
                requests.append(llm.add(PROMPTS[len(requests)], GREEDY))
            if step == 9:
                llm.abort(requests[1])
            if not llm.step():
                break

        assert [request.finish_reason for request in requests] == ["length", "abort", "length", "length", "length"]
        for request, expected in zip(requests, alone, strict=True):
            assert tuple(request.token_ids) == expected[: len(request.token_ids)]
        assert llm.engine.kv_cache.free_slots == 3
        assert llm.step() == ()


def test_a_request_reserves_its_own_length_and_not_the_context(path):
    """With room for two whole contexts, six short requests decode together; long ones wait for each other."""
    with load(path, max_batch=6, kv_tokens=256) as llm:
        short = [llm.add([seed, 5, 6], GREEDY) for seed in range(4, 10)]
        together = max(len(llm.step()) for _ in range(20))
        long = [llm.add([seed, 5, 6], SamplingParams(temperature=0.0, ignore_eos=True)) for seed in range(10, 14)]
        at_once = max(len(llm.step()) for _ in range(20))
        with pytest.raises(MemoryBudgetError, match="no room for a sequence of 128 tokens"):
            llm.engine.kv_cache.open()
        for request in (*short, *long):
            llm.abort(request)

    assert (together, at_once) == (6, 2)


def test_a_long_prompt_can_be_given_up_at_any_chunk_and_goes_on_later(path):
    prompt = [4 + position % 300 for position in range(100)]
    with load(path) as llm:
        expected = llm.generate([prompt], GREEDY)[0].token_ids
        llm.engine.kv_cache.forget_prefixes()
        request = llm.add(prompt, GREEDY)
        for _ in range(3):
            llm.step()
        assert request.computed == 48
        llm.abort(request)
        output = llm.generate([prompt], GREEDY)[0]

        assert (output.token_ids, output.metrics.cached_prompt_tokens) == (expected, 48)


def test_a_prompt_of_thousands_of_tokens_needs_no_more_activations_than_a_short_one(tmp_path):
    """Progress after every chunk, the next chunk's memory that of the last; the plan counts it for any length."""
    shape = {"layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "hidden": 32, "intermediate": 32}
    long = make_checkpoint(tmp_path, "llama", max_position_embeddings=8256, **shape)
    prompt = [4 + position * 7919 % 300 for position in range(8192)]
    short_plan = plan_model(long, Policy(prefill_chunk=512), device="cpu", max_context=512, max_batch=1)
    with LLM(
        long, device="cpu", policy=Policy(prefill_chunk=512), max_context=8256, max_batch=1, progress=False
    ) as llm:
        request, computed = llm.add(prompt, GREEDY), []
        while request.finish_reason is None:
            llm.step()
            computed.append(request.computed)

        assert computed[:17] == [*range(512, 8193, 512), 8192]
        assert llm.plan.memory.host["activations"] == short_plan.memory.host["activations"]
        assert request.output().metrics.generated_tokens == 8


def test_one_sequence_is_planned_for_and_throughput_shares_four_contexts_among_many(path):
    """More sequences take the cache of more, unless `kv_tokens` says how much of it they share."""
    one, four, throughput = (
        plan_model(path, policy, device="emulated", gpu_memory="4MiB", max_context=128)
        for policy in (Policy(), Policy(batch=4), Policy(objective="throughput"))
    )

    assert [plan.max_batch for plan in (one, four, throughput)] == [1, 4, 16]
    assert [plan.workload.full_tokens for plan in (one, four, throughput)] == [128, 4 * 128, 4 * 128]
    assert throughput.predicted.decode.rows == 16
    assert throughput.predicted.decode.tokens_per_s > one.predicted.decode.tokens_per_s


def test_prompts_beyond_the_batch_wait_their_turn(path):
    with load(path, max_batch=None) as llm:
        assert llm.plan.max_batch == 1
        together = llm.generate(["one", "two", "three"], SamplingParams(max_tokens=4, temperature=0))
        apart = [llm.generate(text, SamplingParams(max_tokens=4, temperature=0))[0] for text in ("one", "two", "three")]

    assert [output.token_ids for output in together] == [output.token_ids for output in apart]


def test_too_few_slots_for_one_sequence_are_refused(path):
    with pytest.raises(ConfigError, match="kv_tokens is 100, but one sequence may have max_context 128 tokens"):
        load(path, kv_tokens=100)
