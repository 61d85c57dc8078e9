"""Whatever fails, at whatever moment: the error is heard, nothing leaks, and the model goes on with the same tokens.

The driver and the worker of an emulated, elastic model count their calls and fail the N-th, for N = 1, 2, ... until a
run completes.
"""

import gc
import threading

import pytest
from tqdm import TMonitor

import hetero_attn.engine.build
from hetero_attn import LLM, Policy, SamplingParams
from hetero_attn.devices import EmulatedDriver
from hetero_attn.errors import EngineDeadError
from hetero_attn.lanes.host_worker import HostWorker
from tests.support.models.toy import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
PROMPTS = ["a prompt of some pages", "b"]
LARGE, SMALL = "200KiB", "110KiB"
# Every lane works, and three chunks of prompt make old tokens leave the GPU.
SPLIT = Policy.parse(
    """
prefill_chunk: 8
batch: 2
elastic: true
rules:
  - {match: layers.*.kv, kv: {gpu_heads: 1, gpu_tokens: 16}}
"""
)


class Fault(RuntimeError):
    """What is planted here."""


class Faults:
    """Counts calls by kind and fails the one that is armed; `lasting` fails those after it too."""

    def __init__(self):
        self.disarm()

    def disarm(self):
        self.kind, self.left, self.lasting, self.fired = None, 0, False, False

    def arm(self, kind, number, lasting=False):
        self.kind, self.left, self.lasting, self.fired = kind, number, lasting, False

    def count(self, kind):
        if kind == self.kind:
            self.left -= 1
            if self.left == 0 or (self.lasting and self.left < 0):
                self.fired = True
                raise Fault(f"planted in {kind}")


@pytest.fixture
def faults(monkeypatch):
    """A driver and a worker that fail on demand, in the place of the usual ones."""
    faults = Faults()

    class Driver(EmulatedDriver):
        def allocate(self, shape, dtype, stays):
            faults.count("allocate")
            return super().allocate(shape, dtype, stays)

        def copy(self, target, source, stream):
            faults.count("copy")
            super().copy(target, source, stream)

        def wait(self, stream, event):
            faults.count("wait")

        def synchronize(self, event):
            faults.count("synchronize")

    class Worker(HostWorker):
        def submit(self, function, *arguments):
            faults.count("submit")

            def job():
                faults.count("job")
                function(*arguments)

            return super().submit(job)

    monkeypatch.setattr(hetero_attn.engine.build, "EmulatedDriver", Driver)
    monkeypatch.setattr(hetero_attn.engine.build, "HostWorker", Worker)
    return faults


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    shape = {"layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden": 64, "intermediate": 96}
    return make_checkpoint(tmp_path_factory.mktemp("faults"), "llama", max_position_embeddings=64, **shape)


def load(path):
    return LLM(path, SPLIT, LARGE, "fp32", "emulated", num_threads=1, page_size=4, progress=False)


def generate(llm):
    llm.engine.kv_cache.forget_prefixes()
    return [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]


def state(llm):
    """Everything that a fault must not change."""
    device, cache = llm.engine.lanes.device, llm.engine.kv_cache
    cache.forget_prefixes()
    free = [store.free_pages for pool in cache.pools for store in pool.stores.values()]
    used = {kind: count for kind, count in device.arena.used_bytes.items() if count}
    return used, dict(device.pinned.used_bytes), free, cache.free_sequences, llm._scheduler.has_work, llm.plan


def attempts(faults, kind, work):
    """Fail the first, the second, ... call of a kind, until `work` completes; yields after each failure."""
    for number in range(1, 1000):
        faults.arm(kind, number)
        try:
            work()
        except Fault as error:
            assert kind in str(error)
        fired = faults.fired
        faults.disarm()
        if not fired:
            assert number > 1, f"{kind} was never called"
            return
        yield number


@pytest.mark.parametrize("kind", ["copy", "wait", "synchronize", "submit", "job"])
def test_a_fault_in_a_generation_leaves_the_model_as_it_was(path, faults, kind):
    with load(path) as llm:
        expected = generate(llm)
        before = state(llm)
        for number in attempts(faults, kind, lambda: generate(llm)):
            assert state(llm) == before, number
            if number % 10 == 1:
                assert generate(llm) == expected, number

        assert generate(llm) == expected


@pytest.mark.parametrize("kind", ["allocate", "copy", "synchronize"])
def test_a_fault_in_a_resize_is_undone(path, faults, kind):
    with load(path) as llm:
        expected = generate(llm)
        before = state(llm)

        def resize():
            llm.resize(SMALL)
            llm.resize(LARGE)

        for number in attempts(faults, kind, resize):
            if llm.plan != before[-1]:
                llm.resize(LARGE)
            assert state(llm) == before, number

        assert generate(llm) == expected


def test_a_resize_that_cannot_be_undone_declares_the_model_dead(path, faults):
    llm = load(path)
    faults.arm("allocate", 1, lasting=True)
    with pytest.raises(EngineDeadError, match="load it again"):
        llm.resize(SMALL)
    faults.disarm()
    with pytest.raises(EngineDeadError, match="load it again"):
        llm.generate("dead", GREEDY)
    llm.close()

    device = llm.engine.lanes.device
    assert device.arena.total_bytes == device.pinned.total_bytes == 0


def test_a_fault_while_loading_leaves_nothing_behind(path, faults):
    load(path).close()
    threads = set(threading.enumerate())
    for number in attempts(faults, "allocate", lambda: load(path).close()):
        gc.collect()
        left = {thread for thread in threading.enumerate() if not isinstance(thread, TMonitor)} - threads
        for thread in left:  # the tokenizer's, which is opened beside the load, may still be at work
            thread.join(60)
        assert not any(thread.is_alive() for thread in left), number


def test_two_threads_and_an_abandoned_stream_share_three_lanes(path):
    with load(path) as llm:
        expected, before, actual = generate(llm), state(llm), {}
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)

        def work(prompt):
            actual[prompt] = llm.generate(prompt, GREEDY)[0].token_ids

        threads = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        stream.close()
        for thread in threads:
            thread.join(60)

        assert [actual[prompt] for prompt in PROMPTS] == expected
        assert state(llm) == before
