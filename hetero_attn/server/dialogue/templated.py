"""Answers of a model whose files say how they are written: its `response_template`, read by transformers' own parser.

That parser raises on a call that is malformed or cut off, and takes time beyond the length of what is read. So it is
fed letter by letter, which tells how far it came; where it fails the family's parser reads on from there, and shows
the call as text. Source: transformers.utils.chat_parsing, of releases that have it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from hetero_attn.server.dialogue.answer import CallPiece, Parser, Part, joined
from hetero_attn.server.dialogue.blanks import Blanks
from hetero_attn.server.dialogue.calls import Written, read_calls
from hetero_attn.server.dialogue.scanner import Scanner
from hetero_attn.server.dialogue.tools import Tools, call_id

if TYPE_CHECKING:  # importing it takes a second, and a release may not have it
    from transformers.utils.chat_parsing import ResponseParser

LOG = logging.getLogger("hetero_attn.server")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of the field of reasoning
CALLS = "tool_calls"
LONGEST_CALL = 16_384  # characters; its expressions may take the square of that
PAIRS = ("xml-inline", "kv-lines")  # contents that pass over what is no pair of key and value
_CLOSING = re.compile(r"</[^<>]*>")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")  # what makes an expression take exponential time


def usable_template(template: Any) -> Mapping[str, Any] | None:
    """A `response_template` that transformers here can read and whose expressions end in time, else None."""
    if not isinstance(template, Mapping):
        return None
    if slow := next((each for each in _expressions(template) if _REPEATED_GROUP.search(each)), None):
        LOG.warning("the model's response_template holds %.60r, which may not end; the family's form is read", slow)
        return None
    try:
        _made(template, [{"name": "f"}], "")
    except Exception as error:  # ImportError where there is none; else whatever a file may hold
        LOG.warning("the model's response_template cannot be read (%s); the family's form is", type(error).__name__)
        return None
    return template


def thought_marks(template: Mapping[str, Any]) -> tuple[str, str] | None:
    """The markers around reasoning, where the template gives them as texts."""
    for name in THOUGHTS:
        field = template["fields"].get(name, {})
        if isinstance(field.get("open"), str) and isinstance(field.get("close"), str):
            return field["open"].strip(), field["close"].strip()
    return None


def _expressions(value: Any) -> Iterable[str]:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    if isinstance(value, Mapping):
        yield from (each for key, each in value.items() if "pattern" in str(key) and isinstance(each, str))
    for each in inner:
        yield from _expressions(each)


def _made(template: Mapping[str, Any], tools: Iterable[Mapping[str, Any]], prompt_end: str) -> ResponseParser:
    from transformers.utils.chat_parsing import ResponseParser

    offered, template = list(tools), deepcopy(dict(template))
    if not offered:
        template["fields"].pop(CALLS, None)  # what looks like a call is text
    return ResponseParser(template, prefix=prompt_end, tools=[{"type": "function", "function": t} for t in offered])


class TemplatedParser:
    """Tells text, reasoning and calls apart as a model's template says; never raises.

    template: one that `usable_template` gave. prompt_end: what the answer follows. unseen: texts to leave out. own:
    makes the family's parser, for what transformers' cannot read. id_letters: length of a call's id, 0 for any.
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        tools: Tools,
        prompt_end: str,
        own: Callable[[], Parser],
        unseen: Iterable[str] = (),
        id_letters: int = 0,
    ) -> None:
        try:
            self._parser = _made(template, tools.callable, prompt_end)
        except Exception:  # what the prompt ends with is malformed
            self._parser = _made(template, tools.callable, "")
        self._schemas, self._parallel, self._make_own, self._id_letters = tools.schemas, tools.parallel, own, id_letters
        self._has_pairs = template["fields"].get(CALLS, {}).get("content") in PAIRS
        self._unseen = {*unseen}
        self._scanner = Scanner(self._unseen) if self._unseen else None
        self._own: Parser | None = None  # once transformers' has failed
        self._rest = ""  # what was read and is not told
        self._in_call = False
        self._count = 0
        self._thought, self._words, self._has_thought = Blanks(), Blanks(), False

    def feed(self, text: str) -> Part:
        """Take generated text; returns what has become certain."""
        if self._scanner is None:
            return self._read(text)
        return joined([self._read(piece) for piece in self._scanner.feed(text) if piece not in self._unseen])

    def finish(self, finish_reason: str) -> Part:
        """What is left when no more text comes."""
        parts = [self._read(self._scanner.finish())] if self._scanner is not None else []
        if self._own is None:
            parts.append(self._end(finish_reason))
        if self._own is not None:
            parts.append(self._numbered(self._own.finish(finish_reason)))
        return joined(parts)

    def _read(self, text: str) -> Part:
        parts = []
        for place, letter in enumerate(text):
            if self._own is not None:
                parts.append(self._numbered(self._own.feed(text[place:])))
                break
            self._rest += letter
            try:
                parts.append(self._told(self._parser.feed(letter)))
                is_lost = self._in_call and len(self._rest) > LONGEST_CALL
            except Exception:  # what it raises depends on what a model writes
                is_lost = True
            if is_lost:
                parts.append(self._give_up())
        return joined(parts)

    def _end(self, finish_reason: str) -> Part:
        if self._in_call and finish_reason != "stop":  # what is cut off is no call
            return self._give_up()
        try:
            _, events = self._parser.finalize()
            if finish_reason != "stop" and any(event["field"] == CALLS for event in events):
                return self._give_up()
            told = self._told(events)
        except Exception:
            return self._give_up()
        left = "" if self._count else self._words.left
        return joined([told, Part(left)])

    def _give_up(self) -> Part:
        """The family's parser reads what was not told, and all that comes."""
        self._own, rest = self._make_own(), self._words.left + self._rest
        return self._numbered(self._own.feed(rest))

    def _told(self, events: Iterable[Mapping[str, Any]]) -> Part:
        parts = []
        for event in events:
            kind, field = event["type"], event["field"]
            self._has_thought |= field in THOUGHTS
            if field == CALLS:
                self._in_call = kind != "region_close"
                parts += [self._called(event["value"])] if kind == "region_close" else []
            elif kind == "region_chunk":
                parts.append(self._said(field, event["text"]))
        return joined(parts)

    def _said(self, field: str, text: str) -> Part:
        place = self._rest.rfind(text)  # before it stand markers; behind it what may become one
        self._rest = self._rest[place + len(text) :]
        if field in THOUGHTS:
            return Part(reasoning=self._thought.without(text, is_first=self._thought.is_new))
        if field != "content":
            return Part()
        if self._words.is_new:
            self._thought.left = ""
        return Part(self._words.without(text, is_first=self._words.is_new and self._has_thought))

    def _called(self, value: Any) -> Part:
        found = read_calls(json.dumps(value, ensure_ascii=False), self._schemas)
        if found is None or (self._has_pairs and any(map(self._is_passed_over, found))):
            raise ValueError("a call without a name or without an object of arguments")
        self._rest, self._words.left = "", ""
        return Part(calls=tuple(map(self._piece, found if self._parallel else found[: 1 - self._count])))

    def _is_passed_over(self, call: Written) -> bool:
        """Whether a call has no arguments although something is written in their place."""
        written = _CLOSING.sub("", self._rest.partition(call.name)[2])
        return call.arguments == "{}" and any(map(str.isalnum, written))

    def _piece(self, call: Written) -> CallPiece:
        self._count += 1
        return CallPiece(self._count - 1, call.arguments, call.name, call.id or call_id(self._id_letters))

    def _numbered(self, part: Part) -> Part:
        """Calls that the family's parser found come behind those before."""
        return part._replace(calls=tuple(call._replace(place=call.place + self._count) for call in part.calls))
