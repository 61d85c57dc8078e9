"""`quantize`: blocks that gguf reads as they were meant, files that read back as the same model, and a choice by bits."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cpu_kernels import CpuKernels
from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn import LLM
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.file import GgufFile
from hetero_attn.checkpoints.gguf.writer import NewTensor, write_gguf
from hetero_attn.checkpoints.sources import open_source
from hetero_attn.cli import app
from hetero_attn.errors import ArgumentError, CheckpointError, UnsupportedModelError
from hetero_attn.serving.text.tokenizer import Tokenizer
from hetero_attn.tools.quantize.blocks import BLOCK_TYPES
from hetero_attn.tools.quantize.choose import RECIPES, Loss, as_large_as, bits_of, by_bits, by_recipe, fitting
from hetero_attn.tools.quantize.encode import encode
from hetero_attn.tools.quantize.expected import expected_losses
from hetero_attn.tools.quantize.header.metadata import copied_metadata
from hetero_attn.tools.quantize.table import kept_table
from hetero_attn.tools.quantize.write import quantize
from tests.support.runtime import nmse
from tests.support.toy import edit_json, make_checkpoint, make_family_checkpoint

TINY = Path(__file__).parents[2] / "examples" / "tiny"
# Relative squared error of normal weights: what gguf's own quantiser has, or llama.cpp's of the types that it lacks.
MOST_ERROR = {
    "Q4_0": 0.0074,
    "Q4_1": 0.0062,
    "Q5_0": 0.00184,
    "Q5_1": 0.00144,
    "Q8_0": 0.000035,
    "Q4_K": 0.0062,
    "Q5_K": 0.0016,
    "Q6_K": 0.0005,
    "IQ4_NL": 0.0062,
    "IQ4_XS": 0.0063,
}


def read_by_gguf(name, rows):
    found = quants.dequantize(encode(name, rows).numpy(), GGMLQuantizationType[name])
    return torch.from_numpy(found.astype(np.float32))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_read_by_gguf_and_fitted_at_least_as_well(name):
    rows = torch.randn(16, 1024, generator=torch.Generator().manual_seed(1))

    assert nmse(read_by_gguf(name, rows), rows) < MOST_ERROR[name]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_of_zeros_of_one_number_and_of_huge_ones_are_finite(name):
    rows = torch.stack((torch.zeros(512), torch.full((512,), -3.0), torch.linspace(-9e5, 9e5, 512), torch.ones(512)))
    found = read_by_gguf(name, rows)

    assert torch.isfinite(found).all()
    assert not found[0].any()
    assert nmse(found[1], rows[1]) < 0.02


def test_values_on_a_grid_come_back_as_they_are():
    generator = torch.Generator().manual_seed(2)
    codes, scale = torch.randint(16, (8, 512), generator=generator), torch.tensor(0.25)
    codes.view(-1, 32)[:, 0], codes.view(-1, 32)[:, 1] = 0, 15
    rows = codes * scale - 2

    assert torch.equal(read_by_gguf("Q4_1", rows), rows)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The shipped checkpoint without the last two of its four layers."""
    path = shutil.copytree(TINY, tmp_path_factory.mktemp("halved") / "tiny")
    edit_json(path / "config.json", num_hidden_layers=2)
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name and ".layers.3." not in name}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def written(halved, tmp_path_factory):
    """That checkpoint in Q8_0."""
    out = tmp_path_factory.mktemp("quantized") / "tiny.gguf"
    quantize(halved, out, "q8", threads=2)
    return out


def logits(path, tokens, **options):
    with LLM(path, device="cpu", max_context=64, progress=False, num_threads=2, **options) as llm:
        return llm.logits(tokens)


def test_a_written_file_is_the_same_model_with_the_same_tokenizer(halved, written):
    text = "The list is 12 apples, they're red.\n\n  And more"
    ours, theirs = (Tokenizer.open(path) for path in (halved, written))
    tokens = ours.encode(text)

    assert theirs.encode(text) == tokens
    assert theirs.chat_template == ours.chat_template
    assert theirs.eos_token_ids == ours.eos_token_ids
    assert nmse(logits(written, tokens, dtype="fp32"), logits(halved, tokens, dtype="fp32")) < 1e-3


