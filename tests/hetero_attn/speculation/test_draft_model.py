"""A model that drafts for another changes no answer, shares its budget to the byte and leaves nothing behind."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from hetero_attn import LLM, Policy, SamplingParams
from hetero_attn.errors import ArgumentError, MemoryBudgetError, UnsupportedModelError
from hetero_attn.planning.draft import WIDTHS, settle_drafted
from hetero_attn.planning.guesses import GUESSES, MODEL_GUESSES, keep_guesses
from hetero_attn.planning.kept import kept_path
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import ask, settle
from hetero_attn.serving.draft_model import ModelDrafter
from hetero_attn.speculation.speculator import Asked
from hetero_attn.speculation.width import Width
from hetero_attn.tools.drafts.report import found_guesses
from placement.drafted.drafters import drafters
from placement.plan.drafting import Drafting, Guesses, expected_tokens
from placement.plan.units import parse_bytes
from placement.solve.make_plan import plan_requested
from placement.solve.refusals import BudgetError
from tests.support.models.eagle import make_head
from tests.support.models.runtime import THREADS
from tests.support.models.schedules import Failing, scheduled, steps_through_failures
from tests.support.models.toy import make_checkpoint
from tests.support.processes.command import run
from tests.support.suite.few_examples import drawn

CONTEXT, PAGE = 64, 4
SHAPES = {"cpu": {"device": "cpu"}, "lanes": {"device": "emulated", "gpu_memory": "900KiB"}}
PROMPTS = [[4 + (7 * place + 31 * seed) % 300 for place in range(length)] for seed, length in enumerate((5, 21, 12))]
PROMPTS.append(PROMPTS[1][:18] + [9, 8])
# Greedy answers go on to the end of the context.
PARAMS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 5, "top_p": 0.9, "max_tokens": 24},
    "penalties": {"temperature": 0.8, "seed": 7, "repetition_penalty": 1.3, "presence_penalty": 0.4, "max_tokens": 24},
    "stops": {"temperature": 1.0, "seed": 3, "stop": ["e", "a b"], "stop_token_ids": [17, 200], "ignore_eos": False},
    "grammar": {"temperature": 0.9, "seed": 4, "regex": "[a-f ]{3,30}", "ignore_eos": False},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The large model, a twin of it, a smaller one that guesses badly, and such an EAGLE-3 head; all of one
    vocabulary."""
    folder, shape = tmp_path_factory.mktemp("drafts"), {"max_position_embeddings": CONTEXT}
    large = make_checkpoint(folder / "large", "qwen3", num_heads=8, num_kv_heads=4, **shape)
    small = make_checkpoint(folder / "small", "llama", layers=1, num_heads=2, hidden=48, seed=3, **shape)
    windowed = make_checkpoint(folder / "windowed", "qwen3", layers=2, sliding_window=7, seed=4, **shape)
    return {"large": large, "small": small, "windowed": windowed, "head": make_head(folder / "head")}


def load(paths, drafter, shape="cpu", **options):
    options = {"max_batch": 4, "policy": Policy(prefill_chunk=16), "dtype": "fp32"} | SHAPES[shape] | options
    wish = "off" if drafter is None else paths[drafter]
    return LLM(paths["large"], page_size=PAGE, num_threads=THREADS, progress=False, speculate=wish, **options)


def params(kind, **more):
    return SamplingParams(**{"ignore_eos": True} | PARAMS[kind] | more)


@pytest.fixture(scope="module")
def plain(paths):
    with load(paths, None) as llm:
        return {kind: [llm.generate([prompt], params(kind))[0] for prompt in PROMPTS] for kind in PARAMS}


@pytest.fixture
def any_width(monkeypatch):
    """Widths that follow no rule."""
    draw = random.Random(1)
    monkeypatch.setattr(Width, "choose", lambda self, costs, rows, most: min(most, draw.choice([1, 2, 3, 5, 8])))


def draft_engine(llm):
    return llm._scheduler.speculator._model.engine


