"""An index of a text that grows: where did its end occur before, and what came next?

A suffix automaton (Blumer et al. 1985) has a state for each set of positions at which some substrings end. Behind an
appended token, the suffix link of the newest state is the longest suffix that occurred before: nothing is searched.
There are at most two states and three transitions a token, and none is ever taken back, so appending is O(1) amortised.
"""

LATEST_LINKS = 8  # how many suffixes are told of a newer occurrence; the longest ones, which drafts are made from


class SuffixAutomaton:
    """The tokens appended so far, and for each of their substrings a place where it ended."""

    __slots__ = ("_ends", "_last", "_lengths", "_links", "_nexts", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._nexts: list[dict[int, int]] = [{}]
        self._links, self._lengths, self._ends = [-1], [0], [-1]
        self._last = 0

    def append(self, token_id: int) -> None:
        """Take the next token."""
        self._prefer_latest()
        position = len(self.tokens)
        self.tokens.append(token_id)
        nexts, links = self._nexts, self._links
        newest, state = self._state(self._lengths[self._last] + 1, 0, position, {}), self._last
        while state >= 0 and token_id not in nexts[state]:
            nexts[state][token_id] = newest
            state = links[state]
        if state >= 0:
            links[newest] = self._ending(state, token_id)
        self._last = newest

    def match(self) -> tuple[int, int]:
        """(length of the longest suffix that occurred before, the position at which that occurrence ends)."""
        state = self._links[self._last]
        return (0, -1) if state <= 0 else (self._lengths[state], self._ends[state])

    def draft(self, count: int, least_match: int = 2) -> list[int]:
        """At most `count` tokens that came after the last occurrence of the longest suffix that occurred before.

        None for a suffix shorter than `least_match`. An occurrence that reaches into the suffix itself is a period,
        which goes on; so does what ends before `count` of them.
        """
        length, end = self.match()
        if length < least_match:
            return []
        known, drafted = len(self.tokens), []
        for place in range(end + 1, end + 1 + count):
            drafted.append(self.tokens[place] if place < known else drafted[place - known])
        return drafted

    def _ending(self, state: int, token_id: int) -> int:
        """The state of `state`'s longest substring and the token alone, split from longer ones if need be."""
        nexts, links, lengths = self._nexts, self._links, self._lengths
        target = nexts[state][token_id]
        if lengths[target] == lengths[state] + 1:
            return target
        clone = self._state(lengths[state] + 1, links[target], self._ends[target], dict(nexts[target]))
        while state >= 0 and nexts[state].get(token_id) == target:
            nexts[state][token_id] = clone
            state = links[state]
        links[target] = clone
        return clone

    def _state(self, length: int, link: int, end: int, following: dict[int, int]) -> int:
        self._lengths.append(length)
        self._links.append(link)
        self._ends.append(end)
        self._nexts.append(following)
        return len(self._lengths) - 1

    def _prefer_latest(self) -> None:
        """The suffixes of what is there end at its end too, which is the occurrence to be preferred from now on."""
        state, end = self._links[self._last], len(self.tokens) - 1
        for _ in range(LATEST_LINKS):
            if state <= 0:
                return
            self._ends[state] = end
            state = self._links[state]
