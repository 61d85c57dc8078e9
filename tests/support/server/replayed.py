"""Requests that other projects' tests and clients make, as cases: what is sent, and what has to come back."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
import pytest

FOLDER = "tests/server/replayed/test_"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request of a suite.

    name: what it shows, unique in its suite. path, body: what is sent; without a body it is a GET, bytes go as they
    are. says: what the model answers, in the place of what it computes. status: of the answer. error: words that its
    message holds. check: what has to be true of the answer. key: presented to a server that wants one; None for the
    server that wants none.
    """

    name: str
    path: str
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    says: str | None = None
    status: int = 200
    error: str | None = None
    check: Callable[["Reply"], object] | None = None
    key: str | None = None


class Reply:
    """An answer, as the protocols' readers see it. again: sends the same request once more."""

    def __init__(self, answer: httpx.Response, prompts: Sequence[str], again: Callable[[], "Reply"]) -> None:
        self.answer, self.prompts, self.again = answer, prompts, again
        self.text = answer.text

    @cached_property
    def json(self) -> Any:
        """The body as JSON."""
        return self.answer.json()

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What a stream of server-sent events holds; its framing is checked."""
        assert "\r" not in self.text and self.text.endswith("\n\n")
        found = []
        for frame in self.text.removesuffix("\n\n").split("\n\n"):
            name, data = re.fullmatch(r"(?:event: ([\w.]+)\n)?data: (.*)", frame).groups()
            if data == "[DONE]":
                assert self.text.endswith("data: [DONE]\n\n")
                continue
            found.append(json.loads(data))
            assert name is None or name == found[-1]["type"]
        return found

    @property
    def kinds(self) -> list[str]:
        """The events' types, each run of the same as one."""
        kinds = [event["type"] for event in self.events]
        return [kind for number, kind in enumerate(kinds) if number == 0 or kinds[number - 1] != kind]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of JSON, as Ollama's streams are."""
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def choice(self) -> dict[str, Any]:
        """The first choice of an answer that is no stream."""
        return self.json["choices"][0]

    @property
    def said(self) -> str:
        """The text of the first choice, by whichever of OpenAI's protocols."""
        if "choices" in self.json:
            return self.choice["message"]["content"] if "message" in self.choice else self.choice["text"]
        return "".join(part["text"] for item in self.json["output"] for part in item.get("content", ()))

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """Names and arguments of the calls of a chat's message."""
        calls = self.choice["message"].get("tool_calls") or ()
        return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]

    @property
    def deltas(self) -> list[dict[str, Any]]:
        """The deltas of a streamed chat, in order."""
        return [choice["delta"] for chunk in self.events for choice in chunk["choices"]]

    @property
    def streamed(self) -> str:
        """The text that they join to."""
        return "".join(delta.get("content") or "" for delta in self.deltas)

    @property
    def error(self) -> str:
        """The message of an error, by whichever protocol."""
        error = self.json["error"]
        return error if isinstance(error, str) else error["message"]


def each(cases: Sequence[Any]) -> pytest.MarkDecorator:
    """Runs a test for every case, which gives it its name."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def suite_lines(stats: Mapping[str, Iterable[Any]]) -> list[str]:
    """A line for each suite that was run: how many of its cases passed, failed or were skipped."""
    counted: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in stats.get(outcome, ()):
            if report.nodeid.startswith(FOLDER) and "[" in report.nodeid:
                suite = report.nodeid.removeprefix(FOLDER).partition(".py")[0]
                counted.setdefault(suite, Counter())[outcome] += 1
    lines = []
    for suite, outcomes in sorted(counted.items()):
        told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        lines.append(f"replayed suite {suite}: {told}")
    return lines


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a model writes, and what it means.

    family: of the marks. text: all of it. said, thought, calls: what it is. prompt_end: the words that the answer
    follows. finish_reason: how the answer ended.
    """

    name: str
    family: str
    text: str
    said: str = ""
    thought: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    prompt_end: str = ""
    finish_reason: str = "stop"
