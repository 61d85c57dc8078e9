"""verify --quality: perplexity, KL and agreement against an oracle that keeps everything, and its refusals."""

import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hetero_attn import LLM
from hetero_attn.cli import app
from hetero_attn.errors import HeteroError, PromptError
from hetero_attn.planning.options import LoadOptions
from hetero_attn.tools import quality
from hetero_attn.tools.quantize.write import quantize
from tests.support.models.toy import make_checkpoint
from tests.support.processes.scripts import run_script

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"
TEXT = (TINY / "heldout.txt").read_text()[:3000]


def scores(dtype, ids):
    with LLM(TINY, dtype=dtype, device="cpu", max_context=quality.WINDOW_TOKENS, progress=False) as llm:
        return torch.log_softmax(llm.logits(ids), -1).double()


def test_figures_are_those_of_a_slow_reading():
    wishes = LoadOptions(model=TINY, device="cpu")
    report = quality.run(wishes, TEXT, ["q4"])
    with LLM(TINY, device="cpu", max_context=64, progress=False) as llm:
        ids = llm.tokenizer.encode(TEXT)
    starts = range(0, min(len(ids), quality.MOST_WINDOWS * quality.WINDOW_TOKENS), quality.WINDOW_TOKENS)
    windows = [ids[start : start + quality.WINDOW_TOKENS] for start in starts]
    plain, coarse = ([scores(dtype, window) for window in windows] for dtype in ("bf16", "q4"))
    losses = [-row[token].item() for logs, window in zip(coarse, windows) for row, token in zip(logs[:-1], window[1:])]
    first, last = torch.cat(plain), torch.cat(coarse)

    assert [row.dtype for row in report.rows] == ["bf16", "q4"] and report.tokens == len(ids)
    assert report.rows[1].perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert report.rows[1].mean_kl == pytest.approx((first.exp() * (first - last)).sum(-1).mean().item(), rel=1e-3)
    assert report.rows[1].same_top == (first.argmax(-1) == last.argmax(-1)).double().mean().item()
    assert report.rows[1].weight_bytes < report.rows[0].weight_bytes


def test_the_command_prints_a_narrow_table_and_json(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:600])
    arguments = ["verify", str(TINY), "--quality", "q8,q4", "--file", str(text), "--device", "cpu"]

    table, as_json = (CliRunner().invoke(app, arguments + more) for more in ([], ["--json"]))

    assert table.exit_code == 0, table.output
    assert max(map(len, table.stdout.splitlines())) <= 80 and "perplexity" in table.stdout
    assert [row["dtype"] for row in json.loads(as_json.stdout)["rows"]] == ["bf16", "q8", "q4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quality", "q4"], "--quality reads a text of some thousands of tokens; give it by --file"),
        (["--against", str(TINY)], "--against reads a text of some thousands of tokens; give it by --file"),
        (["--quality", "q3", "--file", "-"], "must be one of"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(arguments, said):
    result = CliRunner().invoke(app, ["verify", str(TINY), *arguments])

    assert result.exit_code in (2, 3) and said in " ".join(result.output.replace("│", " ").split())


def test_a_text_without_two_tokens_is_refused():
    with pytest.raises(PromptError, match="at least two are needed"):
        quality.run(LoadOptions(model=TINY, device="cpu"), "", ["q4"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_folder_of_temporary_files_is_named(monkeypatch):
    """Distributions over a large vocabulary take gigabytes, and ended in a traceback."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))

    with pytest.raises(
        HeteroError, match=r"distributions .* temporary files in /.* \(No space left on device\).*TMPDIR"
    ):
        quality.run(LoadOptions(model=TINY, device="cpu"), TEXT[:600], ["q4"])


def test_the_benchmark_writes_what_it_prints(tmp_path):
    script, file = TINY.parent / "benchmarks/quality/quality.py", tmp_path / "found.json"
    run = run_script(script, TINY, "--dtypes", "q8", "--json", file)

    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == json.loads(file.read_text())
    assert [row["dtype"] for row in json.loads(file.read_text())["ours"]["rows"]] == ["bf16", "q8"]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The shipped model as a GGUF file that `quantize` writes."""
    return quantize(TINY, tmp_path_factory.mktemp("quantised") / "tiny.gguf", "q4").path


def test_a_file_is_measured_beside_its_source(quantised, tmp_path):
    """By its very weights: in float32 the divergence is that of a slow reading of both, and not that of the file from
    itself."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:600])
    arguments = ["verify", str(quantised), "--against", str(TINY), "--file", str(text), "--device", "cpu", "--json"]
    run = CliRunner().invoke(app, [*arguments, "--quality", "fp32,auto"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    with LLM(quantised, dtype="fp32", device="cpu", max_context=512, progress=False) as llm:
        ids = llm.tokenizer.encode(TEXT[:600])
        coarse = torch.log_softmax(llm.logits(ids), -1).double()
    plain = scores("bf16", ids)

    assert (report["model"], report["against"], report["tokens"]) == ("tiny.gguf", "tiny", len(ids))
    assert report["rows"][0]["dtype"] == "bf16" and report["rows"][0]["mean_kl"] == 0
    assert report["rows"][1]["mean_kl"] == pytest.approx(
        (plain.exp() * (plain - coarse)).sum(-1).mean().item(), rel=1e-3
    )
    assert report["rows"][1]["mean_kl"] > 1e-4 and report["rows"][2]["weight_bytes"] < report["rows"][1]["weight_bytes"]


def test_against_alone_takes_the_file_as_it_is_held(quantised, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:600])
    run = CliRunner().invoke(
        app, ["verify", str(quantised), "--against", str(TINY), "-f", str(text), "--device", "cpu"]
    )

    assert run.exit_code == 0, run.output
    lines = run.stdout.splitlines()
    assert lines[0].startswith("tiny.gguf, ") and lines[0].endswith(" tokens, from bf16 of tiny")
    assert len(lines) == 4 and max(map(len, lines)) <= 80


def test_models_of_other_tokens_are_refused_before_one_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "LLM", None)
    other = make_checkpoint(tmp_path / "other", "llama")
    shutil.copy(TINY / "tokenizer.json", other)

    with pytest.raises(PromptError, match="so their distributions cannot be compared; give the model"):
        quality.run(LoadOptions(model=other, device="cpu"), TEXT[:300], ["auto"], against=TINY)


def test_a_tokenizer_that_cuts_otherwise_is_refused(tmp_path):
    other = shutil.copytree(TINY, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:200]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))

    with pytest.raises(PromptError, match="makes other tokens of the text than tiny"):
        quality.run(LoadOptions(model=other, device="cpu"), TEXT[:300], ["auto"], against=TINY)
