"""What was trained to draft for the shipped checkpoint changes no answer of it, and is often right."""

from pathlib import Path

import pytest

from hetero_attn import LLM, SamplingParams
from hetero_attn.speculation.width import Width
from tests.support.models.runtime import THREADS

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
PROMPTS = ["The with statement is used to", "What is json.JSONDecoder?", "A list of names of a module"]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "seeded": SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True, repetition_penalty=1.1),
}
LEAST_RIGHT = {"greedy": 0.2, "seeded": 0.04}  # of drafts in chains of three; by chance 0.0002


def answers(kind, speculate):
    with LLM(
        EXAMPLES / "tiny",
        device="cpu",
        dtype="q8",  # whose rows are bit for bit those of passes of one
        max_context=256,
        max_batch=3,
        num_threads=THREADS,
        progress=False,
        speculate=speculate,
    ) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS[kind])], llm.report().drafts


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("drafter", ["tiny-draft", "tiny-eagle3"])
def test_a_trained_drafter_changes_no_answer_and_is_often_right(monkeypatch, drafter, kind):
    plain, _ = answers(kind, "off")
    monkeypatch.setattr(Width, "choose", lambda self, costs, rows, most: min(most, 4))
    found, drafts = answers(kind, EXAMPLES / drafter)

    assert found == plain
    assert drafts.drafted > 60 and drafts.accepted / drafts.drafted > LEAST_RIGHT[kind], drafts.line()


@pytest.mark.parametrize("drafter", ["tiny-draft", "tiny-eagle3"])
def test_its_files_are_few_small_and_readable(drafter):
    files = list((EXAMPLES / drafter).iterdir())

    assert {"README.md", "config.json", "model.safetensors"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)
