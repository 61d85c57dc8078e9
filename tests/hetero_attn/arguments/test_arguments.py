"""Every argument of every public call is checked where it enters: the error names argument, value and rule.

| situation (user_reports.md)                                    | now                                                  |
|----------------------------------------------------------------|------------------------------------------------------|
| ids as numpy array, numpy integers, tensor of 1 or 2 dimensions | taken                                               |
| [True, False], [None], None, bytes, floats                     | PromptError                                          |
| params a dict or a list                                        | SamplingError that names it                          |
| max_context=0 and the like, wrong types, impossible numbers    | ConfigError                                          |
| --gpu-memory banana on the CPU, --seed -5                      | refused                                              |
| device=torch.device("cpu")                                     | taken                                                |
| temperature=np.float32(0.5) under -W error                     | taken                                                |
| stop string that is a special token                            | ends the text                                        |
| content a list of text parts; None, numbers, other parts       | joined; PromptError                                  |
| template variables (enable_thinking)                           | template_variables=                                  |
| odd tokenizer, prompts as ids                                  | runs, one warning; text is refused with the way out  |
| odd tokenizer, text on the command line, needs_text=True       | refused before the weights are read                  |
| abort(None), a request of another model                        | ArgumentError; no effect                             |
| text that begins with BOS already                              | two, as the tokenizer of transformers gives          |
| special tokens typed by a user in chat text                    | become special, as in transformers                   |
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hetero_attn import LLM, SamplingParams, plan_model
from hetero_attn.cli import app
from hetero_attn.errors import ArgumentError, ConfigError, HeteroError, PromptError, SamplingError
from hetero_attn.serving.prompts import as_prompts
from placement import PolicyError
from tests.support.models.toy import edit_json
from tests.support.planning.wishes import GREEDY, OPTIONS
from tests.support.processes.command import TINY
from tests.support.suite.names import case_name

ONE_PROMPT = {
    "list": [5, 6, 7],
    "tuple": (5, 6, 7),
    "range": range(5, 8),
    "numpy integers": [np.int64(5), np.int32(6), np.uint8(7)],
    "array": np.array([5, 6, 7]),
    "small array": np.array([5, 6, 7], dtype=np.uint8),
    "tensor": torch.tensor([5, 6, 7]),
    "int32 tensor": torch.tensor([5, 6, 7], dtype=torch.int32),
}


@pytest.mark.parametrize("kind", ONE_PROMPT)
def test_one_prompt_of_ids_is_taken_however_it_is_held(llm, kind):
    expected = llm.generate([5, 6, 7], GREEDY)[0].token_ids

    assert [output.token_ids for output in llm.generate(ONE_PROMPT[kind], GREEDY)] == [expected]
    assert [output.token_ids for output in llm.generate([ONE_PROMPT[kind]], GREEDY)] == [expected]
    assert torch.equal(llm.logits(ONE_PROMPT[kind]), llm.logits([5, 6, 7]))


@pytest.mark.parametrize(
    "several", [np.array([[5, 6], [7, 8]]), torch.tensor([[5, 6], [7, 8]]), ["a", [5, 6]], [(5,), [6]]], ids=str
)
def test_several_prompts_are_taken(llm, several):
    assert len(llm.generate(several, GREEDY)) == len(several)
    assert as_prompts([]) == []


BAD_PROMPTS = [
    None,
    5,
    5.0,
    [None],
    [True, False],
    [5.0],
    {"prompt": "x"},
    b"bytes",
    [[5], None],
    np.array([0.5]),
    torch.zeros(1, 1, 1, dtype=torch.int64),
    np.array(5),
    [np.bool_(True)],
    [[[5]]],
    object(),
    {5, 6},
    [400],
    [-1],
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda value: case_name(value)[:30])
def test_what_is_no_prompt_is_named(llm, prompt):
    for call in (llm.generate, llm.stream, llm.add):
        with pytest.raises(PromptError):
            call(prompt, GREEDY)


@pytest.mark.parametrize("token_ids", [None, [None], [0.5], [True], b"x"], ids=repr)
def test_logits_take_token_ids_alone(llm, token_ids):
    with pytest.raises(PromptError):
        llm.logits(token_ids)


@pytest.mark.parametrize(
    "params", [{"max_tokens": 3}, [GREEDY, GREEDY], "greedy", 0, SamplingParams], ids=lambda v: repr(v)[:20]
)
def test_params_are_one_sampling_params(llm, params):
    with pytest.raises(SamplingError, match="must be one SamplingParams"):
        llm.generate([5], params)


BAD_OPTIONS = [
    *(
        (name, value)
        for name in ("max_context", "max_batch", "num_threads", "kv_tokens", "page_size")
        for value in (0, -1, "128", 2.5, True, 2**70, float("nan"))
    ),
    ("seed", "x"),
    ("seed", -5),
    ("seed", 0.5),
    ("dtype", torch.float64),
    ("dtype", None),
    ("dtype", "bf17"),
    ("kv_dtype", 8),
    ("device", 0),
    ("device", None),
    ("device", "gpu"),
    ("gpu_memory", "banana"),
    ("gpu_memory", -1),
    ("gpu_memory", 1.5),
    ("handover", "xx"),
    ("handover", None),
    ("elastic", 1),
    ("overlap", "no"),
    ("prefix_cache", None),
    ("progress", "yes"),
    ("model", None),
    ("model", 3),
    ("policy", 3),
    ("policy", None),
    ("hardware", 3),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=lambda value: repr(value)[:20])
def test_a_bad_option_is_named_whatever_else_is_wished(path, name, value):
    """0 counted as not given, and the rest ended as ZeroDivisionError, TypeError or AttributeError, or not at all."""
    given = {"model": path, "device": "cpu", "progress": False} | {name: value}
    with pytest.raises(HeteroError, match=name) as caught:
        LLM(**given)
    assert isinstance(caught.value, ValueError)
    if name not in ("seed", "handover", "elastic", "overlap", "prefix_cache", "progress", "kv_tokens"):
        with pytest.raises(HeteroError, match=name):
            plan_model(**{key: item for key, item in given.items() if key != "progress"})


def test_plain_equivalents_of_options_are_taken(path):
    plan = plan_model(path, device=torch.device("cpu"), max_context=np.int64(64), num_threads=np.int32(1))

    assert (plan.device, plan.max_context, plan.num_threads) == ("cpu", 64, 1)
    assert plan_model(path, device="emulated", gpu_memory=np.int64(8 << 20)).gpu_memory_bytes == 8 << 20


@pytest.mark.parametrize(
    "options", [["--gpu-memory", "banana"], ["--seed", "-5"], ["--context", "0"], ["--threads", "0"]], ids=str
)
def test_options_are_refused_on_the_command_line(path, options):
    result = CliRunner().invoke(app, ["generate", str(path), "-p", "x", "--device", "cpu", *options])

    assert result.exit_code in (2, 3) and result.stderr.startswith("error: ")


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numpy_floats_make_no_warning(name, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        assert getattr(SamplingParams(**{name: kind(0.5)}), name) == 0.5


@pytest.mark.parametrize("value", [10**400, float("inf"), np.float32("nan")], ids=lambda value: repr(value)[:20])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(SamplingError, match="temperature"):
        SamplingParams(temperature=value)


def test_a_special_token_as_stop_string_ends_the_text(path, llm):
    """Its text is left out of the answer, so the string alone never matched, and nobody said so."""
    ids = llm.generate([5], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))[0].token_ids
    biased = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, "logit_bias": {3: 100.0}}
    assert len(ids) == 1 and llm.generate([5], SamplingParams(**biased))[0].finish_reason == "length"

    (output,) = llm.generate([5], SamplingParams(stop="<|end|>", **biased))

    assert (output.finish_reason, output.token_ids, output.text) == ("stop", (3,), "")


@pytest.mark.parametrize("thing", [None, 3, "x", [], object()], ids=lambda thing: type(thing).__name__)
def test_what_is_no_request_cannot_be_aborted(llm, thing):
    """It became a note that every later step, and close, failed at: the model was lost."""
    with pytest.raises(ArgumentError, match="one that `add` returned"):
        llm.abort(thing)

    assert len(llm.generate([5, 6], GREEDY)[0].token_ids) == GREEDY.max_tokens


def test_a_request_of_another_model_is_left_alone(llm, path):
    request = llm.add([5, 6], GREEDY)
    with LLM(path, progress=False, **OPTIONS) as other:
        other.abort(request)
        other.step()
    while llm.step():
        pass

    assert request.finish_reason == "length"


BAD_CALLS = {
    "resize None": lambda llm: llm.resize(None),
    "resize text": lambda llm: llm.resize("much"),
    "resize list": lambda llm: llm.resize([1]),
    "context None": lambda llm: llm.check_context(None),
    "context text": lambda llm: llm.check_context("5"),
    "context nan": lambda llm: llm.check_context(float("nan")),
    "reserve negative": lambda llm: llm.check_context(1, -2),
    "meta tensor": lambda llm: llm.generate(torch.zeros(2, dtype=torch.int64, device="meta")),
    "sparse tensor": lambda llm: llm.logits(torch.tensor([3]).to_sparse()),
    "tool calls": lambda llm: llm.chat([{"role": "user", "content": None, "tool_calls": np.array([1, 2])}]),
    "hardware": lambda llm: plan_model(TINY, hardware="rtx9090"),
    "gpu_memory": lambda llm: plan_model(TINY, device="emulated", gpu_memory=10**400),
    "policy": lambda llm: plan_model(TINY, device="cpu", policy="x" * 5000),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_other_odd_arguments_are_named(llm, call):
    """TypeError, OverflowError, OSError, NotImplementedError and a bare ValueError came out, or nothing at all."""
    with pytest.raises((ArgumentError, PromptError, PolicyError)):
        BAD_CALLS[call](llm)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no device that never ends")
def test_a_prompt_that_never_ends_is_refused():
    """It took memory until there was none."""
    result = CliRunner().invoke(app, ["generate", TINY, "-f", "/dev/zero", "--device", "cpu"])

    assert result.exit_code == 2 and "characters" in result.stderr


def test_config_names_are_left_as_they_were(path):
    """The checks look at types alone: what a model cannot do is still said by what knows the model."""
    with pytest.raises(ConfigError, match="was made for 512 positions"):
        plan_model(path, max_context=513, device="cpu")
    edit_json(path / "generation_config.json", temperature=0.5)
