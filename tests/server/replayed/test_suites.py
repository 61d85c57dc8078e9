"""The suites are all there, and large enough: counted in the tables that the tests run over."""

import importlib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = {
    "llama_server": 40,
    "vllm_entrypoints": 40,
    "vllm_tool_parsers": 40,
    "open_responses": 7,
    "openai_python": 10,
    "anthropic_python": 7,
    "ollama": 30,
    "tabby": 20,
    "mask_bench": 30,
    "bfcl_humaneval": 10,
    "codex_reader": 7,
    "open_webui": 20,
}


def names_of(suite: str) -> list[str]:
    return [case.name for case in importlib.import_module(f"tests.server.replayed.test_{suite}").CASES]


def test_every_suite_is_there_with_its_cases():
    files = {path.stem.removeprefix("test_") for path in HERE.glob("test_*.py")} - {"suites"}
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra grammar): mask_bench has no cases")
    names = {suite: names_of(suite) for suite in SUITES}

    assert files == set(SUITES)
    assert all(len(set(names[suite])) == len(names[suite]) >= least for suite, least in SUITES.items())
    assert sum(map(len, names.values())) >= 300