@pytest.mark.parametrize(
    ("drafter", "shape"),
    [
        ("large", "cpu"),
        ("small", "lanes"),
        pytest.param("windowed", "cpu", marks=pytest.mark.matrix),
        pytest.param("head", "cpu", marks=pytest.mark.matrix),
        ("head", "lanes"),
    ],
)
def test_a_draft_model_changes_no_answer(paths, plain, any_width, drafter, shape):
    with load(paths, drafter, shape) as llm:
        for kind in PARAMS if shape == "cpu" else ("seeded",):
            outputs = [llm.generate([prompt], params(kind))[0] for prompt in PROMPTS]
            outputs += llm.generate(PROMPTS, params(kind))
            assert [output.token_ids for output in outputs] == 2 * [output.token_ids for output in plain[kind]]
        drafts, own = llm.report().drafts, draft_engine(llm)

        assert drafts.drafted > 0
        assert own.kv_cache.free_sequences == own.plan.max_batch
        if drafter == "large":  # the twin is right whenever the large model is greedy
            llm.report().reset()
            llm.generate(PROMPTS, params("greedy"))
            assert llm.report().drafts.accepted == llm.report().drafts.drafted


@pytest.mark.parametrize("drafter", ["large", "head"])
@drawn(
    few=2,
    many=8,
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([None, 5])), max_size=7),
    seed=st.integers(0, 99),
)
def test_no_schedule_with_a_draft_model_changes_an_answer(paths, plain, drafter, arrivals, seed):
    """Arrivals at any step, growth and put-backs in a cache that is too small for all."""
    draw = random.Random(seed)
    with pytest.MonkeyPatch.context() as monkeypatch, load(paths, drafter, kv_tokens=CONTEXT) as llm:
        monkeypatch.setattr(Width, "choose", lambda self, costs, rows, most: min(most, draw.choice([1, 2, 5, 8])))
        requests = scheduled(
            llm, [(PROMPTS[which], steps, params("greedy", max_tokens=most)) for which, steps, most in arrivals]
        )
        for (which, _, _), request in zip(arrivals, requests, strict=True):
            assert tuple(request.token_ids) == plain["greedy"][which].token_ids[: request.max_tokens]
        assert draft_engine(llm).kv_cache.free_sequences == llm.plan.max_batch


@pytest.mark.parametrize("drafter", ["large", "head"])
def test_a_draft_that_fails_leaves_the_answer_as_it_was(paths, plain, any_width, drafter):
    with load(paths, drafter) as llm:
        own = draft_engine(llm)
        failing = Failing(7, 4)
        own.run, own.fused, own.prefill = failing(own.run), failing(own.fused), failing(own.prefill)
        requests = [llm.add(prompt, params("greedy")) for prompt in PROMPTS]
        failures = steps_through_failures(llm, requests)

        assert failures > 10
        assert [request.output().token_ids for request in requests] == [each.token_ids for each in plain["greedy"]]
        assert own.kv_cache.free_sequences == own.plan.max_batch


def drafted(model, counts, together):
    """What is drafted behind each prompt, so many tokens, and what behind those and one more; caches begin empty."""
    model.engine.kv_cache.forget_prefixes()
    drafters, found = [model.drafter() for _ in PROMPTS], []
    for added in ([], [7]):
        asked = [Asked(*each, added, count) for *each, count in zip(drafters, PROMPTS, counts, strict=True)]
        found.append(model.draft(asked) if together else [model.draft([each])[0] for each in asked])
    for drafter in drafters:
        drafter.close()
    return found


def test_requests_share_passes_and_get_the_drafts_of_each_alone(paths, monkeypatch):
    with load(paths, "small") as llm:
        model, runs, counts = llm._scheduler.speculator._model, [], (3, 1, 5, 2)
        alone, run = drafted(model, counts, together=False), model.engine.run
        monkeypatch.setattr(model.engine, "run", lambda work, copy: runs.append(len(work)) or run(work, copy))

        assert drafted(model, counts, together=True) == alone
        assert runs == 2 * [4, 3, 2, 1, 1]
        assert [list(map(len, each)) for each in alone] == [list(counts)] * 2


