"""Answers as clients of `/v1/responses` read them: items of reasoning, text and calls, and events that build them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any

from hetero_attn.server.dialogue.answer import Answer, Piece
from hetero_attn.server.failures import ApiError
from hetero_attn.server.generation import Generation
from hetero_attn.server.protocols.fields import new_id, now
from hetero_attn.server.protocols.reply import usage_of
from hetero_attn.server.settings import ServerSettings
from hetero_attn.server.sse import EventStream, frame


class ResponseWriter:
    """Writes one response. shown: fields of the request that the response repeats."""

    def __init__(self, generation: Generation | None, shown: Mapping[str, Any]) -> None:
        self._generation = generation
        self._head = {"id": new_id("resp_"), "object": "response", "created_at": now(), "store": False, **shown}
        self._events = 0
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the last item, while it grows
        self._finish_reason: str | None = None

    def opening(self) -> Iterable[bytes]:
        """`response.created` and `response.in_progress`, with a response that has no output yet."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """Deltas of items, which begin and end as the kind changes."""
        if piece.part.reasoning:
            yield from self._grow("reasoning", piece.part.reasoning)
        if piece.part.text:
            yield from self._grow("message", piece.part.text)
        for call in piece.part.calls:
            yield from self._call(call.name or "", call.id or "", call.arguments)
        self._finish_reason = piece.finish_reason

    def closing(self) -> Iterable[bytes]:
        """The response as it is at the end."""
        yield from self._close()
        status = "incomplete" if self._finish_reason == "length" else "completed"
        yield self._event(f"response.{status}", response=self._response(status))

    def ping(self) -> bytes:
        """An event, because timers of clients do not count comments."""
        return self._event("response.in_progress", response=self._response("in_progress"))

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """The response as it is when something went wrong."""
        failed = self._response("failed") | {"error": {"code": error.code or "server_error", "message": error.message}}
        yield self._event("response.failed", response=failed)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response as one object: reasoning, message and tool calls as items, what it has cost."""
        answer = answers[0]
        for kind, words in (("reasoning", answer.reasoning), ("message", answer.text)):
            if words:
                self._items.append(_item(kind))
                _part_of(self._items[-1])["text"] = words
        self._items += [_call_item(call.name, call.id, call.arguments) for call in answer.calls]
        for item in self._items:
            item["status"] = "completed"
        self._finish_reason = answer.finish_reason
        return self._response("incomplete" if answer.finish_reason == "length" else "completed")

    def _grow(self, kind: str, words: str) -> Iterable[bytes]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            self._open = _item(kind)
            self._items.append(self._open)
            yield self._event("response.output_item.added", item=self._open | {"content": []}, **self._place())
            yield self._event("response.content_part.added", part=_part_of(self._open), **self._place(True))
        _part_of(self._open)["text"] += words
        yield self._event(f"response.{_words(kind)}.delta", delta=words, **_logprobs(kind), **self._place(True))

    def _call(self, name: str, call_id: str, arguments: str) -> Iterable[bytes]:
        yield from self._close()
        item = _call_item(name, call_id, arguments)
        self._items.append(item)
        yield self._event("response.output_item.added", item=item | {"arguments": ""}, **self._place())
        at = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield self._event("response.function_call_arguments.delta", delta=arguments, **at)
        yield self._event("response.function_call_arguments.done", arguments=arguments, name=name, **at)
        item["status"] = "completed"
        yield self._event("response.output_item.done", item=item, **self._place())

    def _close(self) -> Iterable[bytes]:
        item, self._open = self._open, None
        if item is None:
            return
        kind, part = item["type"], _part_of(item)
        yield self._event(f"response.{_words(kind)}.done", text=part["text"], **_logprobs(kind), **self._place(True))
        yield self._event("response.content_part.done", part=part, **self._place(True))
        item["status"] = "completed"
        yield self._event("response.output_item.done", item=item, **self._place())

    def _place(self, of_part: bool = False) -> dict[str, Any]:
        at: dict[str, Any] = {"output_index": len(self._items) - 1}
        return at | {"item_id": self._items[-1]["id"], "content_index": 0} if of_part else at

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._events += 1
        return frame({"type": name, "sequence_number": self._events - 1, **fields}, name)

    def _response(self, status: str) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        has_ended = status in ("completed", "incomplete")
        return self._head | {
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": [dict(item) for item in self._items] if status != "in_progress" else [],
            "usage": self._usage() if has_ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, cached, generated, reasoning = usage_of(self._generation, 1)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": prompt + generated,
        }


def failed_stream(shown: Mapping[str, Any], error: ApiError, settings: ServerSettings) -> EventStream:
    """A stream of a response that never began."""
    writer = ResponseWriter(None, shown)

    async def frames() -> AsyncGenerator[bytes]:
        yield b"".join((*writer.opening(), *writer.failure(error)))

    return EventStream(frames(), writer.ping, settings.ping_interval_s, settings.blocked_s)


def _item(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        thought = {"type": "reasoning_text", "text": ""}
        return {"id": new_id("rs_"), "type": kind, "summary": [], "content": [thought], "status": "in_progress"}
    part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"id": new_id("msg_"), "type": kind, "role": "assistant", "content": [part], "status": "in_progress"}


def _call_item(name: str, call_id: str, arguments: str) -> dict[str, Any]:
    head = {"id": new_id("fc_"), "type": "function_call", "status": "in_progress"}
    return head | {"call_id": call_id, "name": name, "arguments": arguments}


def _part_of(item: dict[str, Any]) -> dict[str, Any]:
    return item["content"][0]


def _words(kind: str) -> str:
    return "reasoning_text" if kind == "reasoning" else "output_text"


def _logprobs(kind: str) -> dict[str, Any]:
    return {} if kind == "reasoning" else {"logprobs": []}
