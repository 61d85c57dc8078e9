"""An EAGLE-3 head computes what its published architecture says, wherever its rows come from, and fits its model or is
refused. That it changes no answer is in test_draft_model.py."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn import LLM, Policy, SamplingParams
from hetero_attn.errors import CheckpointError, UnsupportedModelError
from hetero_attn.planning.draft import settle_drafted
from hetero_attn.planning.options import LoadOptions
from hetero_attn.serving.eagle.drafter import EagleDrafter
from hetero_attn.speculation.speculator import Asked
from hetero_attn.speculation.width import Width
from tests.support.models.eagle import WRAPPED, SlowHead, make_head
from tests.support.models.runtime import THREADS
from tests.support.models.toy import edit_json, hf_model, make_checkpoint

PAGE, COUNT = 4, 5
PROMPT = [4 + (7 * place) % 300 for place in range(21)]
PARAMS = SamplingParams(temperature=0.9, seed=5, ignore_eos=True)
LAYERS = "eagle_aux_hidden_state_layer_ids"
HEADS = {
    "plain": {},
    "residual": {"norm_before_residual": True, "eagle_config": {LAYERS: [0, 1]}},
    "one_norm": {"norm_before_fc": True, "norm_output": True, "architecture": WRAPPED, LAYERS: [1, 2, 0]},
    "norms": {"eagle_config": {"fc_norm": True}, "architecture": "Eagle3LlamaForCausalLM"},
    "lent": {"owns_embedding": False, "draft_vocab": 307, "architecture": "Eagle3DraftModel"},
    "narrow": {"hidden": 48, "target_hidden_size": 72, "architecture": "LlamaForCausalLM"},
}
TAPS = {"residual": (1, 2), "one_norm": (1, 2, 0)}
SHAPES = {"cpu": {"device": "cpu"}, "lanes": {"device": "emulated", "gpu_memory": "900KiB"}}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("eagle") / "large", "qwen3", max_position_embeddings=64)


@pytest.fixture
def no_drafts(monkeypatch):
    monkeypatch.setattr(Width, "choose", lambda self, costs, rows, most: 1)


def load(large, head, shape="cpu", **options):
    options = {"max_batch": 3, "policy": Policy(prefill_chunk=16), "dtype": "fp32"} | SHAPES[shape] | options
    return LLM(large, page_size=PAGE, num_threads=THREADS, progress=False, speculate=head, **options)


def hidden_states(large, text, taps=(2, 1, 0)):
    """What transformers has before the tapped layers, for all but the last token."""
    with torch.inference_mode():
        seen = hf_model(large)(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    return torch.cat([seen[tap][0] for tap in taps], 1)


def embedding(large):
    return load_file(large / "model.safetensors")["model.embed_tokens.weight"]


def drafted(llm, requests, count=COUNT):
    """What the head drafts behind each request's text, and the logits of every draft of each."""
    model, seen = llm._scheduler.speculator._model, [[] for _ in requests]
    run = model.engine.run

    def watched(work, copy):
        found = run(work, copy)
        for place, logits in enumerate(found):
            if len(logits):  # else what had waited is taken in
                seen[place].append(logits[-1].clone())
        return found

    model.engine.run = watched
    try:
        asked = [Asked(each.speculation.drafter, each.prompt_token_ids, each.token_ids, count) for each in requests]
        return model.draft(asked), seen
    finally:
        model.engine.run = run


def expect_the_slow_heads_drafts(llm, large, head, requests, name="plain"):
    found, logits = drafted(llm, requests)
    for request, tokens, seen in zip(requests, found, logits, strict=True):
        text, slow = [*request.prompt_token_ids, *request.token_ids], SlowHead(head, embedding(large))
        expected, wanted = slow.chain(text, hidden_states(large, text, TAPS.get(name, (2, 1, 0))), COUNT)
        for mine, its in zip(seen, wanted, strict=True):
            torch.testing.assert_close(mine, its, atol=2e-4, rtol=1e-4)
        assert tokens == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, "cpu") for name in HEADS), ("plain", "lanes"), ("one_norm", "lanes"), ("lent", "lanes")],
)
def test_drafts_are_those_of_the_published_head(large, tmp_path, no_drafts, name, shape):
    """Behind a prompt of two chunks, behind recorded steps, and once more behind drafts that came to nothing."""
    head = make_head(tmp_path / "head", **HEADS[name])
    with load(large, head, shape) as llm:
        request = llm.add(PROMPT, PARAMS)
        for steps in (2, 1, 12):
            for _ in range(steps):
                llm.step()
            expect_the_slow_heads_drafts(llm, large, head, [request], name)
        expect_the_slow_heads_drafts(llm, large, head, [request], name)


def test_a_known_beginning_is_known_to_the_head(large, tmp_path, no_drafts):
    """Whole pages, a text that ends like a page, and what goes on after a drafter that had no place."""
    head = make_head(tmp_path / "head")
    with load(large, head) as llm:
        llm.generate([PROMPT], PARAMS)
        for shared in (20, 18, 16):
            request = llm.add([*PROMPT[:shared], 9, 8, 7, 6, 5], PARAMS)
            llm.step()
            llm.step()
            assert request.reused >= shared // PAGE * PAGE - PAGE
            expect_the_slow_heads_drafts(llm, large, head, [request])
            llm.abort(request)
            llm.step()


