"""Python programs that begin with what a load imports: most of a second process's CPU time is `import torch`.

One process of a run has imported the packages, and is forked for every program. `quick_python` gives the command of a
small client, which hands over its arguments, folder, environment and streams, passes on signals, and ends as the program
ends. What is forked is a process like any other, whose interpreter ends as interpreters do. Only what happens while
these modules are imported, what a process holds in its memory, and streams that are closed cannot be tested so: such
tests start `sys.executable`. What a test of another process has asked the solver is not asked again.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from placement.program.program import Program
from tests.support.planning.solved import answers_once

ROOT = Path(__file__).resolve().parents[3]
CLIENT = Path(__file__).with_name("quick_client.py")
IMPORTED = ("torch", "hetero_attn.llm", "hetero_attn.cli")
LENGTH_BYTES = 8


def quick_python(*arguments: object) -> list[str]:
    """The command that does what `python ARGUMENTS` does: -c CODE, -m MODULE or a file, and what these are given."""
    if not hasattr(os, "pidfd_open"):
        return [sys.executable, *map(str, arguments)]
    return [sys.executable, "-I", "-S", str(CLIENT), _server(), *map(str, arguments)]


@functools.cache
def _server() -> str:
    """The socket of this run's process, which ends when its standard input does."""
    folder = tempfile.mkdtemp(prefix="quick_python")
    place = os.path.join(folder, "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(32)
        command = [sys.executable, "-m", "tests.support.processes.quick_python", str(listener.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    atexit.register(_end, process, folder)
    return place


def _end(process: subprocess.Popen, folder: str) -> None:
    process.stdin.close()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for every client. In a process that is to run its program: what was asked, and its streams; else None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        client = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            return _watched(client)
        client.close()
    return None


def _watched(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """In a process of the program: what it is to run. The one that watches it ends here, when the program or client
    has."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(client, LENGTH_BYTES, 3)
    with client.makefile("rb") as file:
        asked = json.loads(file.read(int.from_bytes(head, "little")))
    pid = os.fork()
    if pid == 0:
        client.close()
        return asked, streams
    for stream in streams:
        os.close(stream)
    client.sendall(b"%d\n" % pid)
    ended = os.pidfd_open(pid)
    if ended in select.select([ended, client], [], [])[0]:
        client.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    else:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _become(asked: dict[str, Any], streams: list[int]) -> None:
    """Take the folder, environment, streams and signals of a program that begins."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(asked["cwd"])
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(asked["env"])
    own = [each for each in sys.path[1:] if each not in before]
    sys.path[1:] = [*filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep)), *own]
    is_unbuffered = bool(asked["env"].get("PYTHONUNBUFFERED"))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False)
        if name != "stdin":
            file.reconfigure(write_through=is_unbuffered, line_buffering=file.isatty() or name == "stderr")
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    random.seed()


def _run(kind: str, *arguments: str) -> None:
    """What `python KIND ARGUMENTS` runs."""
    if kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), [*arguments]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), vars(main))
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(kind)), [kind, *arguments]
        main = sys.modules["__main__"] = ModuleType("__main__")
        main.__file__ = kind
        exec(compile(Path(kind).read_bytes(), kind, "exec"), vars(main))


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    for name, once in answers_once(Program).items():
        setattr(Program, name, once)
    gc.collect()
    gc.freeze()  # what programs share is nobody's garbage: they neither look through it nor copy its pages for that
    if found := _serve(socket.socket(fileno=int(sys.argv[1]))):
        _become(*found)
        _run(*found[0]["arguments"])
