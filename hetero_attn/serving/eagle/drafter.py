"""What an EAGLE-3 head holds of one request, from the first hidden states of its prompt on.

Its sequence holds a row for every place of the text that the large model has computed, as far as they were taken in,
and behind them those of the last drafts, which are overwritten. What follows a gap, because a prompt's beginning was
known to the large model alone, or a step failed, begins a new sequence: the head sees that much less then.
"""

from collections.abc import Sequence

import torch

from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.engine import Engine
from hetero_attn.ops.step_rows import Rows

FEW_ROWS = 8  # rows that are computed with the next draft; more of them are taken in as a chunk before
MOST_WAITING = 32  # rows, while nobody asks for drafts: a chunk of many takes about as long as one of few

Pair = tuple[int, int]


class EagleDrafter:
    """What the head guesses of one request; drafts nothing where the request has no place in its cache.

    sequence: its place there, None without. drafted: what was guessed last. pending: the tokens that it computes next,
    and beside: float32 [pending, ...], what stands beside each: hidden states of the large model, and once something is
    drafted the head's own. is_going: whether more is wanted.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._cache = engine, engine.kv_cache
        self.sequence: SequenceState | None = None
        self.drafted: list[int] = []
        self.pending: list[int] = []
        self._wanted = 0
        self._base = 0  # the place in the text of the sequence's first row
        self._known = 0  # rows in the cache that are made of the large model's hidden states
        self._tokens: list[int] = []  # the text from the base on, one more than there are rows
        self._waits_again = False  # the one row that waits is in the cache already
        self.beside = self._waiting = torch.empty(
            0, dtype=torch.float32, device="cpu"
        )  # hidden states of the rows behind those

    @property
    def is_going(self) -> bool:
        """Whether fewer were drafted than were asked for."""
        return len(self.drafted) < self._wanted

    def follow(
        self, prompt_ids: Sequence[int], generated_ids: Sequence[int], position: int, taken: torch.Tensor
    ) -> None:
        """Take in what the large model had of the tokens from `position` on, each with the text behind it.

        taken: float32 [tokens, fusion_width], kept.
        """
        stop = position + len(taken)
        if self.sequence is None or position > self._end or stop - self._base > self._engine.plan.max_context:
            position = max(position, stop - self._engine.plan.max_context // 2)
            taken = taken[len(taken) - (stop - position) :]
            if not self._open(between(prompt_ids, generated_ids, 0, position + 1), len(taken)):
                return
        new = taken[self._end - position :]
        if self._waits_again and len(new):
            self._known, self._waiting, self._waits_again = self._known + 1, new[:0], False
        self._tokens += between(prompt_ids, generated_ids, self._end + 1, stop + 1)
        self._waiting = torch.cat([self._waiting, new]) if len(self._waiting) else new
        if len(self._waiting) > MOST_WAITING:
            self._take_in()

    def begin(self, prompt_ids: Sequence[int], generated_ids: Sequence[int], count: int) -> bool:
        """Hold all that was followed but what is `pending`, and room for `count` drafts; False for none of them."""
        self.drafted, self._wanted = [], 0
        if self.sequence is None or self._end != len(prompt_ids) + len(generated_ids) - 1 or not len(self._waiting):
            return False
        if len(self._waiting) > min(FEW_ROWS, self._engine.most_single_rows):
            self._take_in()
            if self.sequence is None:
                return False
        rows = self._known + len(self._waiting)
        count = min(count, self._engine.plan.max_context - rows + 1)
        if count < 1 or not self._holds(rows + count - 1):
            return False
        self._wanted, self.pending, self.beside = count, self._tokens[self._known + 1 :], self._waiting
        return True

    def take(self, token_id: int, hidden: torch.Tensor) -> None:
        """Count what was pending as computed; token_id is guessed behind it, hidden float32 [1, hidden_size] is what
        the head hands on."""
        if not self.drafted:  # the last row is kept, for drafts that are asked for again
            self._known, self._waiting = self._known + len(self._waiting) - 1, self._waiting[-1:]
            self._waits_again = True
        self.drafted.append(token_id)
        self.pending, self.beside = [token_id], hidden

    def close(self) -> None:
        """Give the place in the cache back; what was computed is kept for texts that begin alike."""
        if self.sequence is not None:
            self._remember()
            self._cache.close(self.sequence)
        self.sequence, self._base, self._known, self._tokens, self._waits_again = None, 0, 0, [], False
        self.beside = self._waiting = torch.empty(0, dtype=torch.float32, device="cpu")

    @property
    def _end(self) -> int:
        """The place in the text of the first row that is missing."""
        return self._base + self._known + len(self._waiting)

    def _open(self, text: list[int], rows: int) -> bool:
        """Begin at the last token of a text, behind what is known of the others or else with nothing; False without
        room for so many rows."""
        self.close()
        position, before = len(text) - 1, pairs(text)
        reused = position if position and self._cache.stored(before) == position else 0
        if reused + rows > self._engine.plan.max_context or not self._cache.has_room(reused + rows):
            return False
        self.sequence = self._cache.open(reused + rows)
        self._base, self._known = position - reused, self._cache.reuse(self.sequence, before) if reused else 0
        self._tokens = text[self._base :]
        return True

    def _take_in(self) -> None:
        """Compute all rows that wait, but the last one."""
        if not self._holds(self._known + len(self._waiting)):
            return
        while len(self._waiting) > 1:
            count = min(len(self._waiting) - 1, self._engine.prefill_chunk)
            token_ids = self._tokens[self._known + 1 : self._known + 1 + count]
            hidden = self._engine.fused(self._waiting[:count])
            self._engine.run([Rows(self.sequence, token_ids, 0, True, hidden)], copy=False)
            self._known, self._waiting = self._known + count, self._waiting[count:]
        self._waiting = self._waiting.clone()  # the others' memory is let go
        self._remember()

    def _holds(self, rows: int) -> bool:
        """Whether there are pages for so many rows behind which nothing else stands; closes itself if not."""
        if self._cache.extend(self.sequence, rows) and self._cache.rewind(self.sequence, self._known):
            return True
        self.close()
        return False

    def _remember(self) -> None:
        if self._base == 0:
            self._cache.remember(self.sequence, pairs(self._tokens[: self._known + 1]))


def pairs(text: Sequence[int]) -> list[Pair]:
    """What a text's rows are known by: the token at their place, and the one behind it."""
    return list(zip(text, text[1:], strict=False))


def between(prompt_ids: Sequence[int], generated_ids: Sequence[int], start: int, stop: int) -> list[int]:
    """Tokens [start, stop) of a prompt and its answer."""
    split = len(prompt_ids)
    return [*prompt_ids[start:stop], *generated_ids[max(0, start - split) : max(0, stop - split)]]
