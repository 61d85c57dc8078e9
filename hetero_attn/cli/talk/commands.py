"""The /commands of a chat."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hetero_attn.cli.output import speed_line, table_width
from hetero_attn.cli.talk.conversation import Conversation
from hetero_attn.errors import HeteroError, PromptError

HELP = {
    "/help": "this list",
    "/exit": "leave; also /bye, /quit and Ctrl-D",
    "/reset": "forget the conversation; also /clear",
    "/regen": "answer the last question anew",
    "/system": "/system TEXT sets the system message, /system - removes it, alone it shows it",
    "/set": "/set temperature 0.2 and the like; /set alone shows what is set; /set enable_thinking off",
    "/save": "/save FILE writes the conversation as JSON",
    "/load": "/load FILE goes on with a saved one",
    "/plan": "what runs where",
    "/stats": "speed of the last answer, tokens of the context in use",
}
OTHER_NAMES = {"/bye": "/exit", "/quit": "/exit", "/clear": "/reset", "/?": "/help"}
NEAR, NEAR_WITH_MORE = 0.6, 0.8  # how much of a word a command must share; more where a message may be meant
TEXTS = ("stop", "json_schema", "regex", "grammar", "grammar_after")  # parameters whose values no number is
WORDS = {"on": True, "true": True, "off": False, "false": False, "none": None}


MESSAGES = """a space before /word makes a message of it; a path such as /etc/hosts is one
\"\"\" begins and ends a message of several lines (or Alt+Enter); Ctrl-C ends an answer"""


def command_of(line: str) -> str | None:
    """The command that a line gives, None for a message to the model; a message may begin with a slash too.

    Raises PromptError for a word that is no command where it stands alone or is nearly one; a path is a message.
    """
    if not line.startswith("/"):
        return None
    word, *rest = line.split(maxsplit=1)
    command = OTHER_NAMES.get(word, word)
    if command in HELP or "/" in word[1:]:
        return command if command in HELP else None
    near = difflib.get_close_matches(word, [*HELP, *OTHER_NAMES], 1, NEAR_WITH_MORE if rest else NEAR)
    if rest and not near:
        return None
    hint = f"; did you mean {near[0]}?" if near else ";"
    raise PromptError(f"{word} is no command{hint} /help lists them. A space before it makes a message of it")


def help_text() -> str:
    """All commands, a line each, and how to write a message."""
    lines = [f"{name:<8} {what}" for name, what in HELP.items()]
    return "\n".join([*lines, MESSAGES])


def run_command(command: str, argument: str, talk: Conversation, say: Callable[[str], None]) -> None:
    """Carry out a command that needs no answer of the model; raises PromptError and SamplingError."""
    actions: dict[str, Callable[[], None]] = {
        "/help": lambda: say(help_text()),
        "/reset": lambda: _reset(talk, say),
        "/system": lambda: _system(argument, talk, say),
        "/set": lambda: _set(argument, talk, say),
        "/save": lambda: _file(argument, talk.save, say, "saved to"),
        "/load": lambda: _file(argument, talk.load, say, "went on with"),
        "/plan": lambda: say(talk.llm.plan.table(table_width()).rstrip()),
        "/stats": lambda: say(_stats(talk)),
    }
    actions[command]()


def _reset(talk: Conversation, say: Callable[[str], None]) -> None:
    talk.reset()
    say("the conversation is forgotten; the system message stays" if talk.system else "the conversation is forgotten")


def _system(argument: str, talk: Conversation, say: Callable[[str], None]) -> None:
    if not argument:
        say(talk.system or "no system message")
        return
    before, talk.system = talk.system, None if argument == "-" else argument
    try:
        _ = talk.tokens
    except HeteroError:
        talk.system = before
        raise
    say("no system message any more" if talk.system is None else "every turn begins with this system message")


def _set(argument: str, talk: Conversation, say: Callable[[str], None]) -> None:
    names = [field.name for field in fields(talk.params)]
    if not argument:
        shown = {name: getattr(talk.params, name) for name in names} | talk.variables
        say("\n".join(f"{name:<20} {value}" for name, value in shown.items()))
        return
    name, _, text = argument.partition(" ")
    name = name.lstrip("-").replace("-", "_")  # as errors and the shell's options spell it
    value = _value(name, text.strip())
    variables = set() if talk.llm.tokenizer is None else talk.llm.tokenizer.template_variables
    if name in names:
        talk.params = replace(talk.params, **{name: value})
    elif name in variables:
        talk.variables[name] = value
    else:
        near = difflib.get_close_matches(name, [*names, *variables], 1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise PromptError(
            f"{name} is neither a sampling parameter nor a variable of the chat template{hint}; /set alone lists them"
        )
    say(f"{name} is {value}")


def _value(name: str, text: str) -> Any:
    """What a text of `/set` gives a parameter or variable; -1 for max_tokens as the shell's option has it."""
    if name in TEXTS and text.lower() != "none":
        return text
    value = parse_value(text)
    return None if name == "max_tokens" and value == -1 else value


def parse_value(text: str) -> Any:
    """A number, on | off | none, or the text itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _file(argument: str, action: Callable[[Path], None], say: Callable[[str], None], what: str) -> None:
    if not argument:
        raise PromptError("a file name is missing")
    try:
        action(Path(argument).expanduser())
    except PromptError:
        raise
    except (RuntimeError, ValueError) as error:  # a user without a home, links in a ring, a zero byte
        raise PromptError(f"{argument} is no file name: {error}") from None
    except OSError as error:
        raise PromptError(f"{argument}: {error.strerror or error}") from None
    say(f"{what} {argument}")


def _stats(talk: Conversation) -> str:
    lines = [] if talk.last is None else [speed_line(talk.last)]
    context = talk.llm.plan.max_context
    used = min(talk.tokens, context)  # an answer that was cut at the end has no room for the words that close it
    lines.append(f"context: {used} of {context} tokens; messages dropped: {talk.dropped}")
    return "\n".join(lines)
