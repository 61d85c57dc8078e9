"""The KV cache: every layer's keys and values for the sequences that are open, and for prompts that may come again.

Layers whose plan places their cache alike form a `CachePool`; all layers of a pool share page numbers and tables. A
sequence reserves the pages of its prompt and answer when it is opened, so nothing that runs is ever evicted. Pages that
nobody needs any more are kept for prompts that begin alike until their memory is wanted.
"""

from collections.abc import Hashable, Sequence

from hetero_attn.cache.pool import CachePool, SequenceState
from hetero_attn.cache.prefix_states import PrefixStates
from hetero_attn.cache.prefix_tree import PrefixTree
from hetero_attn.cache.states import FixedStates
from hetero_attn.devices import Device
from hetero_attn.errors import MemoryBudgetError
from placement.plan.plan import Plan


class KVCache:
    """Keys and values of up to `plan.max_batch` sequences. device: None without a GPU.

    prefix_cache: keep what ended sequences computed, for prompts that begin with the same tokens.
    """

    def __init__(self, plan: Plan, device: Device | None, prefix_cache: bool = True) -> None:
        self._plan = plan
        self._free_ids = list(range(plan.max_batch - 1, -1, -1))
        self._open: dict[int, SequenceState] = {}
        kinds: dict[tuple[int, ...], list[int]] = {}
        for index, (placement, shard) in enumerate(zip(plan.kv, plan.workload.kv, strict=True)):
            sizes = (shard.kv_heads, shard.head_dim, shard.bytes_per_token, shard.window)
            kind = (placement.gpu_kv_heads, placement.gpu_tokens, *sizes)
            kinds.setdefault(kind, []).append(index)
        self.pools = tuple(CachePool(plan, indices, device) for indices in kinds.values())
        # layer -> (index of its pool, its place in that pool)
        self.places = {
            plan.workload.kv[shard].layer: (index, place)
            for index, pool in enumerate(self.pools)
            for place, shard in enumerate(pool.layers)
        }
        self.states = FixedStates(plan, device)
        self.prefix_states = PrefixStates(plan, self.states)
        self._tree = PrefixTree(self.pools, self.prefix_states) if prefix_cache and self.pools else None

    @property
    def free_sequences(self) -> int:
        """How many more sequences can be opened, if there are pages for them."""
        return len(self._free_ids)

    @property
    def max_new_pages(self) -> int | None:
        """The most pages that one step may begin (`new_pages` of every sequence's tokens), None without a limit."""
        return min((limit for pool in self.pools if (limit := pool.max_new_pages) is not None), default=None)

    def new_pages(self, tokens: int) -> int:
        """The most pages that so many new tokens of a sequence begin beside the one that it keeps anyway."""
        return -(-max(0, tokens - 1) // self._plan.page_size)

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of one sequence that a single step may append."""
        pages = self.max_new_pages
        return self._plan.max_context if pages is None else pages * self._plan.page_size

    def has_room(self, tokens: int) -> bool:
        """Whether a sequence of at most `tokens` tokens can be opened now."""
        return self.free_sequences > 0 and all(pool.pages_for(tokens) <= pool.free_pages for pool in self.pools)

    def open(self, tokens: int | None = None) -> SequenceState:
        """Start an empty sequence and reserve its pages.

        tokens: the most it will hold, None for the whole context. Raises MemoryBudgetError when there is no room.
        """
        tokens = self._plan.max_context if tokens is None else tokens
        if not self.has_room(tokens):
            raise MemoryBudgetError(
                f"no room for a sequence of {tokens} tokens: {self.free_sequences} of {self._plan.max_batch} sequences "
                f"and {self._free_tokens} KV slots are free; close a sequence, or raise max_batch or kv_tokens at load"
            )
        sequence = SequenceState(self._free_ids.pop())
        self._open[sequence.id] = sequence
        for pool in self.pools:
            pool.reserve(sequence.id, tokens)
        self.states.clear(sequence.id)
        return sequence

    @property
    def _free_tokens(self) -> int:
        """KV slots that no sequence has reserved in any layer."""
        pages = min((pool.free_pages for pool in self.pools), default=0)
        return pages * self._plan.page_size

    def extend(self, sequence: SequenceState, tokens: int) -> bool:
        """Reserve pages for `tokens` tokens of an open sequence in all; False, and nothing is done, without room."""
        missing = [pool.pages_for(tokens) - pool.reserved(sequence.id) for pool in self.pools]
        if any(pages > pool.free_pages for pages, pool in zip(missing, self.pools, strict=True)):
            return False
        for pool in self.pools:
            pool.reserve(sequence.id, max(tokens, pool.reserved(sequence.id) * pool.page_size))
        return True

    def close(self, sequence: SequenceState) -> None:
        """End a sequence and let go of its pages."""
        for pool in self.pools:
            pool.end(sequence.id)
        self.prefix_states.release(sequence.id)
        self.states.forget(sequence.id)
        del self._open[sequence.id]
        self._free_ids.append(sequence.id)

    def fork(self, sequence: SequenceState, tokens: int | None = None) -> SequenceState:
        """Open a sequence that begins with all tokens of another; full pages are shared, a partly filled one copied.

        tokens: as for `open`. Raises MemoryBudgetError when there is no room.
        """
        twin = self.open(tokens)
        for pool in self.pools:
            pool.share(twin.id, [page for _, page in sorted(pool.held(sequence.id).items())])
        twin.length = sequence.length
        self.states.copy(twin.id, sequence.id)
        self._own_tails(twin)
        return twin

    def rewind(self, sequence: SequenceState, length: int) -> bool:
        """Forget the tokens from `length` on; False, and nothing is done, where a window has let go of what is seen, or
        a layer's state of fixed size has taken them in: all but the drafts of the last step, see `states`."""
        back = sequence.length - length if self.states else 0
        if back > self.states.waiting(sequence.id):
            return False
        for pool in self.pools:
            first, held = pool.first_visible(length) // pool.page_size, pool.held(sequence.id)
            if any(logical not in held for logical in range(first, -(-length // pool.page_size))):
                return False
        for pool in self.pools:
            pool.cut(sequence.id, length)
        self.states.take_back(sequence.id, back)
        sequence.length = length
        self._own_tails(sequence)
        return True

    @property
    def takes_back(self) -> bool:
        """Whether sequences can be rewound to in front of a step's drafts."""
        return not self.states or self.states.holds(1)

    def make_room(self, sequence: SequenceState, new_tokens: int) -> None:
        """Hold pages for `new_tokens` more of this sequence; `length` itself moves when the step has written them."""
        for pool in self.pools:
            pool.make_room(sequence, new_tokens, tuple(self._open.values()))

    def wait_for_moves(self) -> None:
        """Let compute queued from now on find all pages in place: a recorded step has no waits of its own for them."""
        for pool in self.pools:
            if pool.moves is not None:
                for layer in range(len(pool.layers)):
                    pool.moves.wait(layer)

    def shrink(self, plan: Plan) -> None:
        """Give back GPU memory beyond what this plan keeps; nothing queued may use the cache."""
        for pool in self.pools:
            pool.shrink(_gpu_tokens(pool, plan), tuple(self._open.values()))

    def grow(self, plan: Plan, anew: bool = False) -> None:
        """Take the GPU memory that this plan keeps; nothing queued may use the cache. Raises MemoryBudgetError.

        anew: every store gets another place, also one whose size stays.
        """
        for pool in self.pools:
            pool.grow(_gpu_tokens(pool, plan), tuple(self._open.values()), anew)

    @property
    def remembers(self) -> bool:
        """Whether prompts that begin alike find what earlier ones stored."""
        return self._tree is not None

    def stored(self, token_ids: Sequence[Hashable]) -> int:
        """How many of `token_ids`, from the first on, `reuse` would find."""
        return 0 if self._tree is None else self._tree.match(token_ids)

    def reuse(self, sequence: SequenceState, token_ids: Sequence[Hashable]) -> int:
        """Begin an empty sequence with the stored part of `token_ids`, whole pages; returns how many tokens that is.

        Where layers keep states of fixed size, the sequence's are kept as it grows: behind its last whole page of
        `token_ids` and the one before, since what follows an answer may part from its prompt's last tokens, and where
        others have parted from it.
        """
        if self._tree is None:
            return 0
        prefix = self._tree.find(token_ids)
        for pool, pages in zip(self.pools, prefix.pages, strict=True):
            pool.share(sequence.id, pages)
        sequence.length = prefix.tokens
        if self.prefix_states:
            if prefix.end is not None:
                self.prefix_states.restore(sequence.id, prefix.end)
            size = self._plan.page_size
            last = len(token_ids) // size * size
            for length in (last, last - size, prefix.shared_tokens):
                self.keep_state(sequence, length)
        return sequence.length

    def keep_state(self, sequence: SequenceState, length: int) -> bool:
        """Keep the states of fixed size of a sequence when it has so many tokens, whole pages.

        Returns whether prompts that begin alike can then go on from there; without such states they always can.
        """
        if not self.prefix_states:
            return True
        return length > sequence.length and self.prefix_states.want(sequence.id, length)

    def remember(self, sequence: SequenceState, token_ids: Sequence[Hashable]) -> None:
        """Keep the full pages of a sequence's first tokens, which are `token_ids` and stored, for later prompts."""
        if self._tree is not None:
            self._tree.remember(sequence.id, token_ids)

    def forget_prefixes(self) -> None:
        """Free every page that no open sequence holds."""
        if self._tree is not None:
            self._tree.clear()

    def _own_tails(self, sequence: SequenceState) -> None:
        for pool in self.pools:
            pool.own_tail(sequence, tuple(self._open.values()))


def _gpu_tokens(pool: CachePool, plan: Plan) -> int:
    return min(plan.kv[layer].gpu_tokens for layer in pool.layers)
