"""The KV cache against a plain list of tokens: random appends, spills, forks, rewinds, reuse and resizes.

What a page holds is a number made of all tokens up to its position, as real keys depend on everything before them, so a
page that is shared wrongly, moved wrongly or written twice shows. Planted bugs show that the machine has teeth.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.moves import PageMoves
from hetero_attn.cache.pool import CachePool
from hetero_attn.cache.prefix_tree import PrefixTree
from hetero_attn.cache.stores import PageStores
from hetero_attn.devices import Device, EmulatedDriver
from hetero_attn.errors import MemoryBudgetError
from placement import KvPlacement, LinearPlacement
from placement.plan.plan import Means, build_plan
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.planning.planning_models import decoder

CHUNK = 6
GENERATE = (Phase.generate,)  # a planted bug is not to be shrunk
MACHINE = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


def cache_plan(page_size, window, gpu_kv_heads, spare_pages, batch, kv_tokens=None, context=40):
    """A plan of three tiny layers, the second and third with a window, and a GPU budget of exactly their cache."""
    workload = decoder(
        "pages", layers=3, hidden=16, intermediate=16, heads=2, kv_heads=2, head_dim=2, vocab=16, dtype="fp32",
        context=context, batch=batch, chunk=CHUNK, page_size=page_size, windows=(0, window, window),
    )  # fmt: skip
    kv = tuple(replace(shard, bytes_per_token=16) for shard in workload.kv)
    workload = replace(workload, kv=kv, kv_dtype="fp32", kv_tokens=kv_tokens)
    linears = [LinearPlacement(s.name, 0, (0,) * NUM_ROW_TIERS, s.units) for s in workload.linears]
    tokens = workload.min_gpu_tokens + spare_pages * page_size if gpu_kv_heads else 0
    placed = [KvPlacement(shard.name, gpu_kv_heads, tokens, 2) for shard in kv]
    return within_itself(build_plan(workload, linears, placed, Means(device="emulated")))


def within_itself(plan):
    """The plan with a budget of exactly its cache."""
    return replace(plan, gpu_memory_bytes=plan.memory.gpu["kv"])


def with_gpu_tokens(plan, tokens):
    """The plan with another number of tokens in GPU memory."""
    kv = [replace(placement, gpu_tokens=tokens if placement.gpu_kv_heads else 0) for placement in plan.kv]
    return within_itself(build_plan(plan.workload, plan.linears, kv, Means(device="emulated")))


def numbers(tokens, start, stop, layer, head, heads):
    """What the cache holds of positions [start, stop) in a layer: float32 [stop - start, heads, 2]."""
    before = torch.tensor([hash(tuple(tokens[: position + 1])) % 2**20 for position in range(start, stop)])
    return (
        (before[:, None, None] + 2**20 * layer + 2**22 * torch.arange(head, head + heads)[:, None])
        .float()
        .repeat(1, 1, 2)
    )


class CacheMachine(RuleBasedStateMachine):
    """Drives a cache; `self.open` maps each open sequence to (its tokens, the tokens it reserved)."""

    @initialize(
        page_size=st.sampled_from([2, 3, 1, 5]),
        window=st.sampled_from([0, 4, 7]),
        gpu_kv_heads=st.integers(0, 2),
        spare_pages=st.integers(0, 4),
        batch=st.integers(2, 4),
        kv_tokens=st.sampled_from([None, 64, 100]),
    )
    def start(self, **shape):
        self.plan = cache_plan(**shape)
        self.device = Device(EmulatedDriver(), self.plan.gpu_memory_bytes)
        self.cache = KVCache(self.plan, self.device)
        self.pinned_bytes = self.plan.memory.pinned["kv"]  # also after a resize: pages in DRAM stay where they are
        self.open, self.seen = [], []

    @rule(tokens=st.integers(20, 40), prompt=st.lists(st.integers(0, 1), max_size=9), like=st.integers(0, 20))
    def begin(self, tokens, prompt, like):
        """Open a sequence, with whatever of a prompt is known, where there is room; else it must be refused."""
        if not self.cache.has_room(tokens):
            with pytest.raises(MemoryBudgetError, match="no room for a sequence"):
                self.cache.open(tokens)
            return
        prompt = [*(self.seen[like % len(self.seen)][:tokens] if self.seen else ()), *prompt][:tokens]
        sequence = self.cache.open(tokens)
        known = self.cache.reuse(sequence, prompt)
        assert known == sequence.length <= len(prompt)
        self.open.append((sequence, prompt[:known], tokens))

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(), chunks=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=CHUNK), min_size=2, max_size=6)
    )
    def append(self, data, chunks):
        entry = data.draw(st.sampled_from(self.open))
        for added in chunks:
            self.step(*entry, added)

    def step(self, sequence, tokens, reserved, added):
        """One step of the engine: pages held, old ones moved, every layer written."""
        added = added[: reserved - len(tokens)]
        if added:
            self.cache.make_room(sequence, len(added))
            tokens += added
            for layer, (index, place) in self.cache.places.items():
                pool = self.cache.pools[index]
                pool.moves.wait(place)
                self.write(pool, place, layer, sequence, tokens)
            sequence.length = len(tokens)

    def write(self, pool, place, layer, sequence, tokens):
        positions = torch.arange(sequence.length, len(tokens))
        for store, first in ((pool.recent, 0), (pool.host, pool.gpu_kv_heads)):
            if store is not None:
                slots = store.slots(sequence.id, positions)
                values = numbers(tokens, sequence.length, len(tokens), layer, first, store.kv_heads)
                store.k[place].view(-1, 2)[slots] = values
                store.v[place].view(-1, 2)[slots] = -values

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def remember(self, data):
        sequence, tokens, _ = data.draw(st.sampled_from(self.open))
        self.cache.remember(sequence, tokens)
        self.seen += [tuple(tokens)] if tokens else []

    @precondition(lambda self: self.open)
    @rule(data=st.data(), more=st.integers(0, 20), chunk=st.lists(st.integers(0, 1), max_size=CHUNK))
    def fork(self, data, more, chunk):
        sequence, tokens, _ = data.draw(st.sampled_from(self.open))
        reserved = min(40, len(tokens) + more)
        if reserved and self.cache.has_room(reserved):
            self.open.append((self.cache.fork(sequence, reserved), list(tokens), reserved))
            self.step(*self.open[-1], chunk)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), cut=st.integers(0, 40))
    def rewind(self, data, cut):
        sequence, tokens, _ = data.draw(st.sampled_from(self.open))
        length = max(0, len(tokens) - cut)
        if self.cache.rewind(sequence, length):
            del tokens[length:]
        else:
            assert any(pool.window for pool in self.cache.pools)

    @precondition(lambda self: len(self.open) > 1)
    @rule(data=st.data(), remembered=st.sampled_from([True, True, False]))
    def close(self, data, remembered):
        entry = data.draw(st.sampled_from(self.open))
        if remembered:
            self.cache.remember(entry[0], entry[1])
            self.seen += [tuple(entry[1])] if entry[1] else []
        self.cache.close(entry[0])
        self.open.remove(entry)

    @precondition(lambda self: any(pool.spilled for pool in self.cache.pools))
    @rule(pages=st.integers(0, 12))
    def resize(self, pages):
        """Go over to a plan that keeps more or fewer tokens in GPU memory, as an elastic model does."""
        size = self.plan.page_size
        tokens = min(self.plan.workload.min_gpu_tokens + pages * size, self.plan.workload.full_tokens - size)
        if tokens >= self.plan.workload.min_gpu_tokens:
            plan = with_gpu_tokens(self.plan, tokens)
            self.device.arena.peak_bytes = 0
            self.cache.shrink(plan)
            self.device.arena.budget_bytes = plan.gpu_memory_bytes
            self.cache.grow(plan)
            assert self.device.arena.peak_bytes <= max(plan.gpu_memory_bytes, self.plan.gpu_memory_bytes)
            assert self.device.arena.used_bytes["kv"] == plan.gpu_memory_bytes
            self.plan = plan

    @invariant()
    def pinned_pages_are_those_of_the_plan(self):
        if hasattr(self, "cache"):
            assert self.device.pinned.used_bytes.get("kv", 0) == self.pinned_bytes

    @precondition(lambda self: any(pool.idle for pool in self.cache.pools))
    @rule()
    def forget(self):
        self.cache.forget_prefixes()

    @invariant()
    def everything_visible_is_readable(self):
        for layer, (index, place) in getattr(self, "cache", None) and self.cache.places.items() or ():
            pool = self.cache.pools[index]
            for sequence, tokens, _ in self.open:
                assert len(tokens) == sequence.length
                first, boundary = pool.first_visible(len(tokens)), pool.boundary(sequence.id)
                split = max(first, boundary)
                self.read(pool.host, place, layer, pool.gpu_kv_heads, sequence, tokens, first, len(tokens))
                self.read(pool.spilled, place, layer, 0, sequence, tokens, first, split)
                self.read(pool.recent, place, layer, 0, sequence, tokens, split, len(tokens))

    def read(self, store, place, layer, head, sequence, tokens, start, stop):
        if store is not None and start < stop:
            slots = store.slots(sequence.id, torch.arange(start, stop))
            values = numbers(tokens, start, stop, layer, head, store.kv_heads)
            assert torch.equal(store.k[place].view(-1, 2)[slots], values)
            assert torch.equal(store.v[place].view(-1, 2)[slots], -values)

    @invariant()
    def pages_add_up(self):
        """Every page of every store is free or belongs to one page object; nothing reserved is missing."""
        if not hasattr(self, "cache"):
            return
        assert self.device.arena.total_bytes <= self.plan.gpu_memory_bytes
        for pool in self.cache.pools:
            pages = {
                id(page): page for sequence_id in range(self.plan.max_batch) for page in pool.held(sequence_id).values()
            }
            pages |= {id(page): page for page in pool.idle}
            for name, store in pool.stores.items():
                used = [at for page in pages.values() if (at := getattr(page, name)) is not None]
                assert len(used) == len(set(used)) == store.num_pages - store.free_pages
            assert all(page.holders or page.node is not None for page in pages.values())
            assert pool.free_pages >= 0

    def teardown(self):
        """With everything closed and forgotten, every page is free again."""
        if not hasattr(self, "cache"):
            return
        for sequence, _, _ in self.open:
            self.cache.close(sequence)
        self.cache.forget_prefixes()
        assert self.cache.free_sequences == self.plan.max_batch
        for pool in self.cache.pools:
            assert pool.free_pages == pool.capacity
            assert all(store.free_pages == store.num_pages for store in pool.stores.values())
        self.device.close()
        assert self.device.arena.total_bytes == self.device.pinned.total_bytes == 0


def test_the_cache_is_a_list_of_tokens():
    run_state_machine_as_test(CacheMachine, settings=MACHINE)


def planted(cls, name, bug):
    """Replace a method by `bug(original, self, *arguments)`."""
    original = getattr(cls, name)
    return cls, name, lambda self, *arguments: bug(original, self, *arguments)


def copy_lost(original, self, *arguments):
    """The first move of every batch is not made."""
    self._queued = self._queued[1:]
    original(self)


def any_path(original, self, tokens):
    """The first child, whatever its tokens."""
    node, path = self._root, []
    while node.children and len(path) < len(tokens) // self._page_size:
        node = next(iter(node.children.values()))
        path.append(node)
    return path


def freed_for_all(original, self, sequence_id, logical):
    """A page that others still hold is freed."""
    self.held(sequence_id)[logical].holders.clear()
    original(self, sequence_id, logical)


BUGS = {
    "a move is lost": planted(PageMoves, "start", copy_lost),
    "a boundary one page early": planted(
        CachePool, "boundary", lambda original, self, sequence_id: max(0, original(self, sequence_id) - self.page_size)
    ),
    "a page is never freed": planted(PageStores, "free", lambda original, self, page: None),
    "a forgotten page stays": planted(CachePool, "drop", lambda original, self, page: None),
    "a prefix is not compared": planted(PrefixTree, "_path", any_path),
    "a page goes with its first holder": planted(CachePool, "_let_go", freed_for_all),
    "a reservation is not kept": planted(CachePool, "reserve", lambda original, self, sequence_id, tokens: None),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises((AssertionError, MemoryBudgetError, KeyError, AttributeError, TypeError, ExceptionGroup)):
        run_state_machine_as_test(
            CacheMachine,
            settings=settings(MACHINE, max_examples=300, report_multiple_bugs=False, derandomize=True, phases=GENERATE),
        )


def diverged_twins():
    """A sequence and its fork write different tokens to the page that was partly filled."""
    machine = CacheMachine()
    machine.start(page_size=3, window=0, gpu_kv_heads=1, spare_pages=4, batch=2, kv_tokens=None)
    machine.open.append((machine.cache.open(20), [], 20))
    machine.step(*machine.open[0], [0, 1, 0, 1])
    machine.open.append((machine.cache.fork(machine.open[0][0], 20), [0, 1, 0, 1], 20))
    machine.step(*machine.open[1], [1])
    machine.step(*machine.open[0], [0])
    return machine


def test_a_fork_shares_full_pages_and_owns_its_tail():
    machine = diverged_twins()
    machine.everything_visible_is_readable()
    machine.pages_add_up()
    full, tail = (sorted(page.holders) for page in machine.cache.pools[0].held(0).values())

    assert ([0, 1], [0]) == (full, tail)
    machine.teardown()


def test_planted_bug_a_tail_that_stays_shared_is_caught(monkeypatch):
    monkeypatch.setattr(*planted(CachePool, "own_tail", lambda original, self, *arguments: None))
    with pytest.raises(AssertionError):
        diverged_twins().everything_visible_is_readable()