def test_gguf_itself_reads_the_file(written):
    reader = gguf.GGUFReader(written)
    with GgufCheckpoint.open(written) as ours:
        names = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert len(names) == len(ours.names)
        assert names["blk.0.attn_q.weight"] == "Q8_0" and names["blk.0.attn_norm.weight"] == "F32"
        for tensor in reader.tensors[:3]:
            assert list(reversed(tensor.shape.tolist())) == list(ours._theirs[tensor.name].shape)


def test_a_gguf_file_is_quantised_again_with_its_metadata(written, tmp_path):
    made = quantize(written, tmp_path / "again.gguf", "q4", threads=2)
    with GgufCheckpoint.open(written) as before, GgufCheckpoint.open(made.path) as after:
        kept = [key for key in before.fields.values if key.startswith("tokenizer.")]
        assert kept and all(
            np.array_equal(before.fields.values[key], after.fields.values[key])
            if isinstance(before.fields.values[key], np.ndarray)
            else before.fields.values[key] == after.fields.values[key]
            for key in kept
        )
        assert before.config == after.config
    assert made.bits < 6


def test_the_alignment_of_the_source_is_not_said_of_the_new_file(written):
    """Tensors are written at multiples of 32 bytes; with 64 in the header readers would look elsewhere."""
    with GgufCheckpoint.open(written) as source:
        source.fields.values = {**source.fields.values, "general.alignment": 64}
        metadata = copied_metadata(source)

    assert "general.alignment" not in metadata and "general.architecture" in metadata


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_family_is_written_as_its_own(tmp_path, family):
    path = make_checkpoint(tmp_path / "model", family, hidden=64, intermediate=128, num_heads=4, num_kv_heads=2)
    quantize(path, tmp_path / "model.gguf", "q8", threads=2)
    tokens = torch.randint(200, (16,), generator=torch.Generator().manual_seed(3)).tolist()

    assert nmse(logits(tmp_path / "model.gguf", tokens, dtype="fp32"), logits(path, tokens, dtype="fp32")) < 1e-2


@pytest.mark.parametrize(("family", "values"), [("olmo2", {}), ("starcoder2", {"sliding_window": 9})])
def test_families_with_norms_of_their_own_are_written_as_their_own(tmp_path, family, values):
    path = make_family_checkpoint(tmp_path / "model", family, hidden_size=64, head_dim=32, **values)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    quantize(path, tmp_path / "model.gguf", "q8", threads=2)
    tokens = list(range(3, 30))

    assert nmse(logits(tmp_path / "model.gguf", tokens, dtype="fp32"), logits(path, tokens, dtype="fp32")) < 1e-2


def test_what_a_file_cannot_say_is_refused_by_name(tmp_path):
    path = make_checkpoint(tmp_path / "windows", "mistral", sliding_window=9)

    with pytest.raises(UnsupportedModelError, match="cannot say this model's sliding_window"):
        quantize(path, tmp_path / "model.gguf", "q8", threads=2)


def test_rope_of_llama3_becomes_divisors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    path = make_checkpoint(tmp_path / "model", "llama", hidden=64, intermediate=128, num_heads=2, num_kv_heads=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling, "rope_parameters": None}))
    quantize(path, tmp_path / "model.gguf", "q8", threads=2)
    tokens = list(range(3, 60))

    assert nmse(logits(tmp_path / "model.gguf", tokens, dtype="fp32"), logits(path, tokens, dtype="fp32")) < 1e-2


