"""lm-evaluation-harness gets the same numbers over the server, in process, and from `llm.logits`."""

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)"),
]
CONTEXT = 512
WINDOW = CONTEXT - 1  # the harness leaves room for the one token that its requests generate
TEXT = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "heldout.txt"
CHOICES = [
    {"query": "A list is a mutable", "choices": [" sequence", " number", " of"], "gold": 0},
    {"query": "The with statement is used to", "choices": [" wrap the execution", " the the", "\n\n   *"], "gold": 0},
    {"query": "The file is", "choices": [" opened", " closed", " eaten"], "gold": 0},
]
CHOICE_TASK = """task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
TEXT_TASK = """task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task of choices and one of a whole text, from local files alone."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CHOICES))
    (folder / "text.jsonl").write_text(json.dumps({"page": TEXT.read_text()[:4000]}) + "\n")
    (folder / "choices.yaml").write_text(CHOICE_TASK.format(folder=folder))
    (folder / "text.yaml").write_text(TEXT_TASK.format(folder=folder))
    os.environ["HF_DATASETS_CACHE"], os.environ["HF_HUB_OFFLINE"] = str(folder / "cache"), "1"
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model, arguments: str, tasks, **more) -> tuple[dict, list]:
    """Results by task, and the log-likelihood of every choice."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=["local_choices", "local_text"], task_manager=tasks, bootstrap_iters=0, log_samples=True, **more
    )  # fmt: skip
    samples = sorted(found["samples"]["local_choices"], key=lambda sample: sample["doc_id"])
    return found["results"], [[response[0] for response in sample["filtered_resps"]] for sample in samples]


def own_numbers(llm) -> tuple[list, float]:
    """The same from logits: of every choice, and of the text in windows that begin with the last token of the one before."""
    tokenizer, choices = llm.tokenizer, []

    def score(context: list[int], rest: list[int]) -> float:
        rows = torch.log_softmax(llm.logits(context + rest).double(), dim=1)
        return sum(float(rows[len(context) - 1 + place, token]) for place, token in enumerate(rest))

    for line in CHOICES:
        context = tokenizer.encode(line["query"], add_special_tokens=False)
        whole = [tokenizer.encode(line["query"] + choice, add_special_tokens=False) for choice in line["choices"]]
        choices.append([score(ids[: len(context)], ids[len(context) :]) for ids in whole])
    ids, total = tokenizer.encode(TEXT.read_text()[:4000], add_special_tokens=False), 0.0
    assert len(ids) > 2 * WINDOW
    total = score([tokenizer.bos_token_id], ids[: WINDOW - 1])
    place = WINDOW - 1
    while place < len(ids):
        end = min(place + WINDOW - 1, len(ids))
        begin = max(0, end - WINDOW)
        total += score(ids[begin:place], ids[place:end])
        place = end
    return choices, total


def test_three_ways_give_the_same_numbers(server, tasks):
    import hetero_attn.tools.lm_eval_model  # noqa: F401  it registers the model
    from tests.support.server.http_server import TINY

    # The harness takes a first token whose id is 0 for none, so it is told.
    over_http = (
        f"base_url={server.url}/v1/completions,model=tiny,tokenizer_backend=remote,max_length={CONTEXT},"
        f"num_concurrent=1,custom_prefix_token_id={server.llm.tokenizer.bos_token_id}"
    )
    in_process = f"pretrained={TINY},max_length={WINDOW},num_threads=1"
    results, choices = evaluated("local-completions", over_http, tasks)
    results_own, choices_own = evaluated("hetero_attn", in_process, tasks, device="cpu")
    choices_by_logits, total = own_numbers(server.llm)

    for number, expected in enumerate(choices_by_logits):
        assert choices[number] == pytest.approx(expected, abs=1e-5)
        assert choices_own[number] == pytest.approx(expected, abs=1e-5)
    best = sum(max(range(3), key=scores.__getitem__) == 0 for scores in choices_by_logits) / 3
    assert results["local_choices"]["acc,none"] == results_own["local_choices"]["acc,none"] == pytest.approx(best)
    text = TEXT.read_text()[:4000]
    expected = -total / math.log(2) / len(text.encode())
    for found in (results, results_own):
        assert found["local_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-6)


def test_answers_in_process_end_where_they_are_told_to(server):
    from types import SimpleNamespace

    from hetero_attn.tools.lm_eval_model import HeteroLM
    from tests.support.server.http_server import TINY

    model = HeteroLM(TINY, device="cpu", max_length=CONTEXT, num_threads=1)
    asked = [SimpleNamespace(args=("A list is", {"until": ["a"], "max_gen_toks": 12, "do_sample": False}))]

    (text,) = model.generate_until(asked)
    assert "a" not in text and server.llm.generate(server.llm.tokenizer.encode("A list is", False)) is not None
