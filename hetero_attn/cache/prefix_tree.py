"""Which prompts have been computed before: a tree whose every edge is one page of token ids.

Tokens are ids, or whatever else says what a row was computed from. A path from the root spells a prefix, compared token
by token, and its nodes know the pages that hold the keys and values of that prefix in every pool. A page may be taken
for something else at any time when no sequence holds it; the prefix is then shorter. A layer with a sliding window
needs only the pages that the window still sees. Where layers keep states of fixed size, a prefix can be gone on from
where one was kept.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from hetero_attn.cache.pages import Node, Page
from hetero_attn.cache.pool import CachePool
from hetero_attn.cache.prefix_states import PrefixStates


@dataclass(frozen=True, slots=True)
class Prefix:
    """What is stored of a sequence's first tokens.

    tokens: how many those are, in whole pages. pages: of each pool, what a next token would see of them. shared_tokens:
    how many others had too, in whole pages, stored or not: where prompts part. end: the node behind the last of
    `tokens`, None where there are none.
    """

    tokens: int
    pages: list[list[Page]]
    shared_tokens: int
    end: Node | None


class PrefixTree:
    """Remembers the full pages of sequences. states: those kept at nodes."""

    def __init__(self, pools: Sequence[CachePool], states: PrefixStates) -> None:
        self._pools, self._states = pools, states
        self._page_size = pools[0].page_size
        self._root = Node(None, (), [])
        for pool in pools:
            pool.forget = self.forget

    def match(self, token_ids: Sequence[Hashable]) -> int:
        """How many leading tokens are stored, in whole pages; looks only, takes nothing."""
        return self._usable(self._path(token_ids)) * self._page_size

    def find(self, token_ids: Sequence[Hashable]) -> Prefix:
        """What is stored of these tokens; looks only, takes nothing."""
        path = self._path(token_ids)
        count = self._usable(path)
        pages = [
            [node.pages[index] for node in path[self._first_page(pool, count) : count]]
            for index, pool in enumerate(self._pools)
        ]
        size = self._page_size
        return Prefix(count * size, pages, len(path) * size, path[count - 1] if count else None)

    def remember(self, sequence_id: int, token_ids: Sequence[Hashable]) -> None:
        """Note the pages that a sequence holds of its first tokens, which must all be stored."""
        node, size = self._root, self._page_size
        for logical in range(len(token_ids) // size):
            tokens = tuple(token_ids[logical * size : (logical + 1) * size])
            if tokens not in node.children:
                node.children[tokens] = Node(node, tokens, [None] * len(self._pools))
            node = node.children[tokens]
            for index, pool in enumerate(self._pools):
                self._note(node, index, pool.held(sequence_id).get(logical))
            self._states.settle(sequence_id, (logical + 1) * size, node)
        self._prune(node)

    def forget(self, page: Page) -> None:
        """Let a page be used for something else; frees it at once when no sequence holds it."""
        node = page.node
        self._states.drop(node)
        for index, pool in enumerate(self._pools):
            if node.pages[index] is page:
                node.pages[index], page.node = None, None
                pool.drop(page)
        self._prune(node)

    def clear(self) -> None:
        """Forget everything."""
        waiting = [self._root]
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            for page in node.pages:
                if page is not None:
                    self.forget(page)

    def _note(self, node: Node, index: int, page: Page | None) -> None:
        """Remember a page of a pool at a node, also in the place of one that nobody holds: of two that say the same the
        one of latest use stays, as long as what follows it."""
        known = node.pages[index]
        if page is None or page.node is not None or (known is not None and known.holders):
            return
        node.pages[index], page.node = page, node
        if known is not None:
            known.node = None
            self._pools[index].drop(known)

    def _path(self, token_ids: Sequence[Hashable]) -> list[Node]:
        node, path, size = self._root, [], self._page_size
        for start in range(0, len(token_ids) - size + 1, size):
            node = node.children.get(tuple(token_ids[start : start + size]))
            if node is None:
                break
            path.append(node)
        return path

    def _usable(self, path: list[Node]) -> int:
        """The most pages of a path of which every pool stores what a next token would see."""
        count = len(path)
        for index, pool in enumerate(self._pools):
            if not pool.window:
                count = next((i for i in range(count) if path[i].pages[index] is None), count)
        while count and not self._goes_on(path, count):
            count -= 1
        return count

    def _goes_on(self, path: list[Node], count: int) -> bool:
        if self._states and path[count - 1] not in self._states:
            return False
        return all(self._is_stored(index, path, count) for index in range(len(self._pools)))

    def _is_stored(self, index: int, path: list[Node], count: int) -> bool:
        first = self._first_page(self._pools[index], count)
        return all(node.pages[index] is not None for node in path[first:count])

    def _first_page(self, pool: CachePool, count: int) -> int:
        return pool.first_visible(count * self._page_size) // self._page_size

    def _prune(self, node: Node) -> None:
        while node.parent is not None and not node.children and not any(node.pages):
            del node.parent.children[node.tokens]
            node = node.parent
