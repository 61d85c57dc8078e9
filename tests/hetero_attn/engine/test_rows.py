"""Steps that mix: single rows, chunks and chains of several sequences in one pass give what each would give alone."""

import pytest
import torch
from hypothesis import strategies as st

from hetero_attn import LLM, Policy, SamplingParams
from hetero_attn.engine.timed_steps import fill
from hetero_attn.ops.step_rows import Rows
from tests.support.models.runtime import THREADS, cpu_plan, make_engine, nmse, run_logits, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint
from tests.support.suite.few_examples import drawn

LIMIT = 1e-11
CONTEXT, SEQUENCES, CHUNK, PAGE = 64, 3, 16, 4
SHAPES = {
    "cpu": {"device": "cpu"},
    "spilling": {"device": "emulated", "gpu_memory": "700KiB"},
    "tight": {
        "device": "emulated",
        "gpu_memory": "2MiB",
        "policy": Policy.parse(
            "prefill_chunk: 16\nrules:\n  - {match: layers.*.kv, kv: {gpu_heads: 2, gpu_tokens: 28}}\n"
        ),
    },
}


def tokens_of(sequence: int) -> list[int]:
    return [4 + (7 * position + 31 * sequence * (position + 1)) % 300 for position in range(CONTEXT)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Some layers see everything, others 11 tokens."""
    shape = {"num_heads": 8, "num_kv_heads": 4, "max_position_embeddings": 128, "sliding_window": 11}
    return make_checkpoint(tmp_path_factory.mktemp("rows"), "qwen3", **shape)


def workload(path, dtype="fp32"):
    return toy_workload(path, dtype, max_context=CONTEXT, max_batch=SEQUENCES, page_size=PAGE, prefill_chunk=CHUNK)


@pytest.fixture(scope="module", params=["cpu", "emulated"])
def engine(request, path):
    plans = {"cpu": cpu_plan, "emulated": lambda work: uniform_plan(work, 0.3, 0.4, gpu_kv_heads=2)}
    engine = make_engine(path, plans[request.param](workload(path)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(path):
    """The logits of every sequence's tokens, each computed by itself on one device."""
    engine = make_engine(path, cpu_plan(workload(path)))
    try:
        return [run_logits(engine, tokens_of(sequence), 20) for sequence in range(SEQUENCES)]
    finally:
        engine.close()


# Of one sequence in one step: how many rows, whether a chunk, and how many of the last tokens are drafts to be rejected.
MOVES = st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 3))
SCHEDULES = st.lists(st.tuples(*[MOVES] * SEQUENCES, st.permutations(range(SEQUENCES))), min_size=4, max_size=16)


@drawn(few=4, many=16, schedule=SCHEDULES)
def test_no_schedule_of_rows_changes_a_logit(engine, alone, schedule):
    """Rows of any kind in one pass; drafts that are rejected leave no trace behind."""
    cache = engine.kv_cache
    sequences, computed = [cache.open() for _ in range(SEQUENCES)], 0
    for *moves, order in schedule:
        work, right = [], []
        for index in order:
            count, is_chunk, wrong = moves[index]
            sequence, wrong = sequences[index], min(wrong, max(0, count - 1))
            start = sequence.length
            count = min(count, CONTEXT - start)
            wrong = min(wrong, max(0, count - 1))
            token_ids = tokens_of(index)[start : start + count]
            token_ids[count - wrong :] = [3 + (token_id + 5) % 300 for token_id in token_ids[count - wrong :]]
            rows = [*work, Rows(sequence, token_ids, count, is_chunk)]
            try:
                engine.check(rows)
            except ValueError:
                continue
            work = rows
            right.append((index, start, count - wrong))
        if not work:
            continue
        for (index, start, count), logits in zip(right, engine.run(work), strict=True):
            assert nmse(logits[:count], alone[index][start : start + count]) <= LIMIT
            assert cache.rewind(sequences[index], start + count)
            computed += count
    for sequence in sequences:
        cache.close(sequence)
    assert cache.free_sequences == SEQUENCES and computed == sum(sequence.length for sequence in sequences)


