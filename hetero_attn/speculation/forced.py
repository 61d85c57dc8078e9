"""Tokens that a grammar leaves no choice for, as drafts: rows of one pass in place of passes of one row.

A grammar forces text, which may be written by several tokens. What is drafted is the tokenizer's own way; the request's
sampler still draws from every row, under the mask, so that the answer is what it would be token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hetero_attn.speculation.width import WIDTHS

PATIENCE = 4  # passes in which nothing was right, more than others, until a request drafts no more


@dataclass(slots=True)
class Forced:
    """What became of one request's forced tokens. offered: how many the next pass brings. right: those drawn."""

    offered: int = 0
    right: int = 0
    misses: int = 0

    def judge(self, accepted: int) -> None:
        """Count a pass: how many of those that were offered were drawn, from the first on."""
        self.right += accepted
        self.misses = max(0, self.misses - 1) if accepted else self.misses + 1
        self.offered = 0


class Forcing(Protocol):
    """Says what has to come."""

    def forced(self, generated_ids: Sequence[int]) -> list[int]:
        """Tokens that have to come behind these."""
        ...


class Followed(Protocol):
    """What is needed of a request."""

    token_ids: list[int]
    max_tokens: int
    forced: Forced

    @property
    def sampler(self) -> Forcing:
        """What chooses its tokens."""
        ...


def forced_drafts(requests: Sequence[Followed], most_rows: int) -> list[list[int]]:
    """What each request's grammar forces next, for a pass of at most `most_rows` rows, one of each without them."""
    rows, drafts = len(requests), []
    for request in requests:
        room = min(most_rows - rows, WIDTHS[-1] - 1, request.max_tokens - len(request.token_ids) - 1)
        may = room > 0 and request.forced.misses < PATIENCE
        drafts.append(request.sampler.forced(request.token_ids)[:room] if may else [])
        request.forced.offered = len(drafts[-1])
        rows += len(drafts[-1])
    return drafts
