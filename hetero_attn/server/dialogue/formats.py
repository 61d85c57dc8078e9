"""How a model writes reasoning and calls: told by its chat template, which shows it both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hetero_attn.server.dialogue import harmony
from hetero_attn.server.dialogue.answer import Parser, PlainText
from hetero_attn.server.dialogue.harmony import HarmonyParser
from hetero_attn.server.dialogue.marked import MarkedParser, Marks
from hetero_attn.server.dialogue.templated import TemplatedParser, thought_marks, usable_template
from hetero_attn.server.dialogue.tools import Tools

if TYPE_CHECKING:  # it needs torch, whose import would keep a server from answering while it loads
    from hetero_attn.serving.text.tokenizer import Tokenizer

TAIL = 24  # tokens at the end of a prompt that may open the reasoning
TAGS = ("<tool_call>", "</tool_call>")
_DEEPSEEK_CALLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
# By what only this family's template holds, the particular before the common.
FAMILIES: tuple[tuple[str, str, Marks], ...] = (
    (
        "<｜tool▁call▁begin｜>",
        "deepseek",
        Marks(None, ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"), unseen=_DEEPSEEK_CALLS),
    ),
    ("[TOOL_CALLS]", "mistral", Marks(None, ("[TOOL_CALLS]", None), id_letters=9)),
    ("<arg_key>", "glm", Marks(None, TAGS)),
    ("<tool_call>", "hermes", Marks(None, TAGS)),  # Qwen3-Coder's too
    ("<|python_tag|>", "llama3", Marks(None, ("<|python_tag|>", None), bare=True)),
    ("<|start_header_id|>", "llama3", Marks(None, ("<|python_tag|>", None), bare=True)),
)
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class AnswerFormat:
    """The form of one model's answers. marks: None for plain text. is_harmony: gpt-oss's form instead.

    specials: texts of the tokenizer's special tokens. knows_tools: whether the template shows tools to the model.
    is_fenced, is_named: which of two forms of calls DeepSeek's and Mistral's templates show. template: how answers are
    written by the model's own files, for transformers' parser; what is forced by a grammar is in the family's form.
    """

    name: str
    marks: Marks | None
    is_harmony: bool = False
    specials: frozenset[str] = frozenset()
    knows_tools: bool = False
    is_fenced: bool = False
    is_named: bool = False
    template: Mapping[str, Any] | None = None

    @cached_property
    def keeps_specials(self) -> bool:
        """Whether markers are special tokens, which have to stay in the text that is read."""
        marks = harmony.MARKS if self.is_harmony else self.marks.all if self.marks else set()
        return bool(marks & self.specials) or bool(self._of_template)

    @cached_property
    def _of_template(self) -> frozenset[str]:
        """Special tokens that the template names."""
        words = "" if self.template is None else json.dumps(self.template, ensure_ascii=False).replace("\\", "")
        return frozenset(each for each in self.specials if each in words)

    @property
    def repeats_calls(self) -> bool:
        """Whether several calls are written one after another, each between its own markers."""
        marks = self.marks
        return marks is not None and marks.call is not None and marks.call[1] is not None and self.name != "deepseek"

    def parsers(self, count: int, tools: Tools, prompt_end: str, is_forced: bool = False) -> list[Parser]:
        """One parser for each of several answers to a prompt that ends so. is_forced: they follow a grammar of ours."""
        make = self._parser if self.template is None or is_forced or tools.must_call else self._templated
        return [make(tools, prompt_end) for _ in range(count)]

    def _templated(self, tools: Tools, prompt_end: str) -> Parser:
        def own() -> Parser:
            return self._parser(tools, "")

        unseen = self.specials - self._of_template if self.keeps_specials else ()
        letters = 0 if self.marks is None else self.marks.id_letters
        return TemplatedParser(self.template, tools, prompt_end, own, unseen, letters)

    def _parser(self, tools: Tools, prompt_end: str) -> Parser:
        unseen = self.specials if self.keeps_specials else ()
        if self.is_harmony:
            return HarmonyParser(tools, unseen)
        if self.marks is None or not (self.marks.thought or (self.marks.call and tools.callable)):
            return PlainText()
        return MarkedParser(self.marks, tools, self.opens_thought(prompt_end), set(unseen) - self.marks.all)

    def opens_thought(self, prompt_end: str) -> bool:
        """Whether a prompt that ends so has opened the reasoning."""
        return bool(self.marks.thought) and prompt_end.rstrip().endswith(self.marks.thought[0])


def format_of(tokenizer: Tokenizer | None) -> AnswerFormat:
    """The form in which a model answers."""
    template = (tokenizer.chat_template if tokenizer is not None else None) or ""
    if not template:
        return AnswerFormat("plain", None)
    found = _family_of(
        template, frozenset(tokenizer.token_bytes(each).decode() for each in tokenizer.special_token_ids)
    )
    given = usable_template(tokenizer.response_template)
    if given is None:
        return found
    marks = found.marks
    if marks is not None and marks.thought is None:
        marks = replace(marks, thought=thought_marks(given))
    return replace(found, marks=marks, template=given)


def _family_of(template: str, specials: frozenset[str]) -> AnswerFormat:
    knows_tools = "tools" in template
    if "<|channel|>" in template and "<|message|>" in template:
        return AnswerFormat("harmony", None, True, specials, knows_tools)
    thought = next((pair for pair in THOUGHTS if pair[1] in template or pair[0] in template), None)
    for sign, name, marks in FAMILIES:
        if sign in template:
            is_fenced, is_named, marks = "```json" in template, "[ARGS]" in template, replace(marks, thought=thought)
            return AnswerFormat(name, marks, False, specials, knows_tools, is_fenced, is_named)
    marks = Marks(thought, TAGS if knows_tools else None)
    return AnswerFormat("hermes" if knows_tools else "plain", marks, False, specials, knows_tools)


def end_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text that a prompt ends with, special tokens and all."""
    return tokenizer.decode(token_ids[-TAIL:], skip_special_tokens=False)
