"""Whole processes: forks, spawned workers, and an interpreter that ends while a thread generates."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.models.toy import make_checkpoint
from tests.support.processes.quick_python import quick_python

ROOT = Path(__file__).parents[3]

HEAD = """
import os, signal, sys, threading, time
from hetero_attn import LLM, SamplingParams
from hetero_attn.errors import EngineDeadError
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
def load():
    memory = {} if sys.argv[2] == "cpu" else {"gpu_memory": "8MiB"}
    return LLM(sys.argv[1], dtype="fp32", device=sys.argv[2], progress=False, **memory)
"""

FORK = """
import itertools
import torch
(torch.randn(4000000) + 1).sum()  # torch's pool has threads, which a child will not have
llm = load()
expected = llm.generate("hello", PARAMS)[0].token_ids
ended = threading.Event()
def work():
    while not ended.is_set():
        llm.generate("another", PARAMS)
thread = threading.Thread(target=work)
for when, what in itertools.product(sys.argv[3:], ("generate", "exit", "load")):
    if when == "busy" and not thread.ident:
        thread.start()
        time.sleep(0.1)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        if what == "generate":
            for call in (lambda: llm.generate("hello", PARAMS), lambda: llm.stream("hello"), llm.step, lambda: llm.logits([3])):
                try:
                    call()
                    sys.exit("nothing was raised")
                except EngineDeadError as error:
                    assert "spawn" in str(error), error
            llm.close()
        if what == "load":
            with load() as own:
                assert own.generate("hello", PARAMS)[0].token_ids == expected
                own.logits(list(range(4, 100)))
        sys.exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0, (when, what, status)
    assert llm.generate("hello", PARAMS)[0].token_ids == expected
ended.set()
if thread.ident:
    thread.join()
llm.close()
print("fine")
"""

EXIT = """
llm = load()
def work():
    while True:
        llm.generate("a prompt", PARAMS)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print("fine", flush=True)
"""

EXIT_BESIDE_STEPS = (
    """
import torch
import hetero_attn.serving.intake as module
sampler = module.Sampler
def slow_sampler(*arguments):
    for _ in range(300):
        torch.ones(200, 200) @ torch.ones(200, 200)
    return sampler(*arguments)
module.Sampler = slow_sampler
"""
    + EXIT
)

EXIT_BEFORE_AN_ANSWER_IS_READ = """
import atexit
ended = threading.Event()
def let_the_thread_read():
    ended.set()
    time.sleep(0.3)
atexit.register(let_the_thread_read)  # before the model's, which therefore comes first
llm = load()
stream = llm.stream("a prompt", PARAMS)
next(stream)
def work():
    ended.wait()
    stream.output()
def waiting(requests):
    llm._turns.add(requests[0])
    llm.step()
    ended.wait()
def generate():
    llm._run = waiting  # as one whose requests the end has ended
    llm.generate("a prompt", PARAMS)
threading.Thread(target={"stream": work, "generate": generate}[sys.argv[3]], daemon=True).start()
time.sleep(0.2)
print("fine", flush=True)
"""

THREAD_OUTLIVES_MAIN = """
llm = load()
expected = llm.generate("a prompt", PARAMS)[0].token_ids
def work():
    time.sleep(0.3)
    assert all(llm.generate("a prompt", PARAMS)[0].token_ids == expected for _ in range(5))
    print("fine", flush=True)
threading.Thread(target=work).start()
"""

SPAWN = """
import multiprocessing
def work(queue):
    with load() as own:
        queue.put(own.generate("hello", PARAMS)[0].token_ids)
if __name__ == "__main__":
    with load() as llm:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        children = [context.Process(target=work, args=(queue,)) for _ in range(int(sys.argv[3]))]
        for child in children:
            child.start()
        got = [queue.get(timeout=100) for _ in children]
        for child in children:
            child.join()
        assert got == len(children) * [llm.generate("hello", PARAMS)[0].token_ids]
        assert not any(child.exitcode for child in children)
    print("fine")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("lifecycle"), "llama", max_position_embeddings=128)


def run(tmp_path, script, *arguments):
    """The script's output, its errors and its exit status."""
    file = tmp_path / "script.py"  # spawn imports the main module again, so it must be a file
    file.write_text(HEAD + script)
    command = quick_python(file, *arguments)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200, env=environment)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize(
    ("device", "parent"),
    [
        ("cpu", ["busy"]),
        *(pytest.param(*each, marks=pytest.mark.matrix) for each in (("cpu", ["rest"]), ("emulated", ["busy"]))),
    ],
)
def test_a_forked_child_is_told_so_and_harms_nobody(tmp_path, path, device, parent):
    """It gets a named error at once, can load a model of its own, and runs none of its parent's finalisers."""
    output, errors, status = run(tmp_path, FORK, path, device, *parent)

    assert (output, status) == ("fine\n", 0), errors


@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=pytest.mark.matrix)])
def test_the_interpreter_ends_cleanly_while_a_daemon_thread_generates(tmp_path, path, device):
    assert run(tmp_path, EXIT, path, device) == ("fine\n", "", 0)


def test_the_interpreter_ends_cleanly_while_a_daemon_thread_is_in_torch_beside_the_steps(tmp_path, path):
    """A thread that makes a request is in torch's code too, and ended the process when it came back from there."""
    assert run(tmp_path, EXIT_BESIDE_STEPS, path, "cpu") == ("fine\n", "", 0)


@pytest.mark.parametrize("call", ["stream", "generate"])
def test_a_daemon_thread_that_finds_its_answer_ended_by_the_interpreter_says_nothing(tmp_path, path, call):
    assert run(tmp_path, EXIT_BEFORE_AN_ANSWER_IS_READ, path, "cpu", call) == ("fine\n", "", 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=pytest.mark.matrix)])
def test_a_thread_may_go_on_when_the_main_thread_has_ended(tmp_path, path, device):
    assert run(tmp_path, THREAD_OUTLIVES_MAIN, path, device) == ("fine\n", "", 0)


@pytest.mark.parametrize("children", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_spawned_processes_load_a_model_each(tmp_path, path, children):
    output, errors, status = run(tmp_path, SPAWN, path, "cpu", children)

    assert (output, status) == ("fine\n", 0), errors
