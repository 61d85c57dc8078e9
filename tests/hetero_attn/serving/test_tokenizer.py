"""Tokenizer, streamed text and stop strings: the pieces joined are the whole text, and no piece is half of anything."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.checkpoints import transformers_import
from hetero_attn.errors import ConfigError, PromptError
from hetero_attn.serving.text.files import has_tokenizer
from hetero_attn.serving.text.text_stream import REPLACEMENT, StopMatcher, TextStream
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.support.models.toy import edit_json, save_tokenizer

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"
TEXT = "Grüße, Jürgen 😀! 日本語 e\u0301 👩\u200d👩\u200d👧 naïve café"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer.open(tokenizer_dir, vocab_size=307)


@pytest.fixture(scope="module")
def byte_fallback():
    """Decoding function and vocabulary of a Llama 2 style tokenizer: words with a leading mark, and single bytes."""
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import decoders, models

    words = ["▁Hello", "▁wor", "ld", "é", "▁", "!"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=None))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["</s>"])
    return raw.decode, raw.get_vocab()


def pieces_of(stream, token_ids):
    """What the stream shows after each token, then at the end; nothing comes after a stop."""
    pieces = []
    for token_id in token_ids:
        piece, stopped = stream.push(token_id)
        pieces.append(piece)
        if stopped:
            break
    return [*pieces, stream.finish()]


def test_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)

    assert tokenizer.bos_token_id == ids[0]
    assert TEXT == tokenizer.decode(ids)
    assert "<s>" + TEXT == tokenizer.decode(ids, skip_special_tokens=False)
    assert (2,) == tokenizer.eos_token_ids


def test_empty_text_is_the_start_token_alone(tokenizer):
    assert [1] == tokenizer.encode("")


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(PromptError, match="not valid Unicode"):
        tokenizer.encode("abc\ud83d")


def test_chat_goes_through_the_template(tokenizer):
    messages = [{"role": "user", "content": "hé"}]

    ids = tokenizer.encode_chat(messages)
    closed = tokenizer.encode_chat(messages, add_generation_prompt=False)

    assert all(isinstance(token_id, int) for token_id in ids)
    assert "<s>[user]hé<|end|>[assistant]" == tokenizer.decode(ids, skip_special_tokens=False)
    assert "<s>[user]hé<|end|>" == tokenizer.decode(closed, skip_special_tokens=False)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], ["hello"], [{"content": "x"}]])
def test_bad_messages_are_named(tokenizer, messages):
    with pytest.raises(PromptError, match="role"):
        tokenizer.encode_chat(messages)


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "refuses these messages: TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "refuses these messages: SecurityError"),
    ],
    ids=["absent", "raising", "syntax", "escaping-the-sandbox"],
)
def test_template_errors_are_named(tmp_path, template, part):
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)

    with pytest.raises(PromptError) as caught:
        Tokenizer.open(tmp_path).encode_chat([{"role": "user", "content": "x"}])

    assert part in str(caught.value)


def test_more_tokens_than_embeddings_are_said(tokenizer_dir):
    """transformers loads such a pair; only a prompt that holds the token is refused, see test_odd_tokenizers.py."""
    assert Tokenizer.open(tokenizer_dir, vocab_size=260).encode("a")

    with pytest.warns(UserWarning, match="has id 259, but the model has embeddings for 259"):
        Tokenizer.open(tokenizer_dir, vocab_size=259)


def test_directory_without_a_tokenizer(tmp_path):
    assert not has_tokenizer(tmp_path)

    with pytest.raises(ConfigError, match="no tokenizer found.*token ids"):
        Tokenizer.open(tmp_path)


def test_damaged_tokenizer(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')

    with pytest.raises(ConfigError, match="cannot be loaded.*download the tokenizer again or give prompts"):
        Tokenizer.open(tmp_path)


def test_remote_code_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    save_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass T: pass\n")
    edit_json(
        tmp_path / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
        tokenizer_class="EvilTokenizer",
    )

    with pytest.raises(ConfigError, match="never run"):
        Tokenizer.open(tmp_path)
    assert not canary.exists()


def test_importing_the_module_does_not_import_transformers():
    """transformers takes a second; `hetero-attn --help` must not wait for it."""
    code = "import sys, hetero_attn.serving.text.tokenizer, hetero_attn.checkpoints.hub; sys.exit('transformers' in sys.modules)"

    assert (
        0
        == subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3], check=False).returncode
    )


def test_a_character_is_shown_when_its_last_byte_is_there(tokenizer):
    ids = tokenizer.encode("a😀b")[1:]

    assert ["a", "", "", "", "😀", "b", ""] == pieces_of(tokenizer.stream(), ids)


def test_text_that_ends_within_a_character_shows_it_as_a_replacement(tokenizer):
    ids = tokenizer.encode("a😀")[1:-1]

    assert ["a", "", "", "", REPLACEMENT] == pieces_of(tokenizer.stream(), ids)


def test_a_run_of_garbage_is_not_held_back_for_ever(tokenizer):
    lead_byte = tokenizer.encode("é")[1]

    pieces = pieces_of(tokenizer.stream(), [lead_byte] * 100)

    assert REPLACEMENT * 100 == "".join(pieces)
    assert max(map(len, pieces)) < 10


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=20))
def test_streamed_text_equals_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer.stream(), ids)

    assert text == "".join(pieces)
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 306), max_size=30))
def test_any_tokens_stream_to_their_text(tokenizer, ids):
    """Random bytes are mostly broken characters, ids from 260 on have no text at all."""
    assert tokenizer.decode(ids) == "".join(pieces_of(tokenizer.stream(), ids))


@settings(max_examples=150, deadline=None)
@given(chunks=st.lists(st.sampled_from(["▁Hello", "▁wor", "ld", "é", "▁", "!", "😀", "ü", "日", "</s>"]), max_size=12))
def test_byte_fallback_and_leading_spaces(byte_fallback, chunks):
    """Sentencepiece drops the first space of a text only; a special token has no text and changes nothing of that."""
    decode, vocab = byte_fallback
    ids = [i for c in chunks for i in ([vocab[c]] if c in vocab else [vocab[f"<0x{byte:02X}>"] for byte in c.encode()])]

    pieces = pieces_of(TextStream(decode), ids)

    assert decode(ids) == "".join(pieces)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_special_tokens_are_shown_only_when_asked_for(tokenizer):
    ids = [*tokenizer.encode("a"), 3, *tokenizer.encode("b")[1:]]

    assert "ab" == "".join(pieces_of(tokenizer.stream(), ids))
    assert "<s>a<|end|>b" == "".join(pieces_of(tokenizer.stream(skip_special_tokens=False), ids))


def test_stop_string_ends_the_stream(tokenizer):
    ids = tokenizer.encode("one\ntwo\n\nthree")[1:]

    pieces = pieces_of(tokenizer.stream(stop=["\n\n"]), ids)

    assert "one\ntwo" == "".join(pieces)
    assert len("one\ntwo\n\n") + 1 == len(pieces)


def test_stop_string_across_a_character_of_several_tokens(tokenizer):
    ids = tokenizer.encode("yes😀!no")[1:]

    assert "yes" == "".join(pieces_of(tokenizer.stream(stop=["😀!"]), ids))


def test_held_back_text_comes_at_the_end_when_no_stop_follows(tokenizer):
    ids = tokenizer.encode("abST")[1:]

    assert ["a", "b", "", "", "ST"] == pieces_of(tokenizer.stream(stop=["STOP"]), ids)


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "matched"),
    [
        (["b"], ["abc"], ["a"], "b"),
        (["END"], ["xE", "N", "Dy", "z"], ["x", "", "", ""], "END"),
        (["END"], ["xE", "Ny"], ["x", "ENy"], None),
        (["aab"], ["aa", "ab"], ["", "a"], "aab"),
        (["long stop", "on"], ["l", "on"], ["", "l"], "on"),
        (["x", "ab"], ["aab x"], ["a"], "ab"),
        ([], ["abc"], ["abc"], None),
        ([""], ["abc"], ["abc"], None),
    ],
    ids=["inside", "across-pieces", "broken-off", "self-overlap", "shorter-wins", "earliest", "none", "empty-stop"],
)
def test_stop_matcher(stop, pieces, shown, matched):
    matcher = StopMatcher(stop)

    assert shown == [matcher.push(piece) for piece in pieces]
    assert matched == matcher.matched


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=20), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), data=st.data()
)
def test_stop_matcher_equals_searching_the_whole_text(text, stop, data):
    matcher = StopMatcher(stop)
    shown, rest = "", text
    while rest and matcher.matched is None:
        length = data.draw(st.integers(1, 4))
        shown, rest = shown + matcher.push(rest[:length]), rest[length:]
    shown += matcher.finish()

    consumed = text[: len(text) - len(rest)]
    ends = [consumed.find(s) for s in stop if s in consumed]
    if matcher.matched is None:
        assert not ends
        assert text == shown
    else:
        assert consumed[: min(ends)] == shown


def test_the_short_way_to_a_generic_tokenizer_gives_what_auto_tokenizer_gives(tokenizer_dir):
    from transformers import AutoTokenizer

    for path in (tokenizer_dir, TINY):
        ours, theirs = Tokenizer.open(path), AutoTokenizer.from_pretrained(str(path))
        for text in ("", "A list holds numbers.", " héllo\n\n<s> x", "日本語 🙂"):
            assert ours.encode(text) == list(theirs.encode(text))
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        assert ours.encode_chat(talk) == theirs.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=False
        )


def test_transformers_is_imported_by_one_thread_at_a_time(monkeypatch):
    """A second thread that entered its import got a package without its names, and a chat ended with an ImportError."""
    inside, most_inside = [], []

    def slow_import(name):
        inside.append(name)
        most_inside.append(len(inside))
        time.sleep(0.05)
        inside.remove(name)
        return SimpleNamespace(AutoTokenizer="the tokenizer")

    monkeypatch.setattr(transformers_import.importlib, "import_module", slow_import)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(transformers_import.transformers_part, ["AutoTokenizer"] * 3))

    assert found == ["the tokenizer"] * 3 and most_inside == [1, 1, 1]
