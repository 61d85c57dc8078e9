"""Which type each tensor is written in: by bits, by a recipe, with a text and without."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels import CpuKernels
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.sources import open_source
from hetero_attn.errors import ArgumentError, CheckpointError
from hetero_attn.serving.text.tokenizer import Tokenizer
from hetero_attn.tools.quantize.choose import RECIPES, Loss, as_large_as, bits_of, by_bits, by_recipe, fitting
from hetero_attn.tools.quantize.encode import encode
from hetero_attn.tools.quantize.expected import expected_losses
from hetero_attn.tools.quantize.table import kept_table
from hetero_attn.tools.quantize.write import quantize
from tests.support.models.toy import make_checkpoint
from tests.support.quantised.quantising import TINY, logits, run


def test_by_bits_every_linear_is_measured_and_the_file_keeps_the_table(halved, tmp_path):
    calibration = tmp_path / "text.txt"
    calibration.write_text((TINY / "heldout.txt").read_text()[:600])
    out = tmp_path / "model.gguf"
    wishes = ("--out", out, "--bits", 6, "--calibrate", calibration, "-t", 2, "--json")

    code, printed, _ = run("quantize", halved, *wishes)
    found = json.loads(printed)

    assert code == 0
    assert 5 < found["bits"] <= 6 and found["bytes"] == out.stat().st_size
    with GgufCheckpoint.open(out) as source:
        for name, entry in found["tensors"].items():
            assert source._entry(name).type.name == entry["type"]
            assert entry["type"] in entry["kl"]
    lines = kept_table(out)
    assert lines[0].startswith("quantised to 6 bits: ") and any("KL if all: IQ4_" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert "quantised to 6 bits: " in run("plan", out, "--device", "cpu", "--no-explain")[1]


def test_the_choice_is_the_best_of_all_choices():
    """Against every combination of three linears."""
    kinds = ("Q4_K", "Q6_K", "Q8_0")
    losses = {
        "a": Loss(64, 256, dict(zip(kinds, (0.5, 0.1, 0.01), strict=True))),
        "b": Loss(128, 256, dict(zip(kinds, (0.2, 0.15, 0.01), strict=True))),
        "c": Loss(32, 512, dict(zip(kinds, (0.9, 0.02, 0.01), strict=True))),
    }
    combinations = [(x, y, z) for x in kinds for y in kinds for z in kinds]
    for bits in (4.6, 5.5, 6.0, 7.1, 8.5):
        allowed = [
            sum(loss.kl[kind] for loss, kind in zip(losses.values(), chosen, strict=True))
            for chosen in combinations
            if sum(loss.nbytes(kind) for loss, kind in zip(losses.values(), chosen, strict=True)) * 8 <= bits * 65536
        ]
        chosen = by_bits(losses, bits)
        assert sum(losses[name].kl[kind] for name, kind in chosen.items()) == pytest.approx(min(allowed), rel=2e-3)


def test_fewer_bits_than_any_choice_has_are_refused():
    with pytest.raises(ArgumentError, match="the least is 4.50"):
        by_bits({"a": Loss(16, 256, {"Q4_K": 0.1})}, 4.2)


def test_rows_that_are_no_whole_blocks_take_another_type():
    assert [fitting("Q6_K", width) for width in (512, 576, 100)] == ["Q6_K", "Q8_0", "F32"]
    assert [fitting("Q8_0", 100, dtype) for dtype in ("bf16", "fp16", "fp32")] == ["BF16", "F16", "F32"]
    chosen = by_recipe(
        RECIPES["q4_m"], {"model.layers.0.self_attn.v_proj.weight": (64, 576), "model.norm.weight": (9,)}
    )
    assert list(chosen.values()) == ["Q8_0", "F32"]


def test_a_solver_that_finds_nothing_in_its_time_is_replaced_by_exchanges(monkeypatch):
    """It was an assertion that failed. 60 linears, so that no time at all is not enough."""
    generator = torch.Generator().manual_seed(9)
    kinds = {"IQ4_NL": 1.0, "Q5_0": 0.3, "Q8_0": 0.01, "F16": 0.0}
    losses = {
        f"w{index}": Loss(64, 256, {kind: share * factor for kind, share in kinds.items()})
        for index, factor in enumerate(torch.rand(60, generator=generator).tolist())
    }
    best = by_bits(losses, 6.0)
    monkeypatch.setattr("hetero_attn.tools.quantize.choose.MOST_SECONDS", 0.0)
    found = by_bits(losses, 6.0)

    def total(chosen):
        return sum(losses[name].kl[kind] for name, kind in chosen.items())

    assert sum(losses[name].nbytes(kind) for name, kind in found.items()) * 8 <= 6.0 * 60 * 64 * 256
    assert total(best) * (1 - 1e-3) <= total(found) <= 1.05 * total(best)


@pytest.mark.matrix
def test_a_calibration_text_brings_a_recipe_nearer_to_the_model(halved, tmp_path):
    """On another text, with the same types."""
    tokens = Tokenizer.open(TINY).encode((TINY / "heldout.txt").read_text()[20000:20600])[:64]
    wanted = torch.log_softmax(logits(halved, tokens, dtype="fp32"), -1)

    def divergence(name, text):
        made = quantize(halved, tmp_path / name, "q4", text=text, threads=2)
        found = torch.log_softmax(logits(made.path, tokens, dtype="fp32"), -1)
        return made.types, (wanted.exp() * (wanted - found)).sum(-1).mean().item()

    plain_types, plain = divergence("plain.gguf", "")
    types, calibrated = divergence("calibrated.gguf", (TINY / "heldout.txt").read_text()[:6000])
    assert types == plain_types
    assert calibrated < 0.9 * plain


def on_a_grid(path, scale):
    """The checkpoint with every matrix of its layers on a grid of Q4_1."""
    tensors, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(11)
    for name, values in tensors.items():
        if values.dim() == 2 and ".layers." in name:
            codes = torch.randint(16, values.shape, generator=generator)
            codes.view(-1, 32)[:, 0], codes.view(-1, 32)[:, 1] = 0, 15
            tensors[name] = (codes - 7.5) * scale
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_recipe_finds_the_types_that_weights_are_on_a_grid_of(tmp_path):
    """Without a text: all of q4_m lost precision in 4.5 bits, and nothing in as many bytes."""
    sizes = {"hidden": 64, "intermediate": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    path = make_checkpoint(tmp_path / "model", "llama", **sizes)
    on_a_grid(path, 0.03125)
    made = quantize(path, tmp_path / "model.gguf", "q4_m", threads=2)

    assert {kind for name, kind in made.types.items() if "_proj." in name} == {"Q4_1"}
    with GgufCheckpoint.open(made.path) as source:
        shapes = {name: source.shape(name) for name in source.names}
    assert made.bits <= bits_of(by_recipe(RECIPES["q4_m"], shapes), shapes)


def test_a_recipe_is_no_larger_and_nearer_than_its_types_by_part():
    """The shipped checkpoint's weights are on no grid. The sums are in the unit of `expected`."""
    ops = CpuKernels(2)
    with open_source(TINY) as source:
        shapes = {name: source.shape(name) for name in source.names}
        found = expected_losses(source, shapes, 4, 32, {}, ops)
        assert set(found) == {name for name, shape in shapes.items() if len(shape) == 2}
        for recipe in ("q4", "q4_m", "q6"):
            fixed = by_recipe(RECIPES[recipe], shapes)
            chosen = fixed | as_large_as(fixed, found, shapes)
            # A type that a smaller one beats has no loss of its own: it is at least the least of all.
            lost = [
                sum(loss.kl.get(types[name], min(loss.kl.values())) for name, loss in found.items())
                for types in (chosen, fixed)
            ]
            assert bits_of(chosen, shapes) <= bits_of(fixed, shapes) + 1e-9
            assert lost[0] < 0.9 * lost[1]