def test_a_pass_of_every_kind_of_row_is_one_step(engine, alone):
    """Logits where they are asked for only, in the order of the call; rows of both phases are counted once."""
    cache, report = engine.kv_cache, engine.report
    first, second, third = (cache.open() for _ in range(SEQUENCES))
    engine.run([Rows(first, tokens_of(0)[:9], 0, is_chunk=True)])
    before = report.to_dict()
    found = engine.run(
        [
            Rows(second, tokens_of(1)[:5], 1, is_chunk=True),
            Rows(first, tokens_of(0)[9:11], 2),
            Rows(third, tokens_of(2)[:4], 0, is_chunk=True),
        ]
    )
    after = report.to_dict()
    for sequence in (first, second, third):
        cache.close(sequence)

    assert [len(logits) for logits in found] == [1, 2, 0]
    assert nmse(found[0], alone[1][4:5]) <= LIMIT and nmse(found[1], alone[0][9:11]) <= LIMIT
    counted = {phase: after[phase]["tokens"] - before[phase]["tokens"] for phase in after}
    assert counted == {"prefill": 9, "decode": 2}


@pytest.mark.parametrize("counts", [(6, 6, 4), (5, 5, 5), (6, 1, 6), (1, 1, 14)])
@pytest.mark.parametrize("start", range(PAGE))
def test_rows_begin_no_more_pages_than_gpu_memory_keeps(engine, counts, start):
    """Several sequences' rows touch more pages than one's of the same number; a step has them all or is refused."""
    cache = engine.kv_cache
    sequences = [cache.open() for _ in counts]
    try:
        for index, sequence in enumerate(sequences):
            engine.run([Rows(sequence, tokens_of(index)[: 12 + start], 0, is_chunk=True)])
        work = [
            Rows(sequence, tokens_of(index)[12 + start :][:count], 1, is_chunk=count > 1)
            for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True))
        ]
        new_pages = sum(-(-(count - 1) // PAGE) for count in counts)
        if cache.max_new_pages is None or new_pages <= cache.max_new_pages:
            assert len(engine.run(work)) == len(counts)
        else:
            with pytest.raises(ValueError, match=f"at most {cache.max_new_pages} new pages"):
                engine.run(work)
    finally:
        for sequence in sequences:
            cache.close(sequence)


def test_rows_that_no_step_can_compute_are_named(engine):
    sequence = engine.kv_cache.open()
    try:
        for work, message in (
            ([Rows(sequence, [5]), Rows(sequence, [6])], "each once"),
            ([], "at least one sequence"),
            ([Rows(sequence, [])], "at least one token"),
            ([Rows(sequence, [5] * (CHUNK + 1), is_chunk=True)], f"at most {CHUNK} rows"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.run(work)
        assert sequence.length == 0
    finally:
        engine.kv_cache.close(sequence)


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_a_chain_of_rows_is_bit_for_bit_as_many_passes_of_one_row(path, dtype):
    """On the CPU lane, up to 16 rows."""
    engine = make_engine(path, cpu_plan(workload(path, dtype)))
    cache, token_ids = engine.kv_cache, tokens_of(1)
    one_by_one, chained = cache.open(), cache.open()
    try:
        for sequence in (one_by_one, chained):
            engine.prefill(sequence, token_ids[:9])
        for count in (2, 5, 8, 16):
            added = token_ids[chained.length : chained.length + count]
            expected = torch.cat([engine.decode_step([one_by_one], [token_id]) for token_id in added])
            rejected = [Rows(chained, [added[0], *[9] * (count - 1)], count)]
            wrong = engine.run(rejected)[0]
            assert torch.equal(wrong[0], expected[0]) and not torch.equal(wrong[1], expected[1])
            assert cache.rewind(chained, chained.length - count)
            assert all(max(pool.held(chained.id)) == (chained.length - 1) // PAGE for pool in cache.pools)
            assert torch.equal(engine.run([Rows(chained, added, count)])[0], expected)
    finally:
        engine.close()


@pytest.mark.parametrize("length", [520, 1500, 3000])
@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_a_chain_behind_a_long_context_is_bit_for_bit_as_many_passes(tmp_path, dtype, length):
    """Attention was split by the batch, so that rows of one pass summed their keys in another order than one alone."""
    path = make_checkpoint(tmp_path, "llama", layers=1, num_heads=4, num_kv_heads=2, max_position_embeddings=4096)
    work = toy_workload(path, dtype, max_context=3072, max_batch=2, page_size=16, prefill_chunk=64)
    engine, added = make_engine(path, cpu_plan(work)), tokens_of(1)[:16]
    try:
        one_by_one = engine.kv_cache.open()
        fill(engine, one_by_one, length)
        chained = engine.kv_cache.fork(one_by_one)
        expected = torch.cat([engine.decode_step([one_by_one], [token_id]) for token_id in added])

        assert torch.equal(engine.run([Rows(chained, added, len(added))])[0], expected)
    finally:
        engine.close()


def load(path, shape, **options):
    options = {
        "max_batch": 3,
        "page_size": PAGE,
        "num_threads": THREADS,
        "policy": Policy(prefill_chunk=CHUNK),
    } | options
    return LLM(path, dtype="fp32", progress=False, **(options | SHAPES[shape]))


def greedy(max_tokens=None):
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)


SHARED = tokens_of(0)[:21]
PROMPTS = [[*SHARED, 9, 8], [*SHARED[:14], 50, 51], tokens_of(1)[:37], tokens_of(2)[:5], [*SHARED, 9, 8, 7]]


@pytest.fixture(scope="module")
def solo(path):
    with load(path, "cpu", max_context=CONTEXT, prefix_cache=False) as llm:
        return [llm.generate([prompt], greedy())[0].token_ids for prompt in PROMPTS]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pass_of_a_long_prompt_gives_a_running_stream_its_token(path, solo, shape):
    with load(path, shape, max_context=CONTEXT) as llm:
        running = llm.add(PROMPTS[3], greedy())
        llm.step()
        late = llm.add(PROMPTS[2], greedy(4))
        while late.computed < len(PROMPTS[2]):
            before = len(running.token_ids), late.computed
            assert llm.step() == (running, late)
            assert len(running.token_ids) == before[0] + 1
            assert late.computed == min(len(PROMPTS[2]), before[1] + CHUNK - 1)
        while llm.step():
            pass

    assert tuple(running.token_ids) == solo[3] and tuple(late.token_ids) == solo[2][:4]


def test_short_prompts_share_a_pass_unless_they_begin_alike(path, solo):
    with load(path, "cpu", max_context=CONTEXT) as llm:
        short = [llm.add(prompt, greedy(3)) for prompt in (PROMPTS[3], [7, 8, 9], [11, 12])]
        assert llm.step() == tuple(short)
        while llm.step():
            pass
        alike = [llm.add(prompt, greedy(3)) for prompt in ([*SHARED[:9], 5], [*SHARED[:9], 6])]
        assert [llm.step() for _ in range(2)] == [(alike[0],), tuple(alike)]
        assert alike[1].reused == 8

    assert tuple(short[0].token_ids) == solo[3][:3]


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, 5),
        st.sampled_from([None, 1, 5, 20]),
        st.integers(-1, 1),
        st.sampled_from([None, None, 0, 3]),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("shape", SHAPES)
@drawn(few=2, many=10, arrivals=ARRIVALS, contexts=st.sampled_from([1, 2]), prefix_cache=st.booleans())
def test_no_mix_of_prompts_and_streams_changes_an_answer(path, solo, shape, arrivals, contexts, prefix_cache):
    """Arrivals, aborts, growth and put-backs at any step, in a cache that is too small for all."""
    with load(path, shape, max_context=CONTEXT, kv_tokens=CONTEXT * contexts, prefix_cache=prefix_cache) as llm:
        requests = []
        for which, steps, max_tokens, priority, abort_after in arrivals:
            request = llm.add(PROMPTS[which], greedy(max_tokens), priority=priority)
            requests.append((which, request))
            for step in range(steps):
                if step == abort_after:
                    llm.abort(request)
                llm.step()
        while llm.step():
            pass

        for which, request in requests:
            expected = solo[which][: request.max_tokens]
            assert tuple(request.token_ids) == expected[: len(request.token_ids)], which
            assert request.finish_reason == "abort" or len(request.token_ids) == len(expected)
        assert llm.engine.kv_cache.free_sequences == llm.plan.max_batch
