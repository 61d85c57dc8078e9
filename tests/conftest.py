"""Settings of the whole suite."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from cpu_kernels.ahead.builders import build_all
from placement.program.program import Program
from tests.support.planning.solved import answers_once
from tests.support.server.replayed import suite_lines
from tests.support.suite.covering import leave_out_the_rest
from tests.support.suite.extras import MISSING_OF_SERVER

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tensors of tests are tiny: the threads of torch's pool only wait for each other, and spin on the cores meanwhile. The
# tests of attention took eight times the CPU time with two. Processes that tests start have their pool.
torch.set_num_threads(1)
# A shell starts background work with Ctrl-C ignored, and processes inherit that: tests that send it would wait for
# nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Each takes long: where processes share the files out, none may begin with one at the end.
LONG = (
    "test_interpreter.py",
    "test_verify.py",
    "test_aot.py",
    "test_quantize_choice.py",
    "test_benchmarks.py",
    "test_lifecycle.py",
    "test_experts.py",
    "test_draft_model.py",
    "test_planner.py",
    "test_expert_slots.py",
    "test_arm64.py",
)


# Markers of what takes minutes, and the target of the Makefile that asks for each.
ON_REQUEST = {
    "matrix": "make test-matrix",
    "soak": "make test-all",
    "aot_full": "make test-all",
    "mutations": "make test-all",
}


@pytest.hookimpl(tryfirst=True)  # before pytest goes by the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes many minutes runs on request, what takes long in one file runs first."""
    leave_out_the_rest(items)
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    moving = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if moving:
        raise pytest.UsageError(f"names of tests hold addresses, which each process has of its own: {moving[:3]}")
    for item in items:
        for name, target in ON_REQUEST.items():
            if name in item.keywords and name not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"takes minutes; ask for it with -m {name}, or {target}"))


def pytest_collection_finish() -> None:
    """What modules have made stays: no later collection looks through their half a million objects again. Collections
    are rare, a tenth of a test's CPU time else; tests that wait for one ask for it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_compiled_here() -> Iterator[None]:
    """No process is started for the few CPU kernels that a load misses, as a user's would be: this one has the compiler
    loaded, and its neighbours use the other cores."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            "cpu_kernels.kernels.build_all", lambda store, missing, processes: build_all(store, missing, 1)
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def _programs_are_solved_once() -> Iterator[None]:
    """Many tests plan the same model for the same machine; where one has another solver in its place, that is asked."""
    import scipy.optimize

    solver, solve = scipy.optimize.milp, Program.solve
    once = answers_once(Program)

    def solve_once(self: Program, whole_numbers: bool = True) -> list[float] | None:
        return (once["solve"] if scipy.optimize.milp is solver else solve)(self, whole_numbers)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Program, "solve", solve_once)
        monkeypatch.setattr(Program, "relaxed", once["relaxed"])
        yield


@pytest.fixture(scope="module")
def tokenizer():
    """That of the shipped model."""
    from hetero_attn.serving.text.tokenizer import Tokenizer
    from tests.support.server.http_server import TINY

    return Tokenizer.open(TINY)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    """What the shipped model's answers can be made to follow."""
    from hetero_attn.serving.grammar import Grammars

    return Grammars(tokenizer, 4096, tokenizer.eos_token_ids)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what each replayed suite came to, or why no server was tested; here, because the process that shares tests
    out reads no folder's conftest."""
    for line in suite_lines(terminalreporter.stats):
        terminalreporter.line(line)
    if MISSING_OF_SERVER:
        missing = ", ".join(MISSING_OF_SERVER)
        terminalreporter.line(f"tests/server is skipped: {missing} not installed (extra test-tools)")
