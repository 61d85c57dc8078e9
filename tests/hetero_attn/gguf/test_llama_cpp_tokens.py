"""Token ids of GGUF vocabularies equal llama.cpp's: SmolLM2 (byte-level BPE) and Gemma 3 (SentencePiece).

Always over the texts and small vocabularies that are kept with what llama.cpp gave; over whole models, and texts drawn
anew, where llama.cpp is installed and GGUF files are named:

    LLAMA_PYTHON=PYTHON_WITH_LLAMA_CPP GGUF_FILES=a.gguf:b.gguf pytest -rs tests/hetero_attn/gguf/test_llama_cpp_tokens.py
"""

import json
import os
from pathlib import Path

import pytest

from hetero_attn.checkpoints.gguf.tokenizer import gguf_tokenizer
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.support.processes.llama_cpp_tokens import KEPT, TEXTS, fields_of, ids_of_llama_cpp, mixed_lines

LINES = 2000
FOUND = json.loads(KEPT.read_text())


def ours(kept, tmp_path) -> list[list[int]]:
    """The ids of all texts, as the whole vocabulary counts them."""
    backend = gguf_tokenizer(fields_of(kept, tmp_path / "model.gguf")).backend
    return [[kept["ids"][index] for index in backend.encode(text).ids] for text in FOUND["texts"]]


@pytest.mark.parametrize("model", FOUND["models"])
def test_ids_are_llama_cpps(tmp_path, model):
    found = FOUND["models"][model]

    for text, actual, expected in zip(FOUND["texts"], ours(found["vocabulary"], tmp_path), found["ids"], strict=True):
        assert actual == expected, text
    assert sum(map(len, found["ids"])) > 1500


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_another_way_to_split_shows(tmp_path, split):
    """So the test above can fail: the texts tell the known ways to split apart."""
    kept = FOUND["models"]["smollm2.Q4_K_M"]

    assert ours(kept["vocabulary"] | {"pre": split}, tmp_path) != kept["ids"]


def test_a_space_in_front_shows(tmp_path):
    kept = FOUND["models"]["gemma3.Q4_K_M"]

    assert ours(kept["vocabulary"] | {"add_space_prefix": True}, tmp_path) != kept["ids"]


def test_ids_of_whole_models_are_llama_cpps():
    python, files = os.environ.get("LLAMA_PYTHON"), os.environ.get("GGUF_FILES")
    if not python or not files:
        pytest.skip("LLAMA_PYTHON names no interpreter with llama_cpp, or GGUF_FILES no models to compare on")
    texts = [*TEXTS, *mixed_lines(LINES, seed=2)]
    for file in map(Path, files.split(os.pathsep)):
        tokenizer = Tokenizer.open(file)
        different = [
            (text, actual, expected)
            for text, expected in zip(texts, ids_of_llama_cpp(python, file, texts), strict=True)
            if (actual := tokenizer.encode(text)) != expected
        ]

        assert not different, (file.name, len(different), different[0])
