"""How many tokens of an answer are reasoning: counted in the tokens themselves, once the answer is whole."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from hetero_attn.server.dialogue.formats import AnswerFormat

if TYPE_CHECKING:  # it needs torch, whose import would keep a server from answering while it loads
    from hetero_attn.serving.text.tokenizer import Tokenizer

_ANALYSIS = re.compile(rb"<\|channel\|>\s*analysis[^<]*<\|message\|>")
_HARMONY_END = re.compile(rb"<\|(?:end|call|return|start)\|>")


def thought_tokens(form: AnswerFormat, tokenizer: Tokenizer, prompt_end: str, token_ids: Sequence[int]) -> int:
    """Tokens of an answer to a prompt that ends so that lie between the markers of reasoning, without the markers."""
    if not form.is_harmony and (form.marks is None or form.marks.thought is None):
        return 0
    pieces = [tokenizer.token_bytes(token_id) for token_id in token_ids]
    ends, data = list(accumulate(map(len, pieces))), b"".join(pieces)
    spans = _harmony_spans(data) if form.is_harmony else _marked_spans(form, data, prompt_end)
    return sum(max(0, bisect_left(ends, end) + (end > begin) - bisect_right(ends, begin)) for begin, end in spans)


def _marked_spans(form: AnswerFormat, data: bytes, prompt_end: str) -> Iterator[tuple[int, int]]:
    opening, closing = (mark.encode() for mark in form.marks.thought)
    begin = 0
    if not form.opens_thought(prompt_end):
        begin = len(data) - len(data.lstrip())
        if not data.startswith(opening, begin):
            return
        begin += len(opening)
    end = data.find(closing, begin)
    yield begin, len(data) if end < 0 else end


def _harmony_spans(data: bytes) -> Iterator[tuple[int, int]]:
    position = 0
    while found := _ANALYSIS.search(data, position):
        end = _HARMONY_END.search(data, found.end())
        position = len(data) if end is None else end.start()
        yield found.end(), position
