"""The public API: generate, stream, chat, logits; batches, finish reasons, bad prompts, threads, abandoned streams."""

import copy
import pickle
import threading
import time

import pytest
import torch

from hetero_attn import LLM, Policy, SamplingParams
from hetero_attn.errors import HeteroError, MemoryBudgetError, NonFiniteLogitsError, PromptError, SamplingError
from hetero_attn.serving.progress import compile_note, loading_bar
from tests.support.models.runtime import nmse
from tests.support.models.toy import edit_json, hf_logits, make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llm"), "llama", max_position_embeddings=128)


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, dtype="fp32", device="cpu", progress=False) as llm:
        yield llm


def test_a_batch_gives_what_each_prompt_gives_alone(llm):
    prompts = ["one", "a much longer prompt than the others", "x", "yz", "five", "the sixth waits for a slot"]
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]

    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [output.text for output in together] == [output.text for output in alone]


def test_pieces_of_a_stream_join_to_the_whole(llm):
    pieces = list(llm.stream("héllo", GREEDY))
    whole = llm.generate("héllo", GREEDY)[0]

    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].metrics.generated_tokens == 12


def test_logits_equal_transformers(llm, path):
    token_ids = list(range(5, 100))

    assert nmse(llm.logits(token_ids), hf_logits(path, token_ids)) <= 1e-10


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(messages, GREEDY)

    assert output.prompt_token_ids == tuple(llm.tokenizer.encode_chat(messages))
    assert "".join(piece.text for piece in llm.stream_chat(messages, GREEDY)) == output.text


def test_a_stop_token_ends_and_is_not_part_of_the_text(llm):
    free = llm.generate("stop", GREEDY)[0]
    third = free.token_ids[2]
    ended = llm.generate(
        "stop", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[third])
    )[0]
    first = free.token_ids.index(third)

    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.text == llm.tokenizer.decode(free.token_ids[:first])


def test_a_stop_string_ends_before_itself(llm):
    free = llm.generate("stop", GREEDY)[0]
    stop = free.text[3:5]
    ended = llm.generate("stop", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=[stop]))[0]

    assert ended.finish_reason == "stop"
    assert ended.text == free.text[: free.text.index(stop)]


def test_the_context_bounds_max_tokens(llm):
    prompt = list(range(4, 124))
    output = llm.generate(prompt, SamplingParams(temperature=0.0, ignore_eos=True))[0]

    assert output.finish_reason == "length"
    assert len(output.token_ids) == 128 - 120


def test_seeds_repeat_and_differ(path):
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    with LLM(path, dtype="fp32", device="cpu", seed=7, progress=False) as llm:
        first, second = llm.generate(["a", "a"], params)
        fixed = [
            llm.generate("a", SamplingParams(max_tokens=20, ignore_eos=True, seed=3))[0].token_ids for _ in range(2)
        ]
    with LLM(path, dtype="fp32", device="cpu", seed=7, progress=False) as llm:
        again = llm.generate("a", params)[0]

    assert first.token_ids == again.token_ids
    assert first.token_ids != second.token_ids
    assert fixed[0] == fixed[1]


