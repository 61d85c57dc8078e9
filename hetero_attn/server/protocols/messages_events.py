"""Answers as Anthropic's clients read them: a message of blocks, and the events that build one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from hetero_attn.server.dialogue.answer import Answer, Piece
from hetero_attn.server.failures import ApiError, body_of
from hetero_attn.server.generation import Generation
from hetero_attn.server.protocols.fields import new_id
from hetero_attn.server.protocols.reply import usage_of
from hetero_attn.server.sse import frame

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_EMPTY: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class MessageWriter:
    """Writes the events of a streamed message, or the whole of one that is not streamed."""

    def __init__(self, generation: Generation, model: str) -> None:
        self._generation = generation
        self._head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
        self._block = -1  # number of the one that is open or was last
        self._kind: str | None = None  # of the one that is open
        self._finish_reason: str | None = None

    def opening(self) -> Iterable[bytes]:
        """`message_start`, with a message that has no content yet and the tokens of the prompt."""
        tokens = len(self._generation.requests[0].prompt_token_ids)
        usage = {"input_tokens": tokens, "output_tokens": 0}
        empty = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message=self._head | empty)

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """Deltas of blocks, which begin and end as the kind changes."""
        part = piece.part
        if part.reasoning:
            yield from self._delta("thinking", {"type": "thinking_delta", "thinking": part.reasoning})
        if part.text:
            yield from self._delta("text", {"type": "text_delta", "text": part.text})
        for call in part.calls:
            if call.name is not None:
                empty = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                yield from self._open("tool_use", empty)
            yield from self._delta("tool_use", {"type": "input_json_delta", "partial_json": call.arguments})
        self._finish_reason = piece.finish_reason

    def closing(self) -> Iterable[bytes]:
        """Why it ended, and what it has cost."""
        yield from self._close()
        yield _event("message_delta", delta=self._stop(self._finish_reason), usage=self._usage())
        yield _event("message_stop")

    def ping(self) -> bytes:
        """A `ping` event, which keeps the connection open and which clients skip."""
        return _event("ping")

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """An `error` event, which ends the stream and which clients raise."""
        yield frame(body_of(error, "/v1/messages"), "error")

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The message as one object: thinking, text and tool calls as blocks, why it ended, what it has cost."""
        answer, blocks = answers[0], []
        if answer.reasoning:
            blocks.append(_EMPTY["thinking"] | {"thinking": answer.reasoning})
        if answer.text:
            blocks.append(_EMPTY["text"] | {"text": answer.text})
        blocks += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
            for call in answer.calls
        ]
        return self._head | {"content": blocks} | self._stop(answer.finish_reason) | {"usage": self._usage()}

    def _delta(self, kind: str, delta: dict[str, Any]) -> Iterable[bytes]:
        if self._kind != kind:
            yield from self._open(kind, _EMPTY[kind])
        yield _event("content_block_delta", index=self._block, delta=delta)

    def _open(self, kind: str, empty: dict[str, Any]) -> Iterable[bytes]:
        yield from self._close()
        self._block, self._kind = self._block + 1, kind
        yield _event("content_block_start", index=self._block, content_block=empty)

    def _close(self) -> Iterable[bytes]:
        if self._kind is not None:
            self._kind = None
            yield _event("content_block_stop", index=self._block)

    def _stop(self, finish_reason: str | None) -> dict[str, Any]:
        matched = self._generation.requests[0].stop_string if finish_reason == "stop" else None
        reason = _REASONS.get(finish_reason or "") if matched is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": matched}

    def _usage(self) -> dict[str, int]:
        prompt, cached, generated, _ = usage_of(self._generation, 1)
        return {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated,
        }


def _event(name: str, /, **fields: Any) -> bytes:
    return frame({"type": name, **fields}, name)
