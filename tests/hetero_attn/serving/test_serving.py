"""Prompts that begin alike, requests that come and go, and pages reserved in advance: same tokens, less work."""

from dataclasses import replace

import pytest
from hypothesis import strategies as st

from hetero_attn import LLM, Policy, SamplingParams, plan_model
from hetero_attn.errors import ConfigError, MemoryBudgetError, QueueFullError
from hetero_attn.serving.scheduling.chunks import rows_within
from tests.support.models.runtime import THREADS, nmse
from tests.support.models.toy import make_checkpoint
from tests.support.suite.few_examples import drawn

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
        groups = llm.engine.kv_cache.pools
        assert all(group.free_pages == group.capacity for group in groups)
        assert any(group.idle for group in groups)
        llm.engine.kv_cache.forget_prefixes()
        assert all(store.free_pages == store.num_pages for pool in groups for store in pool.stores.values())
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
        assert llm.engine.kv_cache.free_sequences == 3
        assert llm.step() == ()


def test_a_request_with_max_tokens_reserves_its_own_length_and_not_the_context(path):
    """With room for two whole contexts, six short requests decode together; ones that may be long wait for each
    other."""
    with load(path, max_batch=6, kv_tokens=256) as llm:
        short = [llm.add([seed, 5, 6], GREEDY) for seed in range(4, 10)]
        together = max(len(llm.step()) for _ in range(20))
        whole = SamplingParams(temperature=0.0, max_tokens=125, ignore_eos=True)
        long = [llm.add([seed, 5, 6], whole) for seed in range(10, 14)]
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


OPEN_END = SamplingParams(temperature=0.0, ignore_eos=True)


def alone(path, prompt, params):
    with load(path, prefix_cache=False) as llm:
        return llm.generate([prompt], params)[0].token_ids


def test_a_running_stream_gets_a_token_at_least_every_second_chunk_of_a_long_prompt(path):
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    long = [4 + position * 7 % 300 for position in range(110)]
    with load(path) as llm:
        running = [llm.add([seed, 5, 6], params) for seed in (7, 8)]
        while not all(request.token_ids for request in running):
            llm.step()
        late = llm.add(long, GREEDY)
        chunks_between, counts = [0], [len(request.token_ids) for request in running]
        while late.computed < len(long):
            before = late.computed
            llm.step()
            chunks_between[-1] += late.computed > before
            if all(len(request.token_ids) > count for request, count in zip(running, counts, strict=True)):
                counts = [len(request.token_ids) for request in running]
                chunks_between.append(0)
        while llm.step():
            pass

    assert len(chunks_between) >= 6 and max(chunks_between) <= 2
    assert [tuple(request.token_ids) for request in running] == [alone(path, [seed, 5, 6], params) for seed in (7, 8)]
    assert tuple(late.token_ids) == alone(path, long, GREEDY)


@pytest.mark.table
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_without_max_tokens_share_the_cache_and_are_put_back_when_it_is_full(path, shape, prefix_cache):
    """Room for two whole contexts: six begin together, and each answer, which fills a context, is that of a solo
    run."""
    prompts = [[seed, 5, 6] for seed in range(4, 10)]
    with load(path, shape, max_batch=6, kv_tokens=128, prefix_cache=prefix_cache, max_context=64) as llm:
        groups = llm.engine.kv_cache.pools
        requests, together = [llm.add(prompt, OPEN_END) for prompt in prompts], 0
        while took_part := llm.step():
            together = max(together, len(took_part))

        assert together == 6
        assert any(request.replayed for request in requests[1:]) and not requests[0].replayed
        assert all(group.free_pages == group.capacity for group in groups)
    with load(path, max_context=64, prefix_cache=False) as llm:
        expected = [llm.generate([prompt], OPEN_END)[0].token_ids for prompt in prompts]
    assert [tuple(request.token_ids) for request in requests] == expected
    assert [request.output().finish_reason for request in requests] == ["length"] * 6


def test_priority_goes_first_and_the_first_come_among_equals(path):
    with load(path, max_batch=1) as llm:
        wishes = [0, 0, 5, -1, 5]
        requests = [llm.add([9, number], GREEDY, priority=wish) for number, wish in enumerate(wishes)]
        ended = []
        while llm.step():
            ended += [number for number, each in enumerate(requests) if each.finish_reason and number not in ended]

    assert ended == [2, 4, 0, 1, 3]


def test_a_full_queue_is_a_named_error(path):
    with load(path, max_batch=1, max_waiting=2) as llm:
        running = llm.add([9], GREEDY)
        llm.step()
        waiting = [llm.add([9, 8], GREEDY) for _ in range(2)]
        for call in (lambda: llm.add([4], GREEDY), lambda: llm.generate([[4]]), lambda: llm.logits([4])):
            with pytest.raises(QueueFullError, match="2 requests wait for a place, and max_waiting is 2"):
                call()
        while llm.step():
            pass

        assert all(request.finish_reason == "length" for request in (running, *waiting))
        assert llm.generate([[4]], GREEDY)[0].finish_reason == "length"


def test_a_chunk_is_cut_short_only_where_that_saves_time_and_somebody_waits(path):
    with load(path) as llm:
        plan = llm.plan
        cost = plan.predicted.prefill

        def slow(one_s, chunk_s, rows=512):
            prefill = replace(cost, rows=rows, seconds=chunk_s)
            predicted = replace(plan.predicted, decode=replace(plan.predicted.decode, seconds=one_s), prefill=prefill)
            return replace(plan, predicted=predicted, workload=replace(plan.workload, prefill_chunk=rows))

        assert rows_within(slow(0.01, 0.9), 1.0) == 512
        assert rows_within(slow(0.2, 4.2), 1.0) == 102
        assert rows_within(slow(1.5, 4.2), 1.0) == 512  # one row takes longer: shorter chunks would help nobody
        assert rows_within(slow(0.99, 400.0), 1.0) == 16


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 6), st.sampled_from([None, 1, 5, 20]), st.integers(-1, 1)),
    min_size=1,
    max_size=8,
)


@pytest.fixture(scope="module")
def solo(path):
    """The whole answer of each prompt by itself; shorter ones are its beginnings."""
    with load(path, max_context=64, prefix_cache=False) as llm:
        return [llm.generate([prompt], OPEN_END)[0].token_ids for prompt in PROMPTS]


@drawn(few=5, many=20, arrivals=ARRIVALS, contexts=st.sampled_from([1, 2]))
def test_no_schedule_changes_an_answer(path, solo, arrivals, contexts):
    """Prompts that begin alike, come at any step, of any length and priority, in a cache that is too small for all."""
    with load(path, max_context=64, kv_tokens=64 * contexts) as llm:
        requests = []
        for which, steps, max_tokens, priority in arrivals:
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
            requests.append((which, llm.add(PROMPTS[which], params, priority=priority)))
            for _ in range(steps):
                llm.step()
        while llm.step():
            pass

        for which, request in requests:
            assert tuple(request.token_ids) == solo[which][: request.max_tokens], which
        assert llm.engine.kv_cache.free_sequences == llm.plan.max_batch