def test_bits_without_a_text_are_kept_to(halved, tmp_path):
    made = quantize(halved, tmp_path / "model.gguf", bits=5.0, threads=2)

    assert 4.8 < made.bits <= 5.0


def test_bfloat16_stays_where_there_are_bits_for_it(tmp_path):
    """F16 took its place, of which a weight of 1e5 that no sample held was infinite: no file that could be loaded."""
    path = make_checkpoint(tmp_path / "plain", dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][33, 5], tensors[name][34, 6] = 1e5, 3e-8
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    made = quantize(path, tmp_path / "model.gguf", bits=16.0, threads=2)

    assert made.types[name] == "BF16"
    with GgufCheckpoint.open(made.path) as source:
        assert torch.equal(source.read(name), tensors[name])


def test_what_float16_cannot_hold_is_refused():
    rows = torch.zeros(4, 32)
    rows[2, 3] = -1e5

    with pytest.raises(CheckpointError, match="a weight of 100000 is beyond F16, which ends at 65504"):
        encode("F16", rows)
    assert encode("BF16", rows).shape == (4, 64)


@pytest.mark.parametrize(("wish", "said"), [("--calibrate", "holds no text"), ("--bits", "fewer than any choice")])
def test_wishes_that_say_nothing_are_usage_errors(halved, tmp_path, wish, said):
    """A file was written as if no text had been asked for; too few bits were a fault of the checkpoint."""
    (tmp_path / "empty.txt").write_text(" \n")
    value = 4 if wish == "--bits" else tmp_path / "empty.txt"
    code, _, printed = run("quantize", halved, "--out", tmp_path / "model.gguf", wish, value)

    assert code == 2 and said in printed and not (tmp_path / "model.gguf").exists()
