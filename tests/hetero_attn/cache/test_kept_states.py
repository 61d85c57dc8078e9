"""Crowds of conversations that begin alike, of a model whose layers keep states: right answers, no place lost, an end.

Each answer is held to the logits of a run of its own, from the first token on; prompts whose every logit is asked for
take nothing from earlier ones.
"""

import random

import pytest
import torch

from hetero_attn import LLM, Policy, SamplingParams
from tests.support.models.moe import make_moe
from tests.support.models.runtime import nmse

CONTEXT, LONGEST = 112, 90
BEGINNINGS = [[4 + (11 * place * (seed + 1) + 7 * seed) % 300 for place in range(60)] for seed in range(2)]
LIMIT = 1e-7  # of log-probabilities, whose sums run in other orders: they are 1e-9 apart without a prefix cache too
LEAST_GAP = 1e-4
MOST_STEPS = 2000
DEVICES = ({"device": "cpu"}, {"device": "emulated", "gpu_memory": "1 MiB"})


def sizes_of(draw):
    sizes = {"page_size": draw.randint(3, 16), "max_batch": draw.randint(2, 4)}
    sizes["policy"] = Policy(prefill_chunk=draw.randint(1, 40))
    return sizes | {"kv_tokens": draw.choice([None, 128, 200])}


def arrival_of(draw):
    return {
        "goes_on": draw.choice([None, None, 0, 1, 2, 5]),  # behind which of the requests before
        "begins": draw.choice([(0, 60), (0, 31), (0, 31), (1, 44)]),  # else with how much of which beginning
        "less": draw.randint(0, 6),  # tokens of that
        "asked": draw.randint(0, 24),  # new ones
        "max_tokens": draw.choice([None, 1, 4, 8, 8]),
        "priority": draw.choice([0, 0, -1, 1]),
        "steps": draw.choice([0, 0, 1, 3, 12]),
        "aborted": draw.random() < 0.1,
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_moe(tmp_path_factory.mktemp("kept"), "qwen3_next")


def prompt_of(arrival, index, requests):
    """What begins like the beginning of another prompt or of a conversation so far, and goes on by itself."""
    if arrival["goes_on"] is not None and arrival["goes_on"] < len(requests):
        before = requests[-1 - arrival["goes_on"]]
        begun = [*before.prompt_token_ids, *before.token_ids]
    else:
        which, length = arrival["begins"]
        begun = BEGINNINGS[which][:length]
    begun = begun[: max(1, len(begun) - arrival["less"])]
    return [*begun, *(4 + (17 * index + 5 * place) % 300 for place in range(arrival["asked"]))][:LONGEST]


def check_places(llm):
    """Each is free, wanted by an open sequence or kept at a node that the tree leads to by its pages."""
    cache = llm.engine.kv_cache
    states, nodes = cache.prefix_states, [cache._tree._root]
    for node in nodes:
        nodes += node.children.values()
    wanted = [place for places in states._wanted.values() for place in places.values()]

    assert sorted([*states._free, *states._kept.values(), *wanted]) == list(range(llm.plan.workload.prefix_states))
    assert all(node in nodes and all(node.pages) for node in states._kept)
    assert states._wanted.keys() <= cache._open.keys()


def step(llm):
    llm.step()
    check_places(llm)


def run(llm, arrivals):
    requests = []
    for index, arrival in enumerate(arrivals):
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=arrival["max_tokens"], logprobs=1)
        request = llm.add(prompt_of(arrival, index, requests), params, priority=arrival["priority"])
        requests.append(request)
        for _ in range(arrival["steps"]):
            step(llm)
        if arrival["aborted"]:
            llm.abort(request)
    steps = 0
    while any(request.finish_reason is None for request in requests):
        step(llm)
        steps += 1
        assert steps < MOST_STEPS, "nobody goes on"
    return requests


def check_answer(llm, request):
    """The likeliest tokens, as likely as a run of the whole text says."""
    request.output()
    prompt, answer = request.prompt_token_ids, request.token_ids
    assert request.finish_reason == "abort" or len(answer) == request.max_tokens
    if not answer:
        return
    expected = llm.logits([*prompt, *answer])[len(prompt) - 1 : -1].log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(answer)[:, None]).flatten()
    said = torch.tensor([sampled.logprob for sampled in request.logprobs])

    assert (expected.max(-1).values - chosen).max() < LEAST_GAP
    assert nmse(said, chosen) <= LIMIT


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.matrix) for seed in range(4, 40))])
def test_no_crowd_of_conversations_changes_an_answer_or_loses_a_place(path, seed):
    draw = random.Random(seed)
    sizes, arrivals = sizes_of(draw) | DEVICES[seed % 2], [arrival_of(draw) for _ in range(14)]
    with LLM(path, dtype="fp32", num_threads=2, progress=False, max_context=CONTEXT, **sizes) as llm:
        requests = run(llm, arrivals)
        for request in requests:
            check_answer(llm, request)
        cache = llm.engine.kv_cache
        assert cache.free_sequences == llm.plan.max_batch and not cache.prefix_states._wanted
        cache.forget_prefixes()
        assert not cache.prefix_states._kept
    assert sum(request.reused for request in requests) > 0