@pytest.mark.parametrize("planted", ["rows", "places"])
def test_planted_faults_of_shared_passes_are_caught(paths, monkeypatch, planted):
    """Logits that go to another request, and guesses that are not taken back."""
    with load(paths, "small") as llm:
        model, counts = llm._scheduler.speculator._model, (3, 4, 5, 2)
        alone, run = drafted(model, counts, together=False), model.engine.run
        if planted == "rows":
            monkeypatch.setattr(model.engine, "run", lambda work, copy: run(work, copy)[::-1])
        else:
            monkeypatch.setattr(ModelDrafter, "_agreeing", lambda self, text: len(self._held))

        try:
            found = drafted(model, counts, together=True)
        except Exception as error:  # a fault may also be heard
            found = error
        assert found != alone


def test_threads_are_shared_and_all_is_closed(paths):
    llm = load(paths, "small", "lanes")
    own = draft_engine(llm)
    assert own.lanes.host_ops is llm.engine.lanes.host_ops
    llm.close()

    with pytest.raises(RuntimeError):
        own.lanes.host_ops.silu_mul(torch.zeros(1, 32), torch.zeros(1, 16))


def wishes(paths, **options):
    fixed = {"page_size": PAGE, "num_threads": THREADS, "max_batch": 1, "speculate": paths["small"]}
    return LoadOptions(model=paths["large"], **fixed, **options)


@pytest.mark.parametrize("gpu_memory", ["600KiB", "2MiB"])
def test_both_plans_keep_to_one_budget(paths, gpu_memory):
    asked = wishes(paths, device="emulated", gpu_memory=gpu_memory)
    drafted = settle_drafted(asked)
    plan, own = drafted.plans

    assert plan.gpu_memory_bytes == parse_bytes(gpu_memory) >= plan.memory.gpu_bytes
    assert plan.memory.gpu["drafter"] == own.gpu_memory_bytes == own.memory.gpu_bytes
    assert own.memory.pinned_bytes == plan.memory.pinned.get("drafter", 0)
    assert own.memory.host_bytes == plan.memory.host["drafter"]


@pytest.mark.matrix
def test_no_split_of_the_budget_by_hand_is_faster(paths):
    """The model planned for passes of every number of rows, in what each way to hold the drafter leaves of the
    budget."""
    asked, budget = wishes(paths, device="emulated", gpu_memory="1MiB"), 1 << 20
    found = settle_drafted(asked)
    own = ask(replace(asked, model=paths["small"], speculate="off", max_context=CONTEXT)).request
    asked = replace(asked, policy=Policy(prefill_chunk=found.planned.plan.prefill_chunk))
    by_hand = []
    for place in drafters(own):
        for rows in WIDTHS:
            request = ask(replace(asked, gpu_memory=budget - place.gpu_bytes)).request
            drafting = Drafting(rows, MODEL_GUESSES, place.step_s, place.prompt_row_s)
            try:
                plan = plan_requested(replace(request, workload=replace(request.workload, drafting=drafting)))
            except BudgetError:
                continue
            by_hand.append(plan.predicted.objective_s)

    assert by_hand and found.planned.plan.predicted.objective_s <= 1.001 * min(by_hand)


def test_a_budget_for_one_is_refused_by_name(paths):
    with pytest.raises(MemoryBudgetError) as error:
        settle(wishes(paths, device="emulated", gpu_memory=1000))
    least = int(str(error.value).split("smallest that works is ")[1].split()[0])
    with pytest.raises(MemoryBudgetError, match=r"beside the draft model .*raise gpu_memory"):
        settle_drafted(wishes(paths, device="emulated", gpu_memory=least))


def test_another_vocabulary_is_refused(paths, tmp_path):
    other = make_checkpoint(tmp_path / "other", "llama", layers=1, vocab=311)
    for file in other.glob("token*"):
        file.unlink()

    with pytest.raises(UnsupportedModelError, match=r"vocabularies have 311 and 307 tokens"):
        LLM(paths["large"], device="cpu", speculate=other, num_threads=THREADS, progress=False)


