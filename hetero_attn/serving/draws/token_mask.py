"""What the grammar of one request allows next, worked out from its tokens so far: a matcher of llguidance's, brought to
where the request stands and taken back. A request that waits for its place holds none."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from hetero_attn.errors import SamplingError

AHEAD_S = 1e-4  # of a mask; handing over a shorter one to another thread would take as long


class TokenMask:
    """What one request may say next. ready: has a matcher of llguidance's made. after: token ids behind which the
    grammar holds, empty for from the start. threads: where masks that take long are found out ahead. lost: called where
    it can be followed no further."""

    def __init__(
        self,
        ready: Callable[[], Future],
        vocab_size: int,
        after: Sequence[int],
        threads: ThreadPoolExecutor,
        lost: Callable[[], object],
    ) -> None:
        self._ready, self._lost = ready, lost
        self._vocab_size, self._after, self._threads = vocab_size, list(after), threads
        self._held: Future | None = None  # of the matcher
        self._start = None if after else 0  # position of the first token that has to follow the grammar
        self._before: list[int] = []  # tokens among which `after` was looked for last
        self._seen: list[int] = []  # tokens that the matcher has taken
        self._ahead: Future | None = None  # of the mask behind `_seen`
        self._found: np.ndarray | None = None  # that mask
        self._forced: list[int] | None = None  # tokens that have to come behind `_seen`
        self._took_s = 0.0  # processor time of the last mask

    def begin(self) -> None:
        """Have the matcher made: a request that waits for its place has none, for it may take 100 MB."""
        if self._held is None:
            self._held = self._ready()

    def let_go(self) -> None:
        """Hold no matcher, until the next question or `begin`."""
        self._rest()
        self._held = self._found = self._forced = None
        self._seen = []

    @property
    def _matcher(self) -> Any:
        self.begin()
        return self._held.result()

    def prepare(self, generated_ids: Sequence[int]) -> None:
        """Begin to find out on another thread what may come behind these, while a step is computed; only where the last
        time took long."""
        if self._took_s >= AHEAD_S and self.holds(generated_ids):
            self._follow(generated_ids)
            if self._found is None and self._ahead is None:
                self._ahead = self._threads.submit(self._bits)

    def holds(self, generated_ids: Sequence[int]) -> bool:
        """Whether what comes behind these has to follow the grammar, which may begin behind a text that is to come."""
        return self._found_start(generated_ids) is not None

    def which(self, generated_ids: Sequence[int], token_ids: Sequence[int]) -> list[bool]:
        """Whether each of some tokens may come behind these; a small part of the work of finding out all that may.

        Where text is forced llguidance allows one way of writing it, and takes any; at the end it allows the end, and
        takes nothing. There all are found out, which is soon done.
        """
        if not self.holds(generated_ids):
            return [True] * len(token_ids)
        self._follow(generated_ids)
        is_known = self._ahead is not None or self._found is not None
        if is_known or self._matcher.is_stopped() or self._forced_tokens():
            return self._mask()[list(token_ids)].tolist()
        return [self._matcher.validate_tokens([token_id]) == 1 for token_id in token_ids]

    def allowed(self, generated_ids: Sequence[int]) -> torch.Tensor | None:
        """Which tokens may come next: bool [vocab_size] on the CPU, not to be written to; None while every one may.

        generated_ids: all tokens of the answer so far; they may be fewer than at the call before. Raises SamplingError
        where the grammar has become too costly to follow.
        """
        if not self.holds(generated_ids):
            return None
        self._follow(generated_ids)
        return torch.from_numpy(self._mask())

    def forced(self, generated_ids: Sequence[int]) -> list[int]:
        """Tokens that write what the grammar forces behind these, empty where it leaves a choice of text."""
        if not self.holds(generated_ids):
            return []
        self._follow(generated_ids)
        self._rest()
        return [] if self._matcher.is_error() else self._forced_tokens()

    def _found_start(self, generated_ids: Sequence[int]) -> int | None:
        width, known = len(self._after), len(self._before)
        if not width:
            return 0
        if self._start is None or self._start > len(generated_ids):
            is_longer = list(generated_ids[:known]) == self._before
            first = max(width, known + 1 if is_longer and self._start is None else 0)
            ends = range(first, len(generated_ids) + 1)
            self._start = next((end for end in ends if [*generated_ids[end - width : end]] == self._after), None)
            self._before = list(generated_ids)
        return self._start

    def _follow(self, generated_ids: Sequence[int]) -> None:
        """Bring the matcher to where the answer stands; what was found out is kept only there."""
        tokens = list(generated_ids[self._start :])
        if tokens == self._seen:
            return
        self._rest()
        self._found = self._forced = None
        shared = len(self._seen) if tokens[: len(self._seen)] == self._seen else 0
        while shared < min(len(tokens), len(self._seen)) and tokens[shared] == self._seen[shared]:
            shared += 1
        if shared < len(self._seen):
            self._matcher.rollback(len(self._seen) - shared)
            self._seen = self._seen[:shared]
        if tokens[shared:]:
            self._matcher.consume_tokens(tokens[shared:])
            self._seen = tokens

    def _forced_tokens(self) -> list[int]:
        if self._forced is None:
            self._forced = self._matcher.compute_ff_tokens()
        return self._forced

    def _mask(self) -> np.ndarray:
        """What may come where the matcher stands: bool [vocab_size]."""
        if self._found is None:
            bits = self._bits() if self._ahead is None else self._ahead.result()
            if self._matcher.is_error():
                self._lost()
                raise SamplingError(f"the grammar cannot be followed further: {cause(self._matcher.get_error())}")
            words = np.frombuffer(bits, np.uint8)
            self._found = np.unpackbits(words, count=self._vocab_size, bitorder="little").view(np.bool_)
        return self._found

    def _bits(self) -> bytes:
        begin = time.thread_time()
        bits = self._matcher.compute_bitmask()
        self._took_s = time.thread_time() - begin
        return bits

    def _rest(self) -> None:
        """Let the other thread come to its end: the matcher is for one at a time."""
        if self._ahead is not None:
            self._ahead.exception()
            self._ahead = None


def cause(text: str) -> str:
    """What llguidance says in many lines, in one."""
    if text.startswith("NoExtensionBias"):
        return "there is no text that fits it"
    first, *more = text.strip().splitlines() or [""]
    return " ".join([first, *(line for line in more if line.startswith("error: "))])[:300]
