"""Where the lines of a chat come from: an editor with history in a terminal, plain lines from a pipe.

Three quotes begin and end a message of several lines; in the editor Alt+Enter begins a new line as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

import typer

from hetero_attn.cli.shell.streams import MOST_LINE_BYTES, decoded

QUOTES = '"""'
PROMPT = "> "
CONTINUED = "... "


class LineSource(Protocol):
    """Anything that gives lines. `line` raises EOFError at the end and KeyboardInterrupt for Ctrl-C."""

    def line(self, prompt: str) -> str:
        """The next line, without its end."""
        ...


class PipedLines:
    """Lines of standard input as they are; one that is no UTF-8 is reported and left out."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    def line(self, prompt: str) -> str:
        """The next line that can be read; the prompt is for people, and not printed."""
        while raw := self._raw():
            if len(raw) == MOST_LINE_BYTES:
                self._report(f"a line of over {MOST_LINE_BYTES} bytes was left out, and what comes after it")
                break
            try:
                return decoded(raw, sys.stdin.encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                self._report(f"a line that is no UTF-8 text was left out ({error.reason} at byte {error.start})")
        raise EOFError

    def _raw(self) -> bytes:
        try:
            return sys.stdin.buffer.readline(MOST_LINE_BYTES)
        except OSError as error:
            raise typer.BadParameter(f"stdin cannot be read: {error.strerror}") from None


class EditedLines:
    """Lines edited in a terminal, with the history of earlier sessions."""

    def __init__(self, completions: tuple[str, ...]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings

        from hetero_attn.cli.talk.history import open_history

        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        self._session = PromptSession(
            history=open_history(),
            completer=WordCompleter(list(completions), sentence=True),
            complete_while_typing=False,
            key_bindings=keys,
            enable_open_in_editor=False,
        )

    def line(self, prompt: str) -> str:
        """One line from a person, or several joined by Alt+Enter."""
        from prompt_toolkit.formatted_text import FormattedText

        return self._session.prompt(FormattedText([("ansigreen bold", prompt)]), prompt_continuation=CONTINUED)


def line_source(report: Callable[[str], None], completions: tuple[str, ...]) -> LineSource:
    """The editor where a person types, else plain lines. Raises typer.BadParameter where stdin is closed."""
    if sys.stdin is None:
        raise typer.BadParameter("stdin is closed, so no message can be read; a chat needs a terminal or a pipe")
    if sys.stdin.isatty() and sys.stdout.isatty():
        return EditedLines(completions)
    return PipedLines(report)


def read_message(source: LineSource) -> str:
    """The next message, stripped; of several lines where it begins with three quotes.

    A command begins with a slash: a message that shall be none, for a space or quotes are before it, with a space.
    Raises EOFError and KeyboardInterrupt as the source does.
    """
    line = source.line(PROMPT)
    text = line.strip()
    if not text.startswith(QUOTES):
        return _as_message(text) if line[:1].isspace() else text
    lines = [text[len(QUOTES) :]]
    while not lines[-1].rstrip().endswith(QUOTES):
        try:
            lines.append(source.line(CONTINUED))
        except EOFError:
            return _as_message("\n".join(lines).strip())
    lines[-1] = lines[-1].rstrip()[: -len(QUOTES)]
    return _as_message("\n".join(lines).strip())


def _as_message(text: str) -> str:
    return f" {text}" if text.startswith("/") else text
