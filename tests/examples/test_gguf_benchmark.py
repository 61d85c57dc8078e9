"""The comparison of GGUF files: what it makes of the answers of its three sides."""

import argparse
import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


class Side:
    """Answers every test with these seconds of wall and of CPU time."""

    def __init__(self, seconds: float, cpu_seconds: float) -> None:
        self._answer = {"seconds": seconds, "cpu_seconds": cpu_seconds}

    def ask(self, **request: object) -> dict[str, float]:
        """See whole_model.Worker."""
        return {"sweep_s": 0.8, "linears_s": 1.0} if request["test"] == "physics" else self._answer


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gguf_files")


@pytest.mark.parametrize(("threads", "ratio"), [(2, 2.0), (1, 3.0)])
def test_the_ratio_is_to_the_better_setting_in_cpu_time_where_there_is_one_thread(script, threads, ratio, monkeypatch):
    monkeypatch.setattr(script, "SPINNING_S", 0)
    options = argparse.Namespace(repetitions=2, threads=threads, dtype="auto")
    sides = {"ours": Side(1.0, 2.0), "repacked": Side(4.0, 6.0), "as is": Side(2.0, 8.0)}

    row = script.compare(options, Path("model.gguf"), sides, "decode", 8)

    assert row.ratio == ratio
    assert row.linears_share == 0.8
    assert row.ours == (8.0 if threads == 2 else 4.0)
    assert row.line().split()[:2] == ["model.gguf", "decode"]


def test_rows_of_other_files_are_kept_in_the_result(script, tmp_path):
    old = [{"file": name, "dtype": "auto", "test": "decode", "ours": 1.0} for name in ("a", "b")]
    new = [{"file": "b", "dtype": "auto", "test": "decode", "ours": 2.0}]
    (tmp_path / "out.json").write_text(json.dumps({"rows": old}))

    assert script.merged({"rows": new}, tmp_path / "out.json")["rows"] == [old[0], new[0]]


class Logits:
    """Answers every request with the same logits."""

    def __init__(self, *logits: float) -> None:
        self._logits = list(logits)

    def ask(self, **request: object) -> dict[str, list[float]]:
        """See whole_model.Worker."""
        assert request["test"] == "logits"
        return {"logits": self._logits}


def test_logits_are_compared_with_those_of_llama_as_it_is(script):
    sides = {"ours": Logits(3.0, 3.0), "repacked": Logits(3.0, 4.5), "as is": Logits(3.0, 4.0)}

    found = script.agreement(sides)

    assert found["ours, tokens: 1"] == found["ours, tokens: 8"] == 1 / 25
    assert found["repacked, tokens: 8"] == 0.01
