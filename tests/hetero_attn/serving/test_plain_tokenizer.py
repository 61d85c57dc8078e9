"""The tokenizer without transformers gives what transformers gives, or stands back; and a start does not import it."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hetero_attn.errors import ConfigError
from hetero_attn.serving.text.plain_tokenizer import plain_tokenizer
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.support.models.toy import edit_json

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"
TEXTS = ("", "A list holds numbers.", " héllo\n\n<|end|> x", "日本語 🙂 e\u0301", "\tx  <|user|>12345", "<|new|> y")

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
# (settings beside tokenizer.json, whether tokenizer.json alone decides what they mean)
SETTINGS = {
    "as it is": ({}, True),
    "a token with its flags": ({"eos_token": {"content": "<|end|>", "__type": "AddedToken"} | FLAGS}, True),
    "another flag": ({"eos_token": {"content": "<|end|>", "__type": "AddedToken"} | FLAGS | {"lstrip": True}}, False),
    "a token that is new": ({"sep_token": "<|new|>"}, False),
    "a token of the text": ({"pad_token": "the"}, False),
    "bos added": ({"add_bos_token": True}, False),
    "eos added": ({"add_eos_token": True}, False),
    "a space before": ({"add_prefix_space": True}, False),
    "more tokens": ({"extra_special_tokens": ["<|new|>"]}, False),
    "a family's class": ({"tokenizer_class": "GPT2Tokenizer"}, False),
    "special tokens as text": ({"split_special_tokens": True}, False),
    "a listed token that is new": ({"added_tokens_decoder": {"9999": {"content": "<|new|>"} | FLAGS}}, False),
}


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    return tmp_path


def test_a_folders_name_need_not_be_utf8(folder):
    """The tokenizer's files were to be downloaded again."""
    named = folder / os.fsdecode(b"m\xff\xe9del")
    named.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, named)

    assert plain_tokenizer(named).encode("A list") == plain_tokenizer(TINY).encode("A list")


def assert_alike(ours, theirs):
    """Ids of texts, texts of ids, and what names tokens."""
    for text in TEXTS:
        assert ours.encode(text) == list(theirs.encode(text))
    draw, vocab = random.Random(3), theirs.get_vocab()
    for _ in range(100):
        ids = [draw.randrange(len(vocab)) for _ in range(9)]
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.get_vocab() == vocab
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert str(ours.added_tokens_decoder) == str(theirs.added_tokens_decoder)


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_what_transformers_makes_of_the_files_or_nothing(folder, settings):
    from transformers import AutoTokenizer

    changed, decided = SETTINGS[settings]
    edit_json(folder / "tokenizer_config.json", **changed)
    ours = plain_tokenizer(folder)

    assert (ours is not None) == decided
    if ours is not None:
        assert_alike(ours, AutoTokenizer.from_pretrained(str(folder)))


@pytest.mark.parametrize("file,content", [("added_tokens.json", {}), ("special_tokens_map.json", {"eos_token": "a"})])
def test_older_files_that_may_say_more_are_left_to_transformers(folder, file, content):
    (folder / file).write_text(json.dumps(content))

    assert plain_tokenizer(folder) is None


def test_a_map_that_says_the_same_changes_nothing(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))

    assert plain_tokenizer(folder) is not None


def test_lengths_that_the_file_asks_for_are_not_kept_to(folder):
    """transformers pads and cuts only when it is told to."""
    from transformers import AutoTokenizer

    edit_json(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 20},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    )

    assert_alike(plain_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder)))


@pytest.fixture
def turns_of_another():
    """Counts the turns that another thread gets, which asks for the interpreter all the time: it gets it only where
    somebody lets go of it, as no switch is forced."""
    turns, is_over, interval = [0], threading.Event(), sys.getswitchinterval()

    def take_turns():
        while not is_over.is_set():
            turns[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=take_turns)
    sys.setswitchinterval(600)
    thread.start()
    yield turns
    is_over.set()
    sys.setswitchinterval(interval)
    thread.join()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", ["the cat sat on " * 4000, "日本語 🙂 e\u0301\n\n" * 3000], ids=["words", "signs"])
def test_others_go_on_while_a_long_text_is_read(turns_of_another, text, special):
    """A prompt of 4 MB kept a server's streams and /health waiting for 4 s."""
    tokenizer = plain_tokenizer(TINY)
    before, tries = turns_of_another[0], 0
    while turns_of_another[0] == before and tries < 50:  # where it lets go, a busy machine may still be late
        found, tries = tokenizer.encode(text, add_special_tokens=special), tries + 1

    assert turns_of_another[0] > before
    assert found == tokenizer.backend_tokenizer.encode(text, add_special_tokens=special).ids


def test_neither_an_answer_nor_a_chat_needs_transformers():
    """Its import took a second of every start."""
    code = """
import sys
from hetero_attn.serving.text.tokenizer import Tokenizer
opened = Tokenizer.open(sys.argv[1])
opened.decode(opened.encode("A list"))
before = "transformers" in sys.modules
opened.encode_chat([{"role": "user", "content": "x"}])
print(before, "transformers" in sys.modules)
"""

    done = subprocess.run([sys.executable, "-c", code, str(TINY)], capture_output=True, text=True)

    assert done.stdout.strip() == "False False", done.stderr


def test_a_damaged_file_is_named(folder):
    (folder / "tokenizer.json").write_text("{")

    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        Tokenizer.open(folder)
