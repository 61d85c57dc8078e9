"""The benchmarks of quality run to their last line on the shipped model, and compare what they say they do."""

import json
from pathlib import Path

import pytest

from hetero_attn.tools.quantize.write import quantize
from tests.support.processes.scripts import run_script

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny"


def run(name, *arguments):
    """What a script printed last, as JSON."""
    done = run_script(ROOT / "examples" / "benchmarks" / "quality" / name, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.matrix
def test_the_curve_has_a_row_for_every_file_and_is_kept(tmp_path):
    """A second run measures nothing again: the row that was changed in the file stays as it is."""
    json_file, picture = tmp_path / "found.json", tmp_path / "curve.svg"
    wishes = (TINY, "--work", tmp_path / "files", "--json", json_file, "--windows", 1, "--recipes", "q8")
    found = run("quality_curve.py", *wishes)
    (row,) = found["rows"]

    assert row["name"] == "q8" and row["bits"] == 8.5
    assert 0 < row["mean_kl"] < 1e-3 and row["same_top"] > 0.98
    assert abs(row["perplexity"] / found["unquantised_perplexity"] - 1) < 0.01
    json_file.write_text(json.dumps(found | {"rows": [row | {"mean_kl": 7.0}]}))
    again = run("quality_curve.py", *wishes, "--no-text", "--plot", picture)
    assert again["rows"] == [row | {"mean_kl": 7.0}] and picture.stat().st_size > 1000


@pytest.mark.matrix  # an ordinary run has test_gguf_models.py, which holds every type to transformers
def test_a_file_of_ours_is_what_transformers_makes_of_it(tmp_path):
    pytest.importorskip("gguf", reason="transformers reads GGUF files with it")
    file = tmp_path / "tiny.gguf"
    quantize(TINY, file, "q8", threads=2)
    (row,) = run("gguf_exactness.py", file, "--windows", 1)["rows"]

    assert row["perplexity"] == pytest.approx(row["transformers_perplexity"], rel=1e-5)
    assert row["largest_logit_error"] < 1e-4
    assert 0 < row["largest_error_of_ours"] < 2 * row["largest_error_of_transformers"] < 1e-3
    assert row["greedy_tokens_equal"] == 64
    assert row["packed_perplexity"] == pytest.approx(row["perplexity"], rel=0.01)