def test_other_tokens_are_refused(paths, tmp_path):
    other = make_checkpoint(tmp_path / "other", "llama", layers=1)
    file = other / "tokenizer.json"
    described = json.loads(file.read_text())
    vocab = described["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[40:42]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(described))

    with pytest.raises(UnsupportedModelError, match=r"token \d+ is .* give a model of the same vocabulary"):
        LLM(paths["large"], device="cpu", speculate=other, num_threads=THREADS, progress=False)


def test_a_name_that_is_neither_a_way_nor_a_model_is_refused(paths):
    with pytest.raises(ArgumentError, match="did you mean 'ngram'"):
        LLM(paths["large"], device="cpu", speculate="n-gram", num_threads=THREADS, progress=False)


@pytest.mark.parametrize("wish", ["ngram", "small"])
def test_plan_says_what_drafts_would_bring(paths, wish):
    drafts = str(paths.get(wish, wish))
    arguments = ["plan", str(paths["large"]), "--hardware", "rtx4090-ddr5", "--no-explain", "--speculate", drafts]
    shown, told = run(*arguments), run(*arguments, "--json")

    assert shown.exit_code == told.exit_code == 0, shown.stderr + told.stderr
    assert "tokens a pass" in shown.stdout and "(assumed)" in shown.stdout
    assert "without drafts, with a plan of its own" in shown.stdout
    found = json.loads(told.stdout)["speculation"]
    share, plain_s = found["drafted_share"], found["widths"][0]["pass_s"]
    assert (share < 1) == (wish == "ngram") and not found["is_measured"]
    for width in found["widths"]:
        tokens = expected_tokens(found["acceptance"], width["rows"])
        mean_s = share * (width["pass_s"] + width["drafts_s"]) + (1 - share) * plain_s
        assert width["tokens"] == tokens
        assert width["tokens_per_s"] == pytest.approx(
            Guesses(found["acceptance"], share).tokens(width["rows"]) / mean_s
        )
        assert (width["drafts_s"] > 0) == (wish == "small" and width["rows"] > 1)


@pytest.mark.parametrize("wish", ["ngram", "small"])
def test_what_a_benchmark_found_is_what_plans_count_on(paths, tmp_path, monkeypatch, wish):
    """Kept by who drafts; what is damaged counts for nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    drafter = str(paths.get(wish, wish))
    rows = [
        SimpleNamespace(drafts=name, accepted=right, wrong=10, passes={1: 30, 4: made})
        for name, right, made in (("plain", 0, 0), (drafter, 60, 10), (drafter, 30, 20), ("oracle:0.9", 90, 50))
    ]
    keep_guesses(paths["large"], found_guesses(rows))
    found = settle_drafted(replace(wishes(paths, device="cpu"), speculate=drafter))

    assert found.rates.guesses == Guesses(90 / 110, 1 - 60 / 90, is_measured=True)
    assert "(measured)" in "\n".join(found.lines())
    kept_path(GUESSES, paths["large"]).write_text(json.dumps({"ngram": {"acceptance": 7.0, "share": 1.0}}))
    assert not settle_drafted(replace(wishes(paths, device="cpu"), speculate="ngram")).rates.guesses.is_measured


def test_a_drafter_of_a_shorter_context_is_warned_of_and_said_to_have_made_none(paths, tmp_path):
    sizes = {"layers": 1, "num_heads": 2, "hidden": 48, "seed": 3, "max_position_embeddings": 32}
    short = make_checkpoint(tmp_path / "short", "llama", **sizes)
    with pytest.warns(UserWarning, match="short drafts for the first 32 tokens of a text.*large is 64"):
        llm = load(paths | {"short": short}, "short")
    with llm:
        (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=1, temperature=0.0))

    assert output.metrics.drafts_reason.startswith("no drafts: the answer has no token behind its first")
