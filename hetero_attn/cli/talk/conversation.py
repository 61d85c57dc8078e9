"""A conversation with a model, apart from the terminal it is held in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.errors import PromptError
from hetero_attn.tools.whole_file import write_whole

if TYPE_CHECKING:
    from hetero_attn import LLM, SamplingParams
    from hetero_attn.serving.request import Metrics, Piece

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(slots=True)
class Conversation:
    """What was said, and how answers are made.

    system: the message that every turn begins with. turns: user and assistant messages in their order. variables: of
    the
    chat template. dropped: turns that no longer fitted the context.
    """

    llm: LLM
    params: SamplingParams
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    dropped: int = 0
    last: Metrics | None = None

    @property
    def messages(self) -> list[Message]:
        """Everything as the chat template takes it."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self.turns]

    @property
    def tokens(self) -> int:
        """How much of the context the conversation takes."""
        return self._count(self.messages) if self.turns or self.system else 0

    def ask(self, question: str) -> tuple[Iterator[Piece], int]:
        """The answer to a question as it arrives, and how many old messages had to go to make room for it.

        The question is part of the conversation from now on; `forget_question` takes it back. Raises PromptError where
        the template refuses the messages, or the question alone is too long.
        """
        self.turns.append({"role": "user", "content": question})
        dropped = self._make_room()
        variables = {"template_variables": self.variables} if self.variables else {}
        return self.llm.stream_chat(self.messages, self.params, **variables), dropped

    def answered(self, text: str) -> None:
        """Remember an answer, however far it got; one that never began takes its question along, because a chat
        template may refuse two user messages in a row."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.forget_question()

    def forget_question(self) -> None:
        """Take back a question that has no answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def last_question(self) -> str | None:
        """Take back the last question and its answer; returns the question, None if there was none."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        return self.turns.pop()["content"] if self.turns else None

    def reset(self) -> None:
        """Forget every turn."""
        self.turns.clear()

    def save(self, file: Path) -> None:
        """Write the messages as JSON. Raises OSError."""
        write_whole(file, json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n")

    def load(self, file: Path) -> None:
        """Go on with a saved conversation. Raises OSError, or PromptError for a file that holds none."""
        messages = _parsed(file)
        self.system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        self.turns = messages

    def _make_room(self) -> int:
        """Drop the oldest turns until a fair answer fits; the newest question stays."""
        context = self.llm.plan.max_context
        room = min(self.params.max_tokens or context, max(1, context // 4))
        before = len(self.turns)
        while len(self.turns) > 1 and self._count(self.messages) + room > context:
            # A question goes with its answer: many templates want the first turn to be the user's.
            del self.turns[: 2 if len(self.turns) > 2 and self.turns[1]["role"] == "assistant" else 1]
        self.dropped += before - len(self.turns)
        return before - len(self.turns)

    def _count(self, messages: list[Message]) -> int:
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise PromptError("this model has no tokenizer files, so there is no conversation; add them to its folder")
        return len(tokenizer.encode_chat(messages, template_variables=self.variables))


def _parsed(file: Path) -> list[Message]:
    try:
        messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
        found = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (ValueError, KeyError, TypeError):
        found = []
    if not found or any(m["role"] not in ROLES or not isinstance(m["content"], str) for m in found):
        raise PromptError(
            f'{file} holds no conversation; it must be JSON such as {{"messages": [{{"role": "user", ...}}]}}'
        )
    return found
