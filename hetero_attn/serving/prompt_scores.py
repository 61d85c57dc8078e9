"""Log-probabilities of a prompt's own tokens, taken from logits chunk by chunk so that no chunk's logits are kept."""

import torch

from hetero_attn.serving.sampling import SampledToken

ROWS_AT_ONCE = 16  # log-probabilities in float64 of so many rows exist at a time


class PromptScores(list[list[SampledToken | None]]):
    """Takes the logits of a prompt's tokens in order, as `Request.scores` does, and keeps what they say of the next.

    count: how many of the most likely tokens to report beside the prompt's own. Its items are chunks: an entry a row,
    None for the last row of the prompt, which has no next token.
    """

    def __init__(self, token_ids: tuple[int, ...], count: int) -> None:
        super().__init__()
        self._token_ids = token_ids
        self._count = count

    def append(self, logits: torch.Tensor) -> None:
        """Score one chunk: float32 [rows, vocab_size], the rows that follow those seen so far."""
        start = sum(map(len, self)) + 1
        targets = self._token_ids[start : start + len(logits)]
        scored: list[SampledToken | None] = []
        for first in range(0, len(targets), ROWS_AT_ONCE):
            scored += self._block(logits[first : first + ROWS_AT_ONCE], targets[first : first + ROWS_AT_ONCE])
        super().append(scored + [None] * (len(logits) - len(targets)))

    @property
    def tokens(self) -> tuple[SampledToken | None, ...]:
        """One entry for each token of the prompt; None for the first, which nothing predicts."""
        return (None, *(entry for chunk in self for entry in chunk))[: len(self._token_ids)]

    def _block(self, logits: torch.Tensor, targets: tuple[int, ...]) -> list[SampledToken]:
        logprobs = torch.log_softmax(logits[: len(targets)].double(), dim=1)
        count = logprobs.shape[1] if self._count < 0 else min(self._count, logprobs.shape[1])
        values, ids = torch.topk(logprobs, count, dim=1)
        own = logprobs.gather(1, torch.tensor(targets, device=logprobs.device)[:, None])[:, 0]
        tops = [tuple(zip(*pair)) for pair in zip(ids.tolist(), values.tolist())]
        return [SampledToken(*entry) for entry in zip(targets, own.tolist(), tops)]
