"""The trained mixture of experts, whose routes are no noise: its perplexity is transformers', whatever holds its experts,
and expert slots serve what the trace says."""

import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hetero_attn import LLM, Policy
from hetero_attn.cli import app
from hetero_attn.planning import kept
from hetero_attn.planning.heats import keep_heat
from hetero_attn.tools.forced_runs import forced
from hetero_attn.tools.routes import heat
from hetero_attn.tools.routes.watch import Routes, watched
from placement.plan.heat import by_gain
from tests.support.planning.slot_table import simulate

EXAMPLES = Path(__file__).parents[3] / "examples"
MODEL, TEXT = EXAMPLES / "tiny-moe", (EXAMPLES / "tiny" / "heldout.txt").read_text("utf-8")
WINDOW, WINDOWS = 256, 2
STEPS, PROFILED = 60, slice(4000, 4500)  # tokens that go through decode one by one, and those of a profile
EXPERTS, LAYERS, SLOTS, INSERTS = 32, 4, 10, 2


def slot_policy(*slots: int, inserts: int = INSERTS) -> Policy:
    """All experts in DRAM, so many slots for those of each layer in turn (the last number for all that follow)."""
    counts = [slots[min(layer, len(slots) - 1)] for layer in range(LAYERS)]
    rules = [{"match": f"layers.{n}.experts", "gpu": 0, "expert_slots": count} for n, count in enumerate(counts)]
    return Policy.model_validate({"inserts": inserts, "rules": rules})


def loaded(dtype: str, policy: Policy | None = None) -> LLM:
    """The model on the CPU, or with a policy on the three lanes of an emulated GPU of 8 MiB."""
    options = {"dtype": dtype, "max_context": 512, "max_batch": 1, "num_threads": 1, "progress": False}
    if policy is None:
        return LLM(MODEL, device="cpu", **options)
    return LLM(MODEL, device="emulated", gpu_memory="8MiB", policy=policy, **options)


@cache
def token_ids() -> list[int]:
    with loaded("q8") as llm:
        return llm.tokenizer.encode(TEXT)


def perplexity_of(logits_of) -> float:
    """Over the first windows of the held-out text; logits_of: of a window's tokens, float32 [tokens, vocab_size]."""
    total = 0.0
    for start in range(0, WINDOWS * WINDOW, WINDOW):
        window = torch.tensor(token_ids()[start : start + WINDOW])
        total += torch.nn.functional.cross_entropy(logits_of(window.tolist())[:-1], window[1:]).item()
    return math.exp(total / WINDOWS)


@cache
def of_transformers() -> float:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        return perplexity_of(lambda window: model(torch.tensor([window]), use_cache=False).logits[0])


LIMITS = {"fp32": 1e-5, "bf16": 0.002, "q8": 0.005, "q4": 0.05}
OFTEN = {("fp32", None), ("bf16", SLOTS), ("q8", None), ("q4", SLOTS)}  # every dtype, and both kinds of plan
PLANS = [
    pytest.param(dtype, slots, id=f"{dtype}-{kind}", marks=() if (dtype, slots) in OFTEN else pytest.mark.matrix)
    for dtype in LIMITS
    for slots, kind in ((None, "cpu"), (SLOTS, "lanes"))
]


@pytest.mark.parametrize("dtype,slots", PLANS)
def test_perplexity_is_that_of_transformers(dtype, slots):
    """Of the same weights in float32: what the dtype rounds is all there is between them."""
    with loaded(dtype, None if slots is None else slot_policy(slots)) as llm:
        assert perplexity_of(llm.logits) == pytest.approx(of_transformers(), rel=LIMITS[dtype])


def stepped(llm: LLM, tokens: list[int]) -> torch.Tensor:
    """Logits of tokens that go through decode one by one, but for the first."""
    llm.report().reset()
    return forced(llm.engine, tokens, len(tokens) - 1)


def test_no_slots_change_a_bit():
    with loaded("q4", slot_policy(0)) as without, loaded("q4", slot_policy(SLOTS)) as slotted:
        expected, actual = (stepped(llm, token_ids()[: STEPS // 2]) for llm in (without, slotted))
        counts = slotted.report().experts

    assert torch.equal(actual, expected) and counts.hits > 0 and counts.inserts > 0


@pytest.mark.parametrize(
    "slots,inserts", [*(pytest.param(*few, marks=pytest.mark.matrix) for few in ((6, 1), (10, 2))), (16, 4)]
)
def test_hits_on_text_are_those_of_a_simulated_table(slots, inserts):
    """Within one point, and far more than as many of 32 experts would serve of routes that are noise."""
    routes = Routes()
    with loaded("q8", slot_policy(slots, inserts=inserts)) as llm:
        with watched(llm.engine, routes):
            stepped(llm, token_ids()[:STEPS])
        counts = llm.report().experts
    chosen = [torch.cat(ids).tolist() for ids in routes.ids]
    expected = sum(simulate(steps, slots, inserts, range(EXPERTS))[0] for steps in chosen) / counts.picks

    assert counts.picks == sum(len(row) for steps in chosen for row in steps)
    assert counts.hit_rate == pytest.approx(expected, abs=0.01)
    assert counts.hit_rate > slots / EXPERTS + 0.05


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("q8", marks=pytest.mark.matrix)])
def test_experts_that_stay_serve_more_by_a_profile_of_other_text(dtype, monkeypatch, tmp_path):
    """As many slots, those of a layer by equal gain and the most popular experts first. Those in bf16 stay; by
    recency layers as alike as these gain nothing, and lose no more than the noise of two texts."""
    monkeypatch.setattr(kept, "cache_home", lambda: tmp_path)
    with loaded(dtype, slot_policy(SLOTS)) as llm:
        stepped(llm, token_ids()[:STEPS])
        uniform = llm.report().experts.hit_rate
    with loaded(dtype) as llm:
        layers = heat.run(llm, token_ids()[PROFILED]).layers
    keep_heat(MODEL, {layer.name: layer.heat for layer in layers})
    curves = [layer.heat.recent if dtype == "q8" else layer.heat.fixed for layer in layers]
    with loaded(dtype, slot_policy(*by_gain(curves, LAYERS * SLOTS))) as llm:
        stepped(llm, token_ids()[:STEPS])
        warm = llm.report().experts.hit_rate

    assert warm >= uniform + (0.05 if dtype == "bf16" else -0.03)


def test_verify_passes_and_tells_how_routes_agree(tmp_path):
    policy, text = tmp_path / "slots.yaml", tmp_path / "text.txt"
    policy.write_text(slot_policy(SLOTS).to_yaml())
    text.write_text(TEXT[:400])
    options = [
        "--device",
        "emulated",
        "--gpu-memory",
        "8MiB",
        "--dtype",
        "q8",
        "--context",
        "512",
        "--policy",
        str(policy),
    ]
    run = CliRunner().invoke(app, ["verify", str(MODEL), "--file", str(text), *options], catch_exceptions=False)
    found = re.search(r"experts: ([0-9.]+)% of the picks alike; nearest choice ([0-9.e-]+)", run.stdout)

    assert run.exit_code == 0, run.output
    assert found and float(found[1]) > 97 and 0 < float(found[2]) < 0.1
    assert "NOT COMPUTED" not in run.stdout
