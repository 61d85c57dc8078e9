"""A chat in a terminal, with every command that /help lists: typed by a person, so over a pseudo-terminal."""

import os
import re
import select
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hetero_attn.cli.talk.commands import HELP
from tests.support.processes.quick_python import quick_python

pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "examples" / "tiny"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
MOST_S = 200  # for one answer; the first kernels may have to be compiled, beside other work
# What is typed, and what must stand on the screen before the next line is typed.
TYPED = (
    ("/help", "/stats"),
    ("What is a list?", "tokens/s; first token after"),
    ("/stats", "messages dropped: 0"),
    ("/set temperature 0", "temperature is 0"),
    ("/set", "temperature          0"),
    ("/set temprature 1", "did you mean temperature"),
    ("/system Be short.", "every turn begins"),
    ("/system", "\nBe short."),
    ("/regen", "tokens/s; first token after"),
    ("/save talk.json", "saved to talk.json"),
    ("/reset", "is forgotten"),
    ("/load talk.json", "went on with talk.json"),
    ("/plan", "predicted on"),
    ("/hlp", "did you mean /help"),
    ('"""two', "... "),
    ('lines"""', "tokens/s; first token after"),
)


class Terminal:
    """A program in a pseudo-terminal: what it shows is read, keys are written."""

    def __init__(self, arguments, folder):
        self.shown = ""
        self.descriptor, its_end = pty.openpty()
        settings = {"TERM": "xterm", "COLUMNS": "120", "XDG_STATE_HOME": str(folder), "PROMPT_TOOLKIT_NO_CPR": "1"}
        settings["PYTHONPATH"] = str(ROOT)
        self.child = subprocess.Popen(
            quick_python("-m", "hetero_attn", *arguments), cwd=folder, env=os.environ | settings,
            stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True,
        )  # fmt: skip
        os.close(its_end)

    def wait_for(self, text):
        """What is shown, from where the last call ended, up to and with `text`; fails after MOST_S."""
        until = time.monotonic() + MOST_S
        while text not in CONTROL.sub("", self.shown):
            left = until - time.monotonic()
            assert left > 0 and select.select([self.descriptor], [], [], left)[0], f"no {text!r} in {self.shown!r}"
            self.shown += self.read()
        before, _, self.shown = CONTROL.sub("", self.shown).partition(text)
        return before + text

    def read(self):
        try:
            return os.read(self.descriptor, 1 << 16).decode(errors="replace")
        except OSError:  # Linux reports so that the program is gone
            pytest.fail("the chat ended by itself")

    def type(self, line):
        """A line and its end."""
        os.write(self.descriptor, f"{line}\r".encode())

    def end(self):
        """Wait for the end; the exit code. What is shown meanwhile is read, or the program could not end."""
        while self.child.poll() is None:
            if select.select([self.descriptor], [], [], 0.1)[0]:
                with suppress(OSError):  # Linux reports so that the program is gone
                    os.read(self.descriptor, 1 << 16)
        return self.child.returncode


@pytest.fixture
def terminal(tmp_path):
    opened = Terminal(["chat", str(TINY), "--device", "cpu", "-n", "8", "-c", "512"], tmp_path)
    yield opened
    opened.child.kill()
    opened.child.wait()
    os.close(opened.descriptor)


def test_every_command_of_a_chat_does_what_its_help_says(terminal, tmp_path):
    banner = terminal.wait_for("Ctrl-D leaves")
    assert "tiny" in banner and "context 512" in banner and "tokens/s expected" in banner
    for line, answer in TYPED:
        terminal.type(line)
        terminal.wait_for(answer)
    terminal.type("/exit")

    assert terminal.end() == 0
    typed = {line.partition(" ")[0] for line, _ in TYPED} | {"/exit"}
    assert set(HELP) <= typed, "a command that nobody tried"
    assert "What is a list?" in (tmp_path / "talk.json").read_text()
    assert "What is a list?" in (tmp_path / "hetero_attn" / "chat_history").read_text()