def test_requests_share_passes_and_get_the_drafts_of_each_alone(large, tmp_path, no_drafts):
    head = make_head(tmp_path / "head")
    with load(large, head) as llm:
        requests = [llm.add(prompt, PARAMS) for prompt in (PROMPT, PROMPT[:7], PROMPT[3:15])]
        for _ in range(4):
            llm.step()
        expect_the_slow_heads_drafts(llm, large, head, requests)


def test_a_text_longer_than_the_heads_context_goes_on_without_its_beginning(large, tmp_path, no_drafts):
    head = make_head(tmp_path / "head", max_position_embeddings=32)
    with load(large, head) as llm:
        request = llm.add([*PROMPT, *PROMPT], PARAMS)
        for _ in range(12):
            llm.step()
        text = [*request.prompt_token_ids, *request.token_ids]
        (found,), _ = drafted(llm, [request])
        base = request.speculation.drafter._base
        slow, states = SlowHead(head), hidden_states(large, text)

        assert 0 < base < len(text) - COUNT
        assert found == slow.chain(text[base:], states[base:], COUNT)[0]


def shifted(prompt_ids, generated_ids, start, stop):
    return [*prompt_ids, *generated_ids][max(0, start - 1) : stop - 1]


def of_another_place(self, prompt_ids, generated_ids, position, taken, follow=EagleDrafter.follow):
    follow(self, prompt_ids, generated_ids, position, taken.roll(1, 0))


PLANTED = {
    "hidden states of another place": ("eagle.drafter.EagleDrafter.follow", of_another_place),
    "numbers of the head's own vocabulary": ("drafting.read_token_ids", lambda path, config: list(range(307))),
    "rows of drafts are left": (
        "eagle.drafter.EagleDrafter._holds",
        lambda self, rows: self._cache.extend(self.sequence, rows),
    ),
    "the token itself": ("eagle.drafter.between", shifted),
}


@pytest.mark.parametrize("planted", [*PLANTED, "another layer"])
def test_planted_faults_are_caught(large, tmp_path, no_drafts, monkeypatch, planted):
    if planted in PLANTED:
        name, fault = PLANTED[planted]
        monkeypatch.setattr(f"hetero_attn.serving.{name}", fault)
    head = make_head(tmp_path / "head", **({LAYERS: [1, 1, 0]} if planted == "another layer" else {}))
    with load(large, head) as llm:
        request = llm.add(PROMPT, PARAMS)
        with pytest.raises((AssertionError, IndexError, ValueError)):
            for steps in (2, 3):
                for _ in range(steps):
                    llm.step()
                expect_the_slow_heads_drafts(llm, large, head, [request])


def refused(large, head, match, error=UnsupportedModelError):
    with pytest.raises(error, match=match):
        load(large, head)


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ({"vocab": 311}, "vocabularies have 311 and 307 tokens"),
        ({"target_hidden": 48}, "reads hidden states of 48 numbers, and the model's have 72"),
        ({"hidden": 48, "owns_embedding": False, "target_hidden_size": 72}, "no embedding of its own"),
        ({LAYERS: [0, 1, 7]}, "reads before layer 7, and the model has 3"),
        (
            {"architecture": "Eagle3DeepseekV2ForCausalLM"},
            "'Eagle3DeepseekV2ForCausalLM' is a head that drafts in a way",
        ),
        ({"architecture": WRAPPED, "eagle_config": {"use_aux_hidden_state": False}}, "without hidden states"),
    ],
)
def test_a_head_of_another_model_is_refused_by_name(large, tmp_path, made, match):
    refused(large, make_head(tmp_path / "head", **made), match)


def test_a_head_that_is_damaged_or_of_another_kind_is_refused(large, tmp_path):
    head = make_head(tmp_path / "head")
    tensors = load_file(head / "model.safetensors")

    save_file({name: tensor for name, tensor in tensors.items() if name != "d2t"}, head / "model.safetensors")
    refused(large, head, "no tensor d2t", CheckpointError)
    save_file(tensors | {"d2t": tensors["d2t"] + 200}, head / "model.safetensors")
    refused(large, head, "d2t names token", CheckpointError)
    edit_json(head / "config.json", num_hidden_layers=2)
    refused(large, head, "only heads of one layer")
    edit_json(head / "config.json", num_hidden_layers=1, model_type="gpt_oss")
    refused(large, head, "only that of llama")


def test_a_head_is_no_model(large, tmp_path):
    head = make_head(tmp_path / "head")
    with pytest.raises(UnsupportedModelError, match="is a head that drafts for a larger model.*speculate="):
        LLM(head, device="cpu", progress=False)


def test_the_head_and_what_the_model_keeps_for_it_are_in_the_budget(large, tmp_path):
    """To the byte: what both devices have taken is what both plans say, and no more than was given."""
    head = make_head(tmp_path / "head")
    asked = LoadOptions(
        model=large, device="emulated", page_size=PAGE, max_batch=2, speculate=head, num_threads=THREADS
    )
    plain, found = (settle_drafted(each).planned.plan.workload for each in (replace(asked, speculate="ngram"), asked))

    assert found.activation_bytes_per_row - plain.activation_bytes_per_row == 4 * 3 * 72  # float32, three layers
    with load(large, head, "lanes") as llm:
        own = llm._scheduler.speculator._model.engine
        taken = [engine.lanes.device.arena.total_bytes for engine in (llm.engine, own)]
        assert taken[1] == own.plan.memory.gpu_bytes == llm.plan.memory.gpu["drafter"]
        assert sum(taken) == llm.plan.memory.gpu_bytes <= llm.plan.gpu_memory_bytes == 900 << 10
