"""A small model of the same vocabulary as drafter: its greedy tokens are the guesses (Leviathan et al., 2211.17192).

It has an engine and a cache of its own. A request's sequence in that cache holds the text as far as drafts were made
from it, the last of them included; what turns out to be other text is taken back, as from the large model's cache.
Drafts of several requests are rows of the same passes.
"""

from collections.abc import Sequence

from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.greatest import greatest
from hetero_attn.ops.step_rows import Rows
from hetero_attn.speculation.drafter import passes
from hetero_attn.speculation.speculator import Asked

FEW_ROWS = 4  # new tokens that are computed as rows of a step; of more, all but the last are a prompt's chunk


class DraftModel:
    """An engine that drafts for any number of requests, all of them in the same passes.

    vocab_size: of ids that it may be given and may guess. step_share: what one of its steps is expected to take, over a
    step of the model that it drafts for. reads: it needs nothing of what that model computes.
    """

    reads = False

    def __init__(self, engine: Engine, vocab_size: int, step_share: float) -> None:
        self.engine = engine
        self.vocab_size = min(vocab_size, engine.config.vocab_size)
        self.step_share = step_share

    def drafter(self) -> "ModelDrafter":
        """A drafter for one request."""
        return ModelDrafter(self)

    def reusable(self, token_ids: Sequence[int], stored: int) -> int:
        """All."""
        return stored

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What each request's drafter guesses: the first pass takes in what is new of every text, each further one the
        guess before."""
        going = [each.drafter for each in asked if each.drafter.begin(*each[1:])]
        while going:
            for group in passes(going, self.engine.most_single_rows):
                work = [Rows(drafter.sequence, drafter.pending) for drafter in group]
                for drafter, logits in zip(group, self.engine.run(work, copy=False), strict=True):
                    drafter.take(greatest(logits[-1, : self.vocab_size]))
            going = [drafter for drafter in going if drafter.is_going]
        return [each.drafter.drafted for each in asked]

    def close(self) -> None:
        """Release its threads and memory; idempotent."""
        self.engine.close()


class ModelDrafter:
    """What the draft model guesses of one request; drafts nothing where the request has no place in its cache.

    sequence: its place there, None without. drafted: of the text that it was last given. pending: the tokens that it
    computes next; guesses follow its last one. is_going: whether more is wanted.
    """

    def __init__(self, model: DraftModel) -> None:
        self._model, self._engine = model, model.engine
        self.sequence: SequenceState | None = None
        self.drafted: list[int] = []
        self.pending: list[int] = []
        self._wanted = 0
        self._held: list[int] = []  # the tokens in the cache
        self._read = 0  # how many of them are of the text, as far as it is known

    @property
    def is_going(self) -> bool:
        """Whether fewer were drafted than were asked for."""
        return len(self.drafted) < self._wanted

    def begin(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> bool:
        """Hold all of a text but what is `pending`, and room for `count` drafts behind it; False for none of them."""
        text, self.drafted = [*prompt_ids, *generated_ids], []
        self._wanted = count = min(count, self._engine.plan.max_context - len(text))
        if count < 1 or not self._knows(text) or not self._takes(text, len(text) + count):
            return False
        kept = min(self._agreeing(text), self.sequence.length)
        if not self._engine.kv_cache.rewind(self.sequence, kept):  # a window has let go of what is seen from there
            self.close()
            return False
        self._held, self._read, self.pending = text[:kept], kept, text[kept:]
        if len(self.pending) > min(FEW_ROWS, self._engine.most_single_rows):
            self._prefill(self.pending[:-1])
            self.pending = self.pending[-1:]
        return True

    def take(self, token_id: int) -> None:
        """Count what was pending as computed, and what is guessed behind it."""
        self._held += self.pending
        self._read += 0 if self.drafted else len(self.pending)
        self.drafted.append(token_id)
        self.pending = [token_id]

    def close(self) -> None:
        """Give the place in the cache back; what was computed is kept for texts that begin alike."""
        if self.sequence is not None:
            cache = self._engine.kv_cache
            cache.remember(self.sequence, self._held[: self.sequence.length])
            cache.close(self.sequence)
        self.sequence, self._held, self._read = None, [], 0

    def _knows(self, text: list[int]) -> bool:
        """Whether the model has an embedding for what is new in the text."""
        return all(token_id < self._model.vocab_size for token_id in text[self._read :])

    def _takes(self, text: list[int], tokens: int) -> bool:
        """Hold a sequence with room for so many tokens, new ones with what is known of the text."""
        cache = self._engine.kv_cache
        if self.sequence is not None:
            return cache.extend(self.sequence, tokens)
        if not cache.has_room(tokens):
            return False
        self.sequence = cache.open(tokens)
        self._read = cache.reuse(self.sequence, text[:-1])
        self._held = text[: self._read]
        return True

    def _agreeing(self, text: list[int]) -> int:
        """How many tokens of the cache are the text's; its last token is left, whose logits are wanted."""
        agreeing, most = min(self._read, len(text) - 1), min(len(self._held), len(text) - 1)
        while agreeing < most and self._held[agreeing] == text[agreeing]:
            agreeing += 1
        return agreeing

    def _prefill(self, token_ids: list[int]) -> None:
        for start in range(0, len(token_ids), self._engine.prefill_chunk):
            chunk = token_ids[start : start + self._engine.prefill_chunk]
            self._engine.prefill(self.sequence, chunk, logits=False)
            self._held += chunk
            self._read += len(chunk)