def run(*arguments):
    """What the command printed, and its exit code."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.stdout, " ".join(done.stderr.split())


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
    with pytest.raises(UnsupportedModelError, match="the least is 4.50"):
        by_bits({"a": Loss(16, 256, {"Q4_K": 0.1})}, 4.2)


def test_rows_that_are_no_whole_blocks_take_another_type():
    assert [fitting("Q6_K", width) for width in (512, 576, 100)] == ["Q6_K", "Q8_0", "F32"]
    assert [fitting("Q8_0", 100, dtype) for dtype in ("bf16", "fp16", "fp32")] == ["BF16", "F16", "F32"]
    chosen = by_recipe(
        RECIPES["q4_m"], {"model.layers.0.self_attn.v_proj.weight": (64, 576), "model.norm.weight": (9,)}
    )
    assert list(chosen.values()) == ["Q8_0", "F32"]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    taken = tmp_path / "there.gguf"
    taken.write_bytes(b"old")
    tensor = NewTensor("a", GGUF_BY_NAME["F32"], (4,))
    good = lambda _: [np.zeros(16, np.uint8)]  # noqa: E731

    with pytest.raises(CheckpointError, match="there already.*--force"):
        write_gguf(taken, {}, [tensor], good)
    with pytest.raises(CheckpointError, match="no such folder"):
        write_gguf(tmp_path / "none" / "x.gguf", {}, [tensor], good)
    with pytest.raises(CheckpointError, match="8 bytes of data, expected 16"):
        write_gguf(tmp_path / "x.gguf", {}, [tensor], lambda _: [np.zeros(8, np.uint8)])
    with pytest.raises(CheckpointError, match="fewer than 64 bytes"):
        write_gguf(tmp_path / "x.gguf", {}, [NewTensor("a" * 64, GGUF_BY_NAME["F32"], (4,))], good)
    with pytest.raises(ArgumentError, match="recipe is 'q3'; known: q8"):
        quantize(TINY, tmp_path / "x.gguf", "q3")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="bytes are to be written and 10 are free"):
        write_gguf(tmp_path / "x.gguf", {}, [tensor], good)
    assert taken.read_bytes() == b"old" and list(tmp_path.iterdir()) == [taken]


def test_metadata_of_every_kind_is_read_back(tmp_path):
    values = {
        "general.architecture": "x",
        "b": True,
        "i": 7,
        "n": -7,
        "l": 1 << 40,
        "f": 0.5,
        "s": "grüße",
        "t": ["a", "", "ß"],
        "a": np.array([1, -2], np.int32),
        "g": np.array([0.5], np.float32),
        "y": np.array([True, False]),
    }
    out = tmp_path / "x.gguf"
    write_gguf(out, values, [NewTensor("w", GGUF_BY_NAME["F32"], (2, 4))], lambda _: [np.arange(32, dtype=np.uint8)])
    file = GgufFile(out)

    assert {key: list(item) if isinstance(item, np.ndarray) else item for key, item in file.metadata.items()} == {
        key: list(item) if isinstance(item, np.ndarray) else item for key, item in values.items()
    }
    file.close()
    found = gguf.GGUFReader(out)
    assert found.tensors[0].data.tobytes() == bytes(range(32))


def test_room_is_looked_for_before_weights_are_measured(tmp_path, monkeypatch):
    """A model was measured for minutes before its disk was found too small."""
    monkeypatch.setattr("hetero_attn.tools.quantize.write.expected_losses", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))

    for wanted in ({"recipe": "q4"}, {"bits": 4.6}):
        with pytest.raises(CheckpointError, match="bytes are to be written and 10 are free"):
            quantize(TINY, tmp_path / "x.gguf", **wanted)


def test_a_file_that_is_there_is_a_usage_error_and_a_folder_that_is_not_is_made(halved, tmp_path):
    """Both are looked at before the weights."""
    taken = tmp_path / "there.gguf"
    taken.write_bytes(b"old")
    code, _, said = run("quantize", TINY, "--out", taken)

    assert code == 2 and "there already" in said and "--force" in said and taken.read_bytes() == b"old"
    assert run("quantize", TINY, "--out", tmp_path / "none.gguf", "--recipe", "q3")[0] == 2
    assert run("quantize", halved, "--out", tmp_path / "new" / "model.gguf", "--recipe", "q8")[0] == 0
    assert (tmp_path / "new" / "model.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "q4", "--bits", "5"], "exclude each other"),
        (["--bits", "3"], "give 4 to 16"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path, arguments, message):
    code, _, complaint = run("quantize", TINY, "--out", tmp_path / "x.gguf", *arguments)

    assert code == 2
    assert message in complaint


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


def test_numbers_beyond_64_bits_are_named(tmp_path):
    out, tensor = tmp_path / "x.gguf", NewTensor("w", GGUF_BY_NAME["F32"], (2, 4))
    for value in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(CheckpointError, match="answer: .* more than the 64 bits"):
            write_gguf(out, {"answer": value}, [tensor], lambda _: [])
    write_gguf(out, {"answer": -(1 << 40)}, [tensor], lambda _: [np.zeros(32, np.uint8)])
    file = GgufFile(out)
    assert file.metadata["answer"] == -(1 << 40)
    file.close()


def test_odd_rows_keep_the_sources_numbers(tmp_path):
    """100 inputs are no blocks. As float16, what is beyond 65504 became infinite."""
    path = make_checkpoint(tmp_path / "model", "llama", hidden=100, intermediate=128, num_heads=2, num_kv_heads=2)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(path / "model.safetensors")
    tensors[name][0, 0] = 1e6
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    made = quantize(path, tmp_path / "model.gguf", "q4", threads=2)

    with GgufCheckpoint.open(made.path) as source:
        assert source.read(name)[0, 0].item() == tensors[name][0, 0].item()
    assert made.types["model.layers.0.mlp.down_proj.weight"] == "IQ4_NL"


def test_a_calibration_text_brings_a_recipe_nearer_to_the_model(tmp_path):
    """On another text, with the same types."""
    tokens = Tokenizer.open(TINY).encode((TINY / "heldout.txt").read_text()[20000:20600])[:64]
    wanted = torch.log_softmax(logits(TINY, tokens, dtype="fp32"), -1)

    def divergence(name, text):
        made = quantize(TINY, tmp_path / name, "q4", text=text, threads=2)
        found = torch.log_softmax(logits(made.path, tokens, dtype="fp32"), -1)
        return made.types, (wanted.exp() * (wanted - found)).sum(-1).mean().item()

    plain_types, plain = divergence("plain.gguf", "")
    types, calibrated = divergence("calibrated.gguf", (TINY / "heldout.txt").read_text()[:6000])
    assert types == plain_types
    assert calibrated < 0.9 * plain


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "tokenizer.json",
            '{"model": {"type": "Unigram", "vocab": []}}',
            "'Unigram', and only BPE is written; take a GGUF",
        ),
        ("tokenizer.model", "", "not as tokenizer.json.*save_pretrained, or take a GGUF"),
    ],
)
def test_tokenizers_that_are_not_written_are_refused_by_name(tmp_path, file, content, message):
    """A model with nothing but a tokenizer.model became a file without a tokenizer."""
    path = make_checkpoint(tmp_path / "model", "llama", hidden=64, intermediate=128, num_heads=2, num_kv_heads=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink(missing_ok=True)
    (path / file).write_text(content)

    with pytest.raises(UnsupportedModelError, match=message):
        quantize(path, tmp_path / "model.gguf", "q8", threads=2)
    assert not (tmp_path / "model.gguf").exists()


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


def test_codes_that_a_source_has_in_the_type_chosen_are_copied(written, tmp_path):
    made = quantize(written, tmp_path / "again.gguf", "q8", threads=2)
    with GgufCheckpoint.open(written) as before, GgufCheckpoint.open(made.path) as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)
    with_text = quantize(written, tmp_path / "text.gguf", "q8", text="Some words of no matter, twice over.", threads=2)
    with GgufCheckpoint.open(written) as before, GgufCheckpoint.open(with_text.path) as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)


def test_bits_without_a_text_are_kept_to(halved, tmp_path):
    made = quantize(halved, tmp_path / "model.gguf", bits=5.0, threads=2)

    assert 4.8 < made.bits <= 5.0
