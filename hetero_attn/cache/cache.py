"""The KV cache: every layer's keys and values for the sequences that are open, and for prompts that may come again.

Layers whose plan places their cache alike form a `LayerGroup`; all layers of a group share page numbers and tables. A
sequence reserves the pages of its prompt and answer when it is opened, so nothing that runs is ever evicted. Pages that
nobody needs any more are kept for prompts that begin alike until their memory is wanted.
"""

from collections.abc import Sequence

from hetero_attn.cache.pool import LayerGroup, SequenceState
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
        self._free_slots = list(range(plan.max_batch - 1, -1, -1))
        self._open: dict[int, SequenceState] = {}
        kinds: dict[tuple[int, ...], list[int]] = {}
        for index, (placement, shard) in enumerate(zip(plan.kv, plan.workload.kv, strict=True)):
            kind = (placement.gpu_groups, placement.gpu_tokens, shard.groups, shard.bytes_per_token, shard.window)
            kinds.setdefault(kind, []).append(index)
        self.layer_groups = tuple(LayerGroup(plan, indices, device) for indices in kinds.values())
        # layer -> (index of its layer group, its place in that group)
        self.places = {
            plan.workload.kv[shard].layer: (index, place)
            for index, group in enumerate(self.layer_groups)
            for place, shard in enumerate(group.layers)
        }
        self.states = FixedStates(plan, device)
        # What a state of fixed size held at the end of a prefix is gone when the sequence has grown beyond it.
        self._tree = PrefixTree(self.layer_groups) if prefix_cache and not self.states else None

    @property
    def free_slots(self) -> int:
        """How many more sequences can be opened, if there are pages for them."""
        return len(self._free_slots)

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of one sequence that a single step may append."""
        limits = [limit for group in self.layer_groups if (limit := group.max_new_tokens) is not None]
        return min(limits, default=self._plan.max_context)

    def has_room(self, tokens: int) -> bool:
        """Whether a sequence of at most `tokens` tokens can be opened now."""
        return self.free_slots > 0 and all(group.pages_for(tokens) <= group.free_pages for group in self.layer_groups)

    def open(self, tokens: int | None = None) -> SequenceState:
        """Start an empty sequence and reserve its pages.

        tokens: the most it will hold, None for the whole context. Raises MemoryBudgetError when there is no room.
        """
        tokens = self._plan.max_context if tokens is None else tokens
        if not self.has_room(tokens):
            raise MemoryBudgetError(
                f"no room for a sequence of {tokens} tokens: {self.free_slots} of {self._plan.max_batch} sequences and "
                f"{self._free_tokens} KV slots are free; "
                "close a sequence, or raise max_batch or kv_tokens at load"
            )
        sequence = SequenceState(self._free_slots.pop())
        self._open[sequence.slot] = sequence
        for group in self.layer_groups:
            group.reserve(sequence.slot, tokens)
        self.states.clear(sequence.slot)
        return sequence

    @property
    def _free_tokens(self) -> int:
        """KV slots that no sequence has reserved in any layer."""
        pages = min((group.free_pages for group in self.layer_groups), default=0)
        return pages * self._plan.page_size

    def extend(self, sequence: SequenceState, tokens: int) -> bool:
        """Reserve pages for `tokens` tokens of an open sequence in all; False, and nothing is done, without room."""
        missing = [group.pages_for(tokens) - group.reserved(sequence.slot) for group in self.layer_groups]
        if any(pages > group.free_pages for pages, group in zip(missing, self.layer_groups, strict=True)):
            return False
        for group in self.layer_groups:
            group.reserve(sequence.slot, max(tokens, group.reserved(sequence.slot) * group.page_size))
        return True

    def close(self, sequence: SequenceState) -> None:
        """End a sequence and let go of its pages."""
        for group in self.layer_groups:
            group.end(sequence.slot)
        del self._open[sequence.slot]
        self._free_slots.append(sequence.slot)

    def fork(self, sequence: SequenceState, tokens: int | None = None) -> SequenceState:
        """Open a sequence that begins with all tokens of another; full pages are shared, a partly filled one copied.

        tokens: as for `open`. Raises MemoryBudgetError when there is no room.
        """
        twin = self.open(tokens)
        for group in self.layer_groups:
            group.share(twin.slot, [page for _, page in sorted(group.held(sequence.slot).items())])
        twin.length = sequence.length
        self.states.copy(twin.slot, sequence.slot)
        self._own_tails(twin)
        return twin

    def rewind(self, sequence: SequenceState, length: int) -> bool:
        """Forget the tokens from `length` on; False, and nothing is done, where a window has let go of what is seen, or
        a layer's state of fixed size has taken them in."""
        if self.states and length != sequence.length:
            return False
        for group in self.layer_groups:
            first, held = group.first_visible(length) // group.page_size, group.held(sequence.slot)
            if any(logical not in held for logical in range(first, -(-length // group.page_size))):
                return False
        for group in self.layer_groups:
            group.cut(sequence.slot, length)
        sequence.length = length
        self._own_tails(sequence)
        return True

    def make_room(self, sequence: SequenceState, new_tokens: int) -> None:
        """Hold pages for `new_tokens` more of this sequence; `length` itself moves when the step has written them."""
        for group in self.layer_groups:
            group.make_room(sequence, new_tokens, tuple(self._open.values()))

    def wait_for_moves(self) -> None:
        """Let compute queued from now on find all pages in place: a recorded step has no waits of its own for them."""
        for group in self.layer_groups:
            for layer in range(len(group.layers)):
                if group.moves is not None:
                    group.moves.wait(layer)

    def shrink(self, plan: Plan) -> None:
        """Give back GPU memory beyond what this plan keeps; nothing queued may use the cache."""
        for group in self.layer_groups:
            group.shrink(_gpu_tokens(group, plan), tuple(self._open.values()))

    def grow(self, plan: Plan, anew: bool = False) -> None:
        """Take the GPU memory that this plan keeps; nothing queued may use the cache. Raises MemoryBudgetError.

        anew: every store gets another place, also one whose size stays.
        """
        for group in self.layer_groups:
            group.grow(_gpu_tokens(group, plan), tuple(self._open.values()), anew)

    @property
    def remembers(self) -> bool:
        """Whether prompts that begin alike find what earlier ones stored."""
        return self._tree is not None

    def stored(self, token_ids: Sequence[int]) -> int:
        """How many of `token_ids`, from the first on, `reuse` would find."""
        return 0 if self._tree is None else self._tree.match(token_ids)

    def reuse(self, sequence: SequenceState, token_ids: Sequence[int]) -> int:
        """Begin an empty sequence with the stored part of `token_ids`, whole pages; returns how many tokens that is."""
        if self._tree is None:
            return 0
        for group, pages in zip(self.layer_groups, self._tree.pages(token_ids), strict=True):
            group.share(sequence.slot, pages)
        sequence.length = self._tree.match(token_ids)
        return sequence.length

    def remember(self, sequence: SequenceState, token_ids: Sequence[int]) -> None:
        """Keep the full pages of a sequence's first tokens, which are `token_ids` and stored, for later prompts."""
        if self._tree is not None:
            self._tree.remember(sequence.slot, token_ids)

    def forget_prefixes(self) -> None:
        """Free every page that no open sequence holds."""
        if self._tree is not None:
            self._tree.clear()

    def _own_tails(self, sequence: SequenceState) -> None:
        for group in self.layer_groups:
            group.own_tail(sequence, tuple(self._open.values()))


def _gpu_tokens(group: LayerGroup, plan: Plan) -> int:
    return min(plan.kv[layer].gpu_tokens for layer in group.layers)
