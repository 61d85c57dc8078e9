"""Log-probabilities of tokens in OpenAI's two forms.

Text of a token is what its bytes say; a token that is only a part of a character has U+FFFD in its text, and the bytes
beside it.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they need torch, whose import would keep a server from answering while it loads
    from hetero_attn.serving.request import Request
    from hetero_attn.serving.sampling import SampledToken
    from hetero_attn.serving.text.tokenizer import Tokenizer


class TextLength:
    """Characters of a text whose bytes come token by token: one that several tokens make counts with its last."""

    def __init__(self) -> None:
        self.characters = 0
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        """Take the next token's bytes."""
        self.characters += len(self._decoder.decode(data))


def shown_tokens(request: Request, first: int, last: int) -> list[SampledToken]:
    """Entries of the tokens [first, last) of an answer, but for the end token, which is no part of its text."""
    entries = request.logprobs[first:last]
    if entries and request.finish_reason == "stop" and entries[-1].token_id in request.sampler.stop_token_ids:
        entries = entries[:-1]
    return entries


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[SampledToken]) -> dict[str, Any]:
    """Log-probabilities of an answer's tokens, with bytes and alternatives, as chat completions carry them."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            one(entry.token_id, entry.logprob) | {"top_logprobs": [one(*pair) for pair in entry.top_logprobs]}
            for entry in entries
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokenizer: Tokenizer,
    entries: Sequence[SampledToken | None],
    length: TextLength,
    first_token: int | None = None,
) -> dict[str, Any]:
    """As completions carry them. length: of the text before them, which takes in theirs.

    None stands for the first token of an echoed prompt, `first_token`, which nothing predicts. The chosen token is
    among the top ones, with the very same number: that is how evaluations tell whether it was the likeliest.
    """
    found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def text_of(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    for entry in entries:
        token_id = first_token if entry is None else entry.token_id
        token = text_of(token_id)
        found["tokens"].append(token)
        found["text_offset"].append(length.characters)
        found["token_logprobs"].append(None if entry is None else entry.logprob)
        found["top_logprobs"].append(None if entry is None else _top(text_of, token, entry))
        if token_id not in tokenizer.special_token_ids:  # its name is not in the text
            length.add(tokenizer.token_bytes(token_id))
    return found


def _top(text_of: Any, token: str, entry: SampledToken) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, logprob in entry.top_logprobs:
        top.setdefault(text_of(token_id), logprob)  # best first; another token may read the same
    top.setdefault(token, entry.logprob)
    return top
