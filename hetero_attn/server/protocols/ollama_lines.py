"""Answers as Ollama's clients read them: lines of JSON, the last with counts and nanoseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from hetero_attn.server.dialogue.answer import Answer, Piece
from hetero_attn.server.failures import ApiError
from hetero_attn.server.generation import Generation
from hetero_attn.server.protocols.reply import usage_of

LINES = b"application/x-ndjson"


def timestamp(seconds: float | None = None) -> str:
    """A time, now by default, as RFC 3339 writes it."""
    at = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return at.isoformat().replace("+00:00", "Z")


class OllamaWriter:
    """Writes the lines of one answer. is_chat: a message in each, else text."""

    def __init__(self, generation: Generation, model: str, is_chat: bool) -> None:
        self._generation, self._model, self._is_chat = generation, model, is_chat
        self._finish_reason: str | None = None

    def opening(self) -> Iterable[bytes]:
        """No line: the first one carries the first words."""
        return ()

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """A line with what is new."""
        self._finish_reason = piece.finish_reason
        part = piece.part
        calls = [(call.name, call.arguments) for call in part.calls]
        if part.text or part.reasoning or calls:
            yield _line(self._head() | self._words(part.text, part.reasoning, calls) | {"done": False})

    def closing(self) -> Iterable[bytes]:
        """The line that says why it ended and what it has cost."""
        yield _line(self._head() | self._words("", "", []) | self._end(self._finish_reason))

    def ping(self) -> bytes:
        """A line without words, which keeps the connection open."""
        return _line(self._head() | self._words("", "", []) | {"done": False})

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """A line with an error in the place of words."""
        yield _line({"error": error.message})

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last line with all words in it: the answer of a request that is not streamed."""
        answer = answers[0]
        calls = [(call.name, call.arguments) for call in answer.calls]
        return self._head() | self._words(answer.text, answer.reasoning, calls) | self._end(answer.finish_reason)

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": timestamp()}

    def _words(self, text: str, reasoning: str, calls: Sequence[tuple[str | None, str]]) -> dict[str, Any]:
        thinking = {"thinking": reasoning} if reasoning else {}
        if not self._is_chat:
            return {"response": text, **thinking}
        message: dict[str, Any] = {"role": "assistant", "content": text, **thinking}
        if calls:
            message["tool_calls"] = [{"function": {"name": n, "arguments": json.loads(a)}} for n, a in calls]
        return {"message": message}

    def _end(self, finish_reason: str | None) -> dict[str, Any]:
        metrics, usage = self._generation.requests[0].metrics, usage_of(self._generation, 1)
        first_s, decode_s = metrics.time_to_first_token_s, metrics.decode_s
        return {
            "done": True,
            "done_reason": "length" if finish_reason == "length" else "stop",
            "total_duration": round((first_s + decode_s) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": round(metrics.prefill_s * 1e9),
            "eval_count": usage.generated,
            "eval_duration": round(decode_s * 1e9),
        }


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