def test_logprobs_are_those_of_the_logits(llm):
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2)
    output = llm.generate("log", params)[0]
    logits = llm.logits([*output.prompt_token_ids, *output.token_ids])[len(output.prompt_token_ids) - 1 : -1]
    expected = torch.log_softmax(logits, -1)

    for entry, row, token_id in zip(output.logprobs, expected, output.token_ids, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert [top[0] for top in entry.top_logprobs] == row.topk(2).indices.tolist()


@pytest.mark.parametrize(
    "prompt,words",
    [
        (list(range(4, 132)), ("128 tokens", "context of this plan holds 128", "max_context")),
        ([5, 307], ("token 307", "position 1", "0..306")),
        ([-1], ("token -1", "0..306")),
        (["word", 3], ("token 3",)),
    ],
    ids=["too-long", "out-of-range", "negative", "mixed"],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm, prompt, words):
    prompts = [prompt] if all(isinstance(item, int) for item in prompt) else [[3, "word"]]
    with pytest.raises(PromptError) as error:
        llm.generate(["fine", *prompts], GREEDY)

    assert all(word in str(error.value) for word in words) or "word" in str(error.value)
    assert llm.generate("still works", GREEDY)[0].finish_reason == "length"


def test_an_empty_prompt_begins_with_the_begin_token(llm):
    assert llm.generate([[]], GREEDY)[0].prompt_token_ids == (1,)


def test_logits_of_no_tokens_are_refused_whatever_texts_begin_with(llm):
    """It was said that the model had no token to begin with, which it has."""
    with pytest.raises(PromptError, match="^the prompt has no tokens; give at least one$"):
        llm.logits([])


def test_an_empty_prompt_without_a_begin_token_is_an_error(tmp_path):
    path = make_checkpoint(tmp_path, "llama", layers=1)
    edit_json(path / "config.json", bos_token_id=None)
    edit_json(path / "generation_config.json", bos_token_id=...)
    with LLM(path, dtype="fp32", device="cpu", progress=False) as llm, pytest.raises(PromptError, match="empty"):
        llm.generate([[]], GREEDY)


def test_two_threads_generate_at_once(llm):
    expected = {prompt: llm.generate(prompt, GREEDY)[0].token_ids for prompt in ("left", "right and longer")}
    actual = {}

    def work(prompt):
        actual[prompt] = llm.generate(prompt, GREEDY)[0].token_ids

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert expected == actual


def test_an_abandoned_stream_gives_its_slot_back(llm):
    free = llm.engine.kv_cache.free_sequences
    stream = llm.stream("abandoned", GREEDY)
    next(stream)
    assert llm.engine.kv_cache.free_sequences == free - 1
    stream.close()

    assert llm.engine.kv_cache.free_sequences == free


def test_generating_inside_a_stream_loop_works(llm):
    inner = [llm.generate("inner", GREEDY)[0].token_ids for _ in zip(llm.stream("outer", GREEDY), range(2))]

    assert inner == [llm.generate("inner", GREEDY)[0].token_ids] * len(inner)


def test_an_interrupted_step_leaves_the_engine_usable(llm, monkeypatch):
    expected = llm.generate("interrupt", GREEDY)[0].token_ids
    original, calls = llm.engine.decode_step, iter(range(100))

    def interrupted(*arguments, **options):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(llm.engine, "decode_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("interrupt", GREEDY)

    assert llm.engine.kv_cache.free_sequences == llm.plan.max_batch
    assert llm.generate("interrupt", GREEDY)[0].token_ids == expected


def test_logits_that_are_not_finite_end_their_request_only(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "run", lambda *arguments, **options: [torch.full((1, 307), float("nan"))])
    with pytest.raises(NonFiniteLogitsError):
        llm.generate("nan", GREEDY)
    monkeypatch.undo()

    assert llm.generate("fine again", GREEDY)[0].finish_reason == "length"


def test_a_budget_too_small_names_the_smallest_that_works(path):
    with pytest.raises(MemoryBudgetError) as error:
        LLM(path, device="emulated", gpu_memory="10KiB", progress=False)
    smallest = int(str(error.value).split("smallest that works is ")[1].split()[0])
    with LLM(path, device="emulated", gpu_memory=smallest, progress=False) as llm:
        assert llm.generate("fits", GREEDY)[0].finish_reason == "length"


def test_emulated_gives_the_tokens_of_the_cpu(path, llm):
    with LLM(path, dtype="fp32", device="emulated", gpu_memory="1200KiB", progress=False) as split:
        assert any(placement.cut(0)[1] for placement in split.plan.linears)
        assert split.generate("same?", GREEDY)[0].token_ids == llm.generate("same?", GREEDY)[0].token_ids


def test_a_plan_fed_back_as_a_policy_gives_the_same_plan(path, tmp_path):
    with LLM(path, device="emulated", gpu_memory="1200KiB", progress=False) as llm:
        (tmp_path / "plan.yaml").write_text(llm.plan.to_yaml())
        with LLM(path, policy=tmp_path / "plan.yaml", device="emulated", progress=False) as again:
            assert again.plan == llm.plan


def test_a_closed_model_says_so(path):
    llm = LLM(path, device="cpu", progress=False)
    llm.close()
    llm.close()
    with pytest.raises(HeteroError, match="closed"):
        llm.generate("late", GREEDY)


def test_a_long_prompt_shows_progress_and_a_short_one_does_not(path, capsys):
    with LLM(path, dtype="fp32", device="cpu", policy=Policy(prefill_chunk=16), progress=True) as llm:
        capsys.readouterr()
        llm.generate("short", GREEDY)
        assert capsys.readouterr().err == ""
        llm.generate(list(range(4, 84)), GREEDY)

    assert "prompt" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_the_report_says_where_the_time_went(path, device):
    with LLM(path, dtype="fp32", device=device, gpu_memory="1200KiB", max_batch=4, progress=False) as llm:
        llm.generate("report", GREEDY)
        report = llm.report()
        prefill, decode = report.to_dict()["prefill"], report.to_dict()["decode"]

        assert (prefill["steps"], prefill["tokens"]) == (1, 7)
        assert (decode["steps"], decode["tokens"]) == (11, 11)
        assert 0 < decode["cpu_lane_s"] <= decode["wall_s"]
        assert (decode["streamed_bytes"] > 0) == (device == "emulated")
        assert "decode" in report.table()
        report.reset()
        assert "decode" not in report.table()


def test_each_prompt_may_have_parameters_of_its_own(llm):
    short = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    outputs = llm.generate(["one", "two"], [GREEDY, short])

    assert [len(output.token_ids) for output in outputs] == [12, 3]
    with pytest.raises(SamplingError, match="params holds 1 for 2 prompts"):
        llm.generate(["one", "two"], [GREEDY])
    with pytest.raises(SamplingError, match="list of one for each prompt"):
        llm.generate(["one", "two"], {"max_tokens": 3})


def test_several_conversations_give_several_answers(llm):
    talks = [[{"role": "user", "content": text}] for text in ("hi", "what is a list?")]
    together = llm.chat(talks, GREEDY)

    assert [output.token_ids for output in together] == [llm.chat(talk, GREEDY).token_ids for talk in talks]
    with pytest.raises(PromptError):
        llm.chat([], GREEDY)


def test_logits_of_a_text_are_those_of_its_tokens(llm):
    assert torch.equal(llm.logits("héllo"), llm.logits(llm.tokenizer.encode("héllo")))


def test_a_template_gets_its_variables(tmp_path):
    path = make_checkpoint(tmp_path)
    edit_json(path / "tokenizer_config.json")
    template = "{% if thinking %}a{% else %}bbb{% endif %}{{ messages[0].content }}"
    (path / "chat_template.jinja").write_text(template)
    with LLM(path, device="cpu", progress=False) as llm:
        talk = [{"role": "user", "content": "hi"}]
        lengths = [
            len(llm.chat(talk, GREEDY, template_variables=variables).prompt_token_ids)
            for variables in (None, {"thinking": True})
        ]

    assert lengths[0] - lengths[1] == 2


def test_metrics_hold_what_the_caller_waited_for(path, monkeypatch):
    """The first call opened the tokenizer for four seconds, and said 0.29 s."""
    with LLM(path, device="cpu", progress=False) as llm:
        encode = llm.tokenizer.encode
        monkeypatch.setattr(llm.tokenizer, "encode", lambda text: (time.sleep(0.2), encode(text))[1])
        started = time.perf_counter()
        stream = llm.stream("hello", SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        metrics = list(stream)[-1].metrics
        waited_s = time.perf_counter() - started

    assert 0.2 <= metrics.prefill_s <= metrics.time_to_first_token_s + 0.05
    assert 0.2 <= metrics.time_to_first_token_s <= waited_s


def test_what_is_not_given_is_as_the_model_suggests(tmp_path):
    path = make_checkpoint(tmp_path)
    suggested = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": "nonsense", "do_sample": True}
    with LLM(path, device="cpu", progress=False) as llm:
        assert (llm.default_params().temperature, llm.default_params().top_p) == (0.7, 0.95)
        edit_json(path / "generation_config.json", **suggested)
        found = llm.default_params(temperature=0.1, max_tokens=5)
        assert (found.temperature, found.top_p, found.top_k, found.min_p, found.max_tokens) == (0.1, 0.9, 20, 0.0, 5)
        edit_json(path / "generation_config.json", do_sample=False)
        assert llm.default_params().greedy


def test_reprs_are_short(llm):
    assert repr(llm) == f"LLM({llm.plan.model!r}, fp32 on cpu, context 128)"
    assert len(repr(llm.plan)) < 120 and "fp32 on cpu" in repr(llm.plan)


@pytest.mark.parametrize("taken", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_loaded_model_says_that_it_cannot_be_copied(llm, taken):
    """It was "attribute lookup c_char_Array_2128 on ctypes failed", after parts of it had been copied."""
    with pytest.raises(TypeError, match=r"loaded model .* cannot be copied or pickled.*load it where it is wanted"):
        taken(llm)


def test_dtypes_of_torch_are_taken(path):
    with LLM(path, dtype=torch.bfloat16, kv_dtype=torch.float32, device="cpu", progress=False) as llm:
        assert (llm.plan.workload.weight_dtype, llm.plan.workload.kv_dtype) == ("bf16", "fp32")


def test_a_pipe_sees_what_is_compiled_and_no_bar(llm, capsys):
    """It saw nothing at all for the 37 s of a first start."""
    compile_note("linear_q8")
    with loading_bar(llm.plan, show=True) as bar:
        bar.update(1)

    assert capsys.readouterr().err == "compiling the CPU kernel linear_q8 for this machine, once\n"
