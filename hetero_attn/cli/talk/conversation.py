"""A conversation with a model, apart from the terminal it is held in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.cli.output import MOST_CHARACTERS
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
    the chat template. dropped: turns that no longer fitted the context.
    """

    llm: LLM
    params: SamplingParams
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    dropped: int = 0
    last: Metrics | None = None
    _before: tuple[list[Message], int] | None = None  # turns and `dropped` before a question without an answer yet

    @property
    def messages(self) -> list[Message]:
        """Everything as the chat template takes it."""
        return [*self._opening, *self.turns]

    @property
    def tokens(self) -> int:
        """How much of the context the conversation takes; with a system message alone, what each turn begins with."""
        if self.turns:
            return self._count(self.messages)
        # Templates may want a user's message.
        return self._count([*self._opening, {"role": "user", "content": ""}]) if self.system else 0

    def ask(self, question: str, anew: bool = False) -> tuple[Iterator[Piece], int]:
        """The answer to a question as it arrives, and how many old messages had to go to make room for it.

        anew: in place of the last question and its answer. The question is part of the conversation from now on, until
        `forget_question` takes it back. Raises PromptError, and leaves everything as it was, where the template refuses
        the messages, or the question alone is too long.
        """
        earlier = self.turns[: self._last_question_at()] if anew else self.turns
        turns = [*earlier, {"role": "user", "content": question}]
        kept = self._with_room(turns)
        variables = {"template_variables": self.variables} if self.variables else {}
        pieces = self.llm.stream_chat([*self._opening, *kept], self.params, **variables)
        dropped = len(turns) - len(kept)
        self._before = self.turns, self.dropped
        self.turns, self.dropped = kept, self.dropped + dropped
        return pieces, dropped

    def answered(self, text: str) -> None:
        """Remember an answer, however far it got; one that never began takes its question along, because a chat
        template may refuse two user messages in a row."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
            self._before = None
        else:
            self.forget_question()

    def forget_question(self) -> None:
        """Take back a question that was asked and has no answer; what it stood in place of is there again."""
        if self._before is not None:
            (self.turns, self.dropped), self._before = self._before, None

    def last_question(self) -> str | None:
        """The last question; None if there was none."""
        at = self._last_question_at()
        return None if at is None else self.turns[at]["content"]

    def reset(self) -> None:
        """Forget every turn."""
        self.turns, self.dropped = [], 0

    def save(self, file: Path) -> None:
        """Write the messages as JSON. Raises OSError."""
        write_whole(file, json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n")

    def load(self, file: Path) -> None:
        """Go on with a saved conversation. Raises OSError, or PromptError for a file that holds none."""
        messages = _parsed(file)
        self.system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        self.turns, self.dropped = messages, 0

    @property
    def _opening(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _last_question_at(self) -> int | None:
        return next((at for at in reversed(range(len(self.turns))) if self.turns[at]["role"] == "user"), None)

    def _with_room(self, turns: list[Message]) -> list[Message]:
        """Turns without the oldest ones, as many as leave room for a fair answer; the newest, a question, stays. Raises
        PromptError where that alone is too long."""
        from hetero_attn.serving.text.first_words import expect_room_for

        context = self.llm.plan.max_context
        room = min(self.params.max_tokens or context, max(1, context // 4))
        kept = turns
        while (tokens := self._count([*self._opening, *kept])) + room > context and len(kept) > 1:
            # A question goes with its answer: many templates want the first turn to be the user's.
            kept = kept[2 if len(kept) > 2 and kept[1]["role"] == "assistant" else 1 :]
        expect_room_for(tokens, 1, context)
        return kept

    def _count(self, messages: list[Message]) -> int:
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise PromptError("this model has no tokenizer files, so there is no conversation; add them to its folder")
        return len(tokenizer.encode_chat(messages, template_variables=self.variables))


def _parsed(file: Path) -> list[Message]:
    try:
        with file.open(encoding="utf-8") as stream:
            messages = json.loads(stream.read(MOST_CHARACTERS))["messages"]
        found = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = []
    if not found or any(message["role"] not in ROLES or not _is_text(message["content"]) for message in found):
        raise PromptError(
            f'{file} holds no conversation; it must be JSON such as {{"messages": [{{"role": "user", ...}}]}}'
        )
    return found


def _is_text(content: Any) -> bool:
    """Whether it is text that a model can be given: half of a pair of surrogates is none."""
    return isinstance(content, str) and content.encode("utf-8", "replace").decode() == content
