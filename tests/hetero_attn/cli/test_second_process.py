"""A function in a process beside this one: the same result there and here, and nothing left behind.

Each runs in a Python of its own, for processes are forked only before the solver is imported."""

import subprocess
import sys

import pytest

PRELUDE = """
import os, sys
from hetero_attn.cli.shell.second_process import SecondProcess
here = os.getpid()

def where(*arguments):
    return os.getpid(), arguments

def fails_there():
    if os.getpid() != here:
        os._exit(1)
    return "found here"
"""
FORKS = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@FORKS
def test_it_is_called_in_another_process_with_what_it_was_given():
    found = run("""
os.sched_getaffinity = lambda process: {0, 1}
with SecondProcess(where, ["json.tool"]) as beside:
    beside.fork()
    assert "json.tool" in sys.modules
    beside.call(1, "two")
    process, arguments = beside.result()
print(process != here, arguments)
""")

    assert found == "True (1, 'two')"


@pytest.mark.parametrize(
    "why", ["sys.modules['scipy.optimize'] = os", "os.sched_getaffinity = lambda process: {0}", "sys.platform = 'x'"]
)
def test_it_is_called_here_where_no_process_is_forked(why):
    found = run(f"""
{why}
with SecondProcess(where) as beside:
    beside.fork()
    beside.call(1)
    print(beside.result() == (here, (1,)))
""")

    assert found == "True"


@FORKS
@pytest.mark.parametrize(
    ("function", "result"),
    [("fails_there", "found here"), ("lambda: int('x')", "invalid literal for int() with base 10: 'x'")],
)
def test_what_the_other_process_fails_at_is_found_here(function, result):
    found = run(f"""
os.sched_getaffinity = lambda process: {0, 1}
with SecondProcess({function}) as beside:
    beside.fork()
    beside.call()
    try:
        print(beside.result())
    except ValueError as error:
        print(error)
""")

    assert found == result


@FORKS
@pytest.mark.parametrize("asked", ["beside.call()", "pass"])
def test_a_process_whose_result_nobody_wants_ends_with_its_block(asked):
    found = run(f"""
import time
os.sched_getaffinity = lambda process: {0, 1}
with SecondProcess(lambda: time.sleep(3600)) as beside:
    beside.fork()
    {asked}
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("none left")
""")

    assert found == "none left"
