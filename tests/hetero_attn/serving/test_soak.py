"""Thousands of requests that come, go, are aborted, abandoned and interrupted: right answers, and nothing left behind.

An ordinary run takes a share of them; `-m soak`, or `make test-all`, takes all 2,000.
"""

import gc
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from hetero_attn import LLM, Policy, SamplingParams
from tests.support.models.runtime import THREADS
from tests.support.models.toy import make_checkpoint

PROMPTS = [
    [4 + (7 * position + seed) % 300 for position in range(length)] for seed, length in enumerate((3, 9, 17, 30, 5))
]
SHARED = [[*PROMPTS[3], seed] for seed in (7, 8, 9)]
LARGE, SMALL = "900KiB", "700KiB"
SHAPES = {
    "cpu": {"device": "cpu"},
    "elastic": {"device": "emulated", "gpu_memory": LARGE, "elastic": True},
}


class Alarm(Exception):
    """What the signal handler raises."""


class Storm:
    """A seeded crowd of users of one model, each of whom does one thing."""

    def __init__(self, llm, solo, seed):
        self.llm, self.solo, self.random = llm, solo, random.Random(seed)
        self.open, self.streams, self.done, self.is_armed = [], [], Counter(), False

    def run(self, requests):
        """Let so many requests come; ends when all have gone."""
        signal.signal(signal.SIGALRM, self.on_alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.013)
        try:
            while self.done["came"] < requests:
                self.interruptible(self.random.choice(self.moves))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.streams.clear()
        while self.llm.step():
            pass
        self.check_ended()

    @property
    def moves(self):
        return [self.add] * 4 + [self.step] * 12 + [self.stream, self.generate, self.abort, self.abandon, self.resize]

    def interruptible(self, move):
        try:
            try:
                self.is_armed = self.random.random() < 0.2
                move()
            finally:
                self.is_armed = False
        except Alarm:
            self.done["interrupted"] += 1
        self.check_ended()

    def on_alarm(self, *_):
        self.done["signals"] += 1
        if self.open and self.done["signals"] % 4 == 0:
            self.llm.abort(self.open[self.done["signals"] % len(self.open)][1])
        if self.is_armed:
            self.is_armed = False
            raise Alarm

    def draw(self):
        which = self.random.randrange(len(self.solo))
        length = self.random.choice([None, 1, 4, 12])
        self.done["came"] += 1
        return which, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length)

    def add(self):
        which, params = self.draw()
        self.open.append((which, self.llm.add(self.solo[which][0], params, priority=self.random.randint(-1, 1))))

    def step(self):
        self.llm.step()

    def stream(self):
        which, params = self.draw()
        self.streams.append(self.llm.stream(self.solo[which][0], params))
        for _ in zip(self.streams[-1], range(2), strict=False):
            pass

    def generate(self):
        which, params = self.draw()
        output = self.llm.generate([self.solo[which][0]], params)[0]
        self.check(which, output.token_ids, params.max_tokens)

    def abort(self):
        if self.open:
            self.llm.abort(self.random.choice(self.open)[1])

    def abandon(self):
        if self.streams:
            cycle = [self.streams.pop(self.random.randrange(len(self.streams)))]
            cycle.append(cycle)

    def resize(self):
        if self.llm.plan.workload.elastic and self.random.random() < 0.2:
            self.llm.resize(self.random.choice([LARGE, SMALL]))
            self.done["resized"] += 1

    def check_ended(self):
        for which, request in [each for each in self.open if each[1].finish_reason is not None]:
            self.open.remove((which, request))
            self.check(which, request.token_ids, request.max_tokens if request.finish_reason == "length" else None)
            self.done[request.finish_reason] += 1

    def check(self, which, token_ids, length):
        """An ended answer is that of a solo run; one that was aborted is its beginning."""
        expected = self.solo[which][1][:length]
        assert tuple(token_ids) == expected[: len(token_ids)], which
        assert length is None or len(token_ids) == len(expected), which


def footprint(llm):
    """Places, pages, threads and descriptors that are in use now that nothing runs."""
    llm.step()
    gc.collect()
    llm.step()
    cache = llm.engine.kv_cache
    cache.forget_prefixes()
    pages = [store.num_pages - store.free_pages for pool in cache.pools for store in pool.stores.values()]
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    return cache.free_sequences, sum(pages), threading.active_count(), descriptors


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("soak"), "llama", num_heads=8, num_kv_heads=4, max_position_embeddings=64
    )


def soak(path, shape, requests):
    options = {
        "max_batch": 3,
        "page_size": 4,
        "num_threads": THREADS,
        "policy": Policy(prefill_chunk=16),
        "kv_tokens": 128,
    }
    before = signal.getsignal(signal.SIGALRM)
    with LLM(path, dtype="fp32", progress=False, **SHAPES[shape], **options) as llm:
        whole = SamplingParams(temperature=0.0, ignore_eos=True)
        solo = [(prompt, llm.generate([prompt], whole)[0].token_ids) for prompt in (*PROMPTS, *SHARED)]
        Storm(llm, solo, 0).run(50)  # whatever is made once is made
        at_rest, memory_bytes = footprint(llm), psutil.Process(os.getpid()).memory_info().rss
        started, storm = time.perf_counter(), Storm(llm, solo, 1)
        try:
            storm.run(requests)
        finally:
            signal.signal(signal.SIGALRM, before)
        storm.done["seconds"] = round(time.perf_counter() - started)

        assert footprint(llm) == at_rest, storm.done
        assert psutil.Process(os.getpid()).memory_info().rss <= memory_bytes + (32 << 20), storm.done
        assert [output.token_ids for output in llm.generate([prompt for prompt, _ in solo], whole)] == [
            token_ids for _, token_ids in solo
        ]
    assert min(storm.done[what] for what in ("length", "abort", "signals", "interrupted")) > 0, storm.done
    assert storm.done["resized"] > 0 or shape == "cpu"
    return storm.done


@pytest.mark.parametrize("shape", ["cpu", pytest.param("elastic", marks=pytest.mark.matrix)])
def test_a_share_of_the_soak(path, shape):
    soak(path, shape, 150)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_thousand_mixed_requests_leave_nothing_behind(path, shape):
    print(soak(path, shape, 2000))
