"""Headers and metadata of model files, changed at random: an error of ours or a model, in bounded time and memory.

A share runs with the suite; `make test-all` runs a hundred thousand.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.writer import NewTensor, write_gguf
from tests.support.models.gguf_models import make_gguf
from tests.support.models.moe import moe_gguf
from tests.support.models.toy import make_checkpoint, make_family_checkpoint
from tests.support.processes import mutations
from tests.support.processes.mutations import KINDS, KNOWN_WORK_S, MOST_SECONDS
from tests.support.quantised.int4_models import gptq, gptq_config, make_int4
from tests.support.quantised.scaled_models import fp8_blocks, make_scaled

SHARES = (40, pytest.param(120, marks=pytest.mark.matrix))  # of each kind
PIECES = 12
PIECE = 8400  # PIECES times this is a hundred thousand
MOST_BYTES = 64 << 20
SMALL = {"layers": 1, "hidden": 64, "intermediate": 64, "num_heads": 1, "num_kv_heads": 1}


def with_sentencepiece(source: Path, target: Path) -> None:
    """The same GGUF file with a vocabulary of scores."""
    with GgufCheckpoint.open(source) as opened:
        values = {key: value for key, value in opened.fields.values.items() if "tokenizer" not in key}
        tensors = [NewTensor(name, entry.type, entry.shape) for name, entry in opened._theirs.items()]
        rows, count = opened._theirs, opened._theirs["token_embd.weight"].shape[0]
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"][:count]
        values |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
            "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * (len(tokens) - 3), np.int32),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.chat_template": "{{ messages[0].content }}",
        }

        def data(tensor):
            found = rows[tensor.name]
            buffer = bytearray(found.nbytes)
            found.file.read_into(memoryview(buffer), found.offset)
            yield np.frombuffer(buffer, np.uint8)

        write_gguf(target, values, tensors, data)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models by kind of mutation."""
    folder, made = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("made")
    for kind in KINDS:
        (folder / kind).mkdir()
    for name in ("llama", "spm", "moe"):
        (folder / "gguf" / name).mkdir()
    gguf_file, _ = make_gguf(made, {}, "Q8_0", **SMALL)
    gguf_file.rename(folder / "gguf" / "llama" / "model.gguf")
    with_sentencepiece(folder / "gguf" / "llama" / "model.gguf", folder / "gguf" / "spm" / "model.gguf")
    moe_gguf(made / "moe", "qwen3_moe")[0].rename(folder / "gguf" / "moe" / "model.gguf")
    for kind in ("safetensors", "config"):
        make_checkpoint(folder / kind / "sharded", layers=1, sharded=True)
        make_family_checkpoint(folder / kind / "phi3", "phi3", num_hidden_layers=1, head_dim=12)
        make_family_checkpoint(folder / kind / "gemma3", "gemma3_text", num_hidden_layers=1, sliding_window=9)
        make_int4(made / kind, gptq, gptq_config(64), 64)
        (made / kind / "int4").rename(folder / kind / "gptq")
        make_scaled(
            made / f"{kind}-fp8", {"": fp8_blocks(128, 128)}, {"quant_method": "fp8", "weight_block_size": [128, 128]}
        )
        (made / f"{kind}-fp8" / "scaled").rename(folder / kind / "fp8")
    return folder


def check(folder: Path, kind: str, seed: int, count: int) -> None:
    command = [sys.executable, "-m", "tests.support.processes.mutations", str(folder), kind, str(seed), str(count)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["sound"] + sum(found["refused"].values()) == count
    assert sum(found["refused"].values()) > count // 5 and found["sound"] > 0
    assert found["slowest_s"] < MOST_SECONDS, run.stderr
    assert found["grown_bytes"] < MOST_BYTES + found["largest"]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_mutations_ends_in_our_errors_or_in_a_model(models, kind, share):
    check(models, kind, 0, share)


@pytest.mark.parametrize(
    ("known_work_s", "opening_s", "expected_s"),
    [(KNOWN_WORK_S, 1.5, 1.5), (10 * KNOWN_WORK_S, 15.0, 1.5), (10 * KNOWN_WORK_S, 5.0, 0.5), (0.001, 1.5, 1.5)],
    ids=["here", "slow machine, hang", "slow machine", "fast machine, hang"],
)
def test_a_slow_machine_is_excused_and_a_hang_is_not(monkeypatch, known_work_s, opening_s, expected_s):
    clock = [0.0]

    def takes(seconds):
        return lambda *path: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr(mutations, "time", SimpleNamespace(thread_time=lambda: clock[0]))
    monkeypatch.setattr(mutations, "known_work", takes(known_work_s))
    monkeypatch.setattr(mutations, "open_whole", takes(opening_s))

    assert mutations.machine_seconds(Path()) == pytest.approx(expected_s)


@pytest.mark.mutations
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("piece", range(PIECES))
def test_mutations_end_in_our_errors_or_in_a_model(models, piece):
    check(models, KINDS[piece % len(KINDS)], 1 + piece, PIECE)
