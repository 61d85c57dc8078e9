"""A small model of the same vocabulary as drafter: its greedy tokens are the guesses (Leviathan et al., 2211.17192).

It has an engine and a cache of its own. A request's sequence in that cache holds the text as far as drafts were made
from it, the last of them included; what turns out to be other text is taken back, as from the large model's cache.
"""

from collections.abc import Sequence

import torch

from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.greatest import greatest
from hetero_attn.ops.step import Rows

FEW_ROWS = 4  # new tokens that are computed as rows of a step; more of them are a prompt's chunk


class DraftModel:
    """An engine that drafts for any number of requests, one after another.

    vocab_size: of ids that it may be given and may guess. step_share: what one of its steps is expected to take, over a
    step of the model that it drafts for.
    """

    def __init__(self, engine: Engine, vocab_size: int, step_share: float) -> None:
        self.engine = engine
        self.vocab_size = min(vocab_size, engine.config.vocab_size)
        self.step_share = step_share

    def drafter(self) -> "ModelDrafter":
        """A drafter for one request."""
        return ModelDrafter(self)

    def close(self) -> None:
        """Release its threads and memory; idempotent."""
        self.engine.close()


class ModelDrafter:
    """What the draft model guesses of one request; drafts nothing where the request has no place in its cache."""

    def __init__(self, model: DraftModel) -> None:
        self._model, self._engine = model, model.engine
        self._sequence: SequenceState | None = None
        self._held: list[int] = []  # the tokens in the cache
        self._read = 0  # how many of them are of the text, as far as it is known

    def draft(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> list[int]:
        """As `Drafter`."""
        text = [*prompt_ids, *generated_ids]
        count = min(count, self._engine.plan.max_context - len(text))
        if count < 1 or not self._knows(text) or not self._takes(text, len(text) + count):
            return []
        sequence = self._sequence
        assert sequence is not None
        kept = min(self._agreeing(text), sequence.length)
        if not self._engine.kv_cache.rewind(sequence, kept):  # a window has let go of what is seen from there
            self.close()
            return []
        self._held, self._read = text[:kept], kept
        logits = self._computed(sequence, text[kept:])
        self._held, self._read = text, len(text)
        return self._continued(sequence, logits, count)

    def close(self) -> None:
        """Give the place in the cache back; what was computed is kept for texts that begin alike."""
        if self._sequence is not None:
            cache = self._engine.kv_cache
            cache.remember(self._sequence, self._held[: self._sequence.length])
            cache.close(self._sequence)
        self._sequence, self._held, self._read = None, [], 0

    def _knows(self, text: list[int]) -> bool:
        """Whether the model has an embedding for what is new in the text."""
        return all(token_id < self._model.vocab_size for token_id in text[self._read :])

    def _takes(self, text: list[int], tokens: int) -> bool:
        """Hold a sequence with room for so many tokens, new ones with what is known of the text."""
        cache = self._engine.kv_cache
        if self._sequence is not None:
            return cache.extend(self._sequence, tokens)
        if not cache.has_room(tokens):
            return False
        self._sequence = cache.open(tokens)
        self._read = cache.reuse(self._sequence, text[:-1])
        self._held = text[: self._read]
        return True

    def _agreeing(self, text: list[int]) -> int:
        """How many tokens of the cache are the text's; its last token is left, whose logits are wanted."""
        agreeing, most = min(self._read, len(text) - 1), min(len(self._held), len(text) - 1)
        while agreeing < most and self._held[agreeing] == text[agreeing]:
            agreeing += 1
        return agreeing

    def _computed(self, sequence: SequenceState, token_ids: list[int]) -> torch.Tensor:
        """Append tokens; the last one's logits."""
        engine = self._engine
        if len(token_ids) <= min(FEW_ROWS, engine.most_single_rows):
            return engine.run([Rows(sequence, token_ids)], copy=False)[0][-1]
        logits = None
        for start in range(0, len(token_ids), engine.prefill_chunk):
            chunk = token_ids[start : start + engine.prefill_chunk]
            logits = engine.prefill(sequence, chunk, logits=start + len(chunk) == len(token_ids))
        assert logits is not None
        return logits

    def _continued(self, sequence: SequenceState, logits: torch.Tensor, count: int) -> list[int]:
        """The greedy tokens behind the text, all but the last of them in the cache."""
        drafted = [greatest(logits[: self._model.vocab_size])]
        while len(drafted) < count:
            (logits,) = self._engine.decode_step([sequence], drafted[-1:], copy=False)
            self._held.append(drafted[-1])
            drafted.append(greatest(logits[: self._model.vocab_size]))
        return drafted
