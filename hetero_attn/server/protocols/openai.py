"""What OpenAI's chat and text completions have in common: chunks, usage, pings, errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hetero_attn.server.failures import ApiError, body_of
from hetero_attn.server.generation import Generation
from hetero_attn.server.protocols.fields import SamplingFields, new_id, now
from hetero_attn.server.protocols.reply import usage_of
from hetero_attn.server.service import Service
from hetero_attn.server.sse import frame

DONE = b"data: [DONE]\n\n"


class OpenAIWriter:
    """Chunks of one answer: the same id, time and model in each; usage where it was asked for."""

    chunk_object = ""
    whole_object = ""

    def __init__(
        self, service: Service, body: SamplingFields, generation: Generation, prefix: str, choices: int
    ) -> None:
        self.service, self.body, self.generation, self.choices = service, body, generation, choices
        self._head = {"id": new_id(prefix), "created": now(), "model": body.model or service.model_name}

    def opening(self) -> Iterable[bytes]:
        """Nothing: the first chunk with choices is the first token."""
        return ()

    def closing(self) -> Iterable[bytes]:
        """What it has cost, if asked for, and the end."""
        if self.body.usage_at_end:
            yield self.chunk([], usage=self.usage())
        yield DONE

    def ping(self) -> bytes:
        """A comment that says how far the prompt has come."""
        return ": ping {}/{}\n\n".format(*self.generation.prompt_progress).encode()

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """A chunk with an error in the place of choices."""
        yield frame(body_of(error, ""))

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        """One event of the stream: these choices, and what the turn has cost where each chunk or this one says it."""
        value = self._head | {"object": self.chunk_object, "choices": choices}
        if usage is None and self.body.usage_always:
            usage = self.usage()
        if usage is not None or self.body.usage_at_end:
            value["usage"] = usage
        return frame(value)

    def body_with(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer that is not streamed: these choices and what the turn has cost."""
        return self._head | {"object": self.whole_object, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """What the turn has cost so far."""
        prompt, cached, generated, reasoning = usage_of(self.generation, self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }
