"""How warm experts stay: one pass over a trace beside a simulation of every number of slots, slow and obvious."""

import json
import random
from collections import OrderedDict
from itertools import product

import pytest
import torch
import typer
from typer.testing import CliRunner

from hetero_attn import plan_model
from hetero_attn.cli import app
from hetero_attn.planning import kept
from hetero_attn.tools.routes.heat import LayerHeat, hit_curve, stack_distances
from placement.plan.heat import by_gain
from tests.support.models.moe import make_moe, moe_gguf
from tests.support.models.toy import edit_json, make_checkpoint, save_tokenizer

EXPERTS, PER_ROW = 128, 8


@pytest.fixture(autouse=True)
def kept_elsewhere(monkeypatch, tmp_path_factory):
    """What the command keeps for plans is not put among the user's own."""
    monkeypatch.setattr(kept, "cache_home", lambda: tmp_path_factory.getbasetemp() / "kept")


def trace(rows: int, seed: int = 0, per_row: int = PER_ROW) -> torch.Tensor:
    """Choices with the reuse that Qwen3-30B was seen to have: 45 % of the picks at the next token, 80 % within eight."""
    draw, recent, found = random.Random(seed), [], []
    for _ in range(rows):
        row: set[int] = set()
        while len(row) < per_row:
            kind = draw.random()
            pool = recent[-1] if kind < 0.36 and recent else set().union(*recent[-8:]) if kind < 0.75 else None
            row.add(draw.choice(sorted(pool)) if pool else draw.randrange(EXPERTS))
        recent.append(row)
        found.append(sorted(row))
    return torch.tensor(found)


def simulated(ids: torch.Tensor, slots: int) -> float:
    """The share of picks that a table of so many slots holds, the longest unused one given up first."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in ids.tolist():
        hits += sum(expert in held for expert in row)
        for expert in row:
            held.pop(expert, None)
            held[expert] = None
        while len(held) > slots:
            held.popitem(last=False)
    return hits / ids.numel()


def test_one_pass_gives_the_hits_of_every_number_of_slots():
    ids = trace(300)
    curve = hit_curve(stack_distances(ids), EXPERTS)

    assert curve == pytest.approx([simulated(ids, slots) for slots in range(EXPERTS + 1)])
    assert curve[0] == 0 and curve[PER_ROW - 1] < curve[2 * PER_ROW] < curve[EXPERTS]


def test_the_drawn_trace_has_the_reuse_that_was_published():
    heat = LayerHeat.of("layers.0.experts", trace(600), EXPERTS)

    assert heat.next_token == pytest.approx(0.45, abs=0.06)
    assert heat.soon == pytest.approx(0.80, abs=0.06)
    assert heat.hits[48] > 0.75 > 48 / EXPERTS  # 38 % of the experts


def test_planted_orders_give_other_hits():
    """First in, first out instead of by recency; and the stack turned over."""
    ids = trace(300)
    right = stack_distances(ids)
    turned = [None if each is None else EXPERTS - 1 - each for each in right]

    assert max(abs(a - b) for a, b in zip(hit_curve(right, EXPERTS), hit_curve(turned, EXPERTS), strict=True)) > 0.05


def test_what_is_chosen_together_is_looked_up_together():
    """Expert 2 lies below two others when it is chosen again, whatever is chosen beside it."""
    ids = torch.tensor([[1, 2], [3, 4], [2, 3]])

    assert stack_distances(ids) == [None, None, None, None, 2, 1]


@pytest.mark.parametrize("total", range(0, 13))
def test_slots_go_where_they_gain_most(total):
    """Concave curves: no other division of the slots serves more."""
    curves = [[0.0, 0.4, 0.6, 0.7, 0.75], [0.0, 0.3, 0.55, 0.75, 0.9], [0.0, 0.1, 0.15, 0.17, 0.18]]
    slots = by_gain(curves, total)
    served = sum(curve[count] for curve, count in zip(curves, slots, strict=True))
    best = max(
        sum(curve[count] for curve, count in zip(curves, counts, strict=True))
        for counts in product(range(5), repeat=3)
        if sum(counts) <= total
    )

    assert sum(slots) <= total
    assert served == pytest.approx(best)


def test_fewer_slots_than_hold_anything_are_given_to_nobody():
    """A curve that is flat until four slots: three in either layer would be wasted."""
    late = [0.0, 0.0, 0.0, 0.0, 0.8, 0.9]

    assert by_gain([late, late], 6) == [5, 0]
    assert by_gain([late, late], 3) == [0, 0]


def test_the_command_follows_a_text(tmp_path):
    path, text = make_moe(tmp_path / "moe", "qwen3_moe", layers=2), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 4)
    asked = ["profile", "--routes", str(path), "--file", str(text)]
    shown, found = (CliRunner().invoke(app, [*asked, *more], catch_exceptions=False) for more in ([], ["--json"]))
    layers = json.loads(found.stdout)["layers"]

    assert shown.exit_code == found.exit_code == 0, shown.output
    assert [layer["name"] for layer in layers] == ["layers.0.experts", "layers.1.experts"]
    assert all(len(layer["hits"]) == 13 and layer["hits"][12] > 0.5 for layer in layers)
    assert "slots kept by recency" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    plan = plan_model(path, device="emulated", dtype="q8", gpu_memory="64MiB", max_context=64)
    assert [shard.heat.recent for shard in plan.workload.linears if shard.picks] == [
        tuple(each["hits"]) for each in layers
    ]


def test_a_model_without_experts_and_a_missing_text_are_told(tmp_path):
    path, text = make_checkpoint(tmp_path / "dense", layers=1), tmp_path / "text.txt"
    text.write_text("some words")
    dense = CliRunner().invoke(app, ["profile", "--routes", str(path), "--file", str(text)])
    missing = CliRunner().invoke(app, ["profile", "--routes", str(path)])

    assert dense.exit_code != 0 and "has no experts" in (dense.output + str(dense.exception))
    assert missing.exit_code == 2


def test_a_file_and_a_tokenizer_are_taken(tmp_path):
    """One of two GGUF files of a folder, read by a tokenizer that begins no text with a token of its own."""
    source, _ = moe_gguf(tmp_path, "qwen3_moe")
    folder, text = tmp_path / "files", tmp_path / "text.txt"
    text.write_text("some words")
    folder.mkdir()
    for name in ("a-Q8_0.gguf", "b-Q8_0.gguf"):
        (folder / name).write_bytes(source.read_bytes())
    save_tokenizer(tmp_path / "tokenizer")
    edit_json(tmp_path / "tokenizer" / "tokenizer.json", post_processor=None)
    asked = ["profile", "--routes", str(folder), "--file", str(text), "--json"]

    either = CliRunner().invoke(app, asked)
    own, other = (
        json.loads(CliRunner().invoke(app, [*asked, "--gguf", "b-", *more], catch_exceptions=False).stdout)
        for more in ([], ["--tokenizer", str(tmp_path / "tokenizer")])
    )

    assert either.exit_code == 3 and "a-Q8_0.gguf, b-Q8_0.gguf" in either.stderr
    assert (own["tokens"], other["tokens"]) == (11, 10)


def test_every_command_of_a_model_takes_its_file_and_its_tokenizer():
    commands = {"profile": "routes"} | dict.fromkeys(
        ("generate", "chat", "plan", "bench", "verify", "serve", "quantize"), "model"
    )
    for name, command in typer.main.get_command(app).commands.items():
        names = {parameter.name for parameter in command.params}
        if commands.get(name, "model") in names:
            assert {"gguf", "tokenizer"} <= names, name
            commands.pop(name)

    assert not commands
