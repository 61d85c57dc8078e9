"""Drafts that are right as often as one wishes, where the answer is known already: what an acceptance is worth.

It works on any weights, random ones too, and leaves the answer as it is, since the sampler goes on drawing it.
"""

import random
from collections.abc import Sequence


class OracleDrafter:
    """Drafts an answer's own tokens, each with a probability, and else another one. seed: of which are wrong."""

    def __init__(self, answer: Sequence[int], acceptance: float, vocab_size: int, seed: int = 0) -> None:
        self._answer, self._acceptance, self._vocab_size = answer, acceptance, vocab_size
        self._draw = random.Random(seed)

    def draft(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> list[int]:
        """As `Drafter`."""
        right = self._answer[len(generated_ids) : len(generated_ids) + count]
        return [each if self._draw.random() < self._acceptance else (each + 1) % self._vocab_size for each in right]

    def close(self) -> None:
        """As `Drafter`; it holds nothing."""
