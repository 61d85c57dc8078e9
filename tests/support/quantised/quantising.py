"""The shipped model, the logits of a file, and the command line's answer, for tests of `quantize`."""

from pathlib import Path

from typer.testing import CliRunner

from hetero_attn import LLM
from hetero_attn.cli import app

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"


def logits(path, tokens, **options):
    with LLM(path, device="cpu", max_context=64, progress=False, num_threads=2, **options) as llm:
        return llm.logits(tokens)


def run(*arguments):
    """What the command printed, and its exit code."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.stdout, " ".join(done.stderr.split())
