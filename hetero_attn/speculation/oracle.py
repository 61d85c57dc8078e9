"""Drafts that are right as often as one wishes, where the answer is known already: what an acceptance is worth.

They work on any weights, random ones too, and leave the answer as it is, since the sampler goes on drawing it.
"""

import random
from collections.abc import Sequence

from hetero_attn.speculation.drafter import Kind, NgramDrafter


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


class TwinDrafter:
    """Drafts an answer's own tokens where n-grams are right about another model's text, and else other ones: what such
    a text would gain on a model whose own answer does not repeat itself.

    prompt, twin: the other model's text; answer: the own one.
    """

    def __init__(self, prompt: Sequence[int], twin: Sequence[int], answer: Sequence[int], vocab_size: int) -> None:
        self._prompt, self._twin, self._answer, self._vocab_size = prompt, twin, answer, vocab_size
        self._ngrams = NgramDrafter()

    def kind(self, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> Kind | None:
        """As `Sorting`, of the other text."""
        return self._ngrams.kind(self._prompt, self._twin[: len(generated_ids)])

    def draft(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> list[int]:
        """As `Drafter`."""
        made = len(generated_ids)
        guessed = self._ngrams.draft(self._prompt, self._twin[:made], count)
        places = zip(guessed, self._twin[made:], self._answer[made:], strict=False)
        return [own if guess == other else (own + 1) % self._vocab_size for guess, other, own in places]

    def close(self) -> None:
        """As `Drafter`; it holds nothing."""
