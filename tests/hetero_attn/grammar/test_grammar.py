"""Answers that follow a schema, a regular expression or a grammar, whatever the model would rather say."""

import importlib.util
import json
import re
import time
import weakref
from pathlib import Path

import pytest
import torch

from hetero_attn.errors import SamplingError
from hetero_attn.serving import grammar
from hetero_attn.serving.draws import kept_grammars
from hetero_attn.serving.grammar import Grammars
from hetero_attn.serving.sampling_params import SamplingParams
from tests.support.server.http_server import load_tiny
from tests.support.server.schemas import PERSON
from tests.support.suite.names import case_name

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed (extra grammar)")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (extra test-tools)")


@pytest.fixture(scope="module")
def llm():
    with load_tiny() as model:
        yield model


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.5, "seed": 7}], ids=str)
def test_every_answer_is_json_that_the_schema_allows(llm, sampling):
    outputs = llm.generate(["A person:", "Q"], SamplingParams(json_schema=PERSON, max_tokens=100, **sampling))

    for output in outputs:
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), PERSON)


def test_beside_others_the_answer_is_as_alone_and_theirs_as_without_it(llm):
    plain, forced = (
        SamplingParams(temperature=0.0, max_tokens=20),
        SamplingParams(regex="(list|set|[0-9]){4}", temperature=0.0),
    )
    alone = [llm.generate("A list is", params)[0].token_ids for params in (plain, forced)]

    assert [output.token_ids for output in llm.generate(["A list is"] * 2, [plain, forced])] == alone


@pytest.mark.parametrize(
    ("wish", "holds"),
    [
        ({"regex": r"[a-c]{3}-\d{2}"}, lambda text: re.fullmatch(r"[a-c]{3}-\d{2}", text)),
        ({"regex": "déjà 🎉+!"}, lambda text: re.fullmatch("déjà 🎉+!", text)),
        ({"grammar": 'start: "yes" | "no"'}, lambda text: text in ("yes", "no")),
        ({"json_schema": '{"type": "boolean"}'}, lambda text: text in ("true", "false")),
        ({"json_schema": {"const": {"a": [1, None]}}}, lambda text: json.loads(text) == {"a": [1, None]}),
        ({"regex": "[ab]+", "repetition_penalty": 1.3, "logit_bias": {5: 50.0}, "max_tokens": 9}, lambda text: set(text) <= {"a", "b"}),
    ],
    ids=case_name,
)  # fmt: skip
def test_other_kinds_of_grammar_hold(llm, wish, holds):
    params = SamplingParams(**{"temperature": 1.0, "seed": 3, "max_tokens": 40} | wish)

    assert holds(llm.generate("Say", params)[0].text)


def test_it_begins_behind_a_text(grammars, tokenizer):
    mask = grammars.mask(SamplingParams(regex="ab", grammar_after="</think>"))
    ids = tokenizer.encode("any words</think>", add_special_tokens=False)

    assert all(mask.allowed(ids[:length]) is None for length in range(len(ids)))
    assert mask.allowed(ids) is not None
    assert mask.allowed(ids[:2]) is None


def test_a_mask_is_that_of_the_tokens_wherever_the_request_stands(grammars, tokenizer):
    """An oracle that is made anew for every call: going on, going back, and taking another way."""
    params = SamplingParams(json_schema=PERSON)
    ids = tokenizer.encode('{"name": "Ada", "age": 36', add_special_tokens=False)
    other = tokenizer.encode('{"name": "Bob', add_special_tokens=False)
    mask = grammars.mask(params)
    for tokens in ([], ids[:3], ids[:4], ids, ids[:2], other, other[:1], ids, []):
        fresh = grammars.mask(params)

        assert torch.equal(mask.allowed(tokens), fresh.allowed(tokens)), tokens


def test_the_end_is_allowed_where_the_grammar_may_end_and_only_there(grammars, tokenizer):
    mask, (end,) = grammars.mask(SamplingParams(regex="ab?")), tokenizer.eos_token_ids
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")

    assert not mask.allowed([])[end] and mask.allowed([])[a]
    assert mask.allowed([a])[end] and mask.allowed([a])[b]
    assert mask.allowed([a, b]).nonzero().flatten().tolist() == [end]


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"regex": "("}, "regex cannot be followed"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"[^\s\S]"}, "no text that fits"),
        ({"grammar": "start: start"}, "no text that fits"),
        ({"json_schema": {"$ref": "#"}}, "no text that fits"),
        ({"grammar": "start: x"}, "unknown name"),
        ({"json_schema": {"type": "nope"}}, "nope"),
    ],
    ids=str,
)
def test_a_wrong_grammar_is_told_before_anything_is_computed(llm, wish, said):
    with pytest.raises(SamplingError, match=said):
        llm.generate("a", SamplingParams(**wish))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"regex": "a", "json_schema": {}}, "json_schema and regex"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"regex": 3}, "regex must be"),
        ({"regex": ""}, "regex must be"),
        ({"regex": "a" * 70_000}, "65536"),
        ({"json_schema": "{"}, "json_schema must be"),
        ({"json_schema": [1]}, "json_schema must be an object"),
        ({"json_schema": json.loads('{"not":' * 40 + "{}" + "}" * 40)}, "32 deep"),
    ],
    ids=str,
)
def test_a_bad_wish_is_refused_by_name(wish, said):
    with pytest.raises(SamplingError, match=said):
        SamplingParams(**wish)


HOSTILE = {
    "nested repeats": {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
    "overlapping choices": {"type": "string", "pattern": "(a|aa|aaa|b?c*)*" * 30},
    "a long minimum": {"type": "string", "minLength": 1_000_000, "maxLength": 5_000_000},
    "many items": {"type": "array", "minItems": 100_000, "items": {"type": "object"}},
    "a large enum": {"enum": [f"x{number}" * 8 for number in range(1500)]},
    "doubling references": {
        "$defs": {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(20)} | {"a20": {"type": "object"}},
        "$ref": "#/$defs/a0",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_costs_little(grammars, tokenizer, name):
    """Processor time, so that a busy machine does not count: making the mask and eight steps of it."""
    start = time.process_time()
    try:
        mask = grammars.mask(SamplingParams(json_schema=HOSTILE[name]))
        for length in range(8):
            mask.allowed(tokenizer.encode('"aaaaaaaa', add_special_tokens=False)[:length])
    except SamplingError:
        pass

    assert time.process_time() - start < 2


def test_what_was_compiled_is_kept_and_bounded(tokenizer, monkeypatch):
    grammars = Grammars(tokenizer, 4096, tokenizer.eos_token_ids)
    monkeypatch.setattr(kept_grammars, "MOST_KEPT", 3)
    for number in range(6):
        grammars.mask(SamplingParams(regex=f"a{{{number + 1}}}"))

    assert len(grammars._kept) == 3


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ([60, 60, 60], [2]),
        ([10, 20, 30, 40], [0, 1, 2, 3]),
        ([10, 20, 30, 41], [1, 2, 3]),
        ([10, 300], [1]),
        ([300, 10], [1]),
    ],
    ids=str,
)
def test_what_is_kept_fits_together_and_the_oldest_goes_first(monkeypatch, sizes, left):
    monkeypatch.setattr(kept_grammars, "KEPT_BYTES", 100)
    kept = kept_grammars.KeptGrammars()
    for place, size in enumerate(sizes):
        kept.keep(("regex", str(place)), place, size)

    assert [place for place in range(len(sizes)) if kept.get(("regex", str(place))) is not None] == left


def test_what_was_asked_for_again_is_no_longer_the_oldest(monkeypatch):
    monkeypatch.setattr(kept_grammars, "KEPT_BYTES", 100)
    kept = kept_grammars.KeptGrammars()
    for name in "aba":
        if kept.get(("regex", name)) is None:
            kept.keep(("regex", name), name, 50)
    kept.keep(("regex", "c"), "c", 50)

    assert kept.get(("regex", "b")) is None and kept.get(("regex", "a")) == "a"


def test_large_grammars_do_not_pile_up(tokenizer, monkeypatch):
    """Sixteen of them held 2.5 GB in a server."""
    monkeypatch.setattr(kept_grammars, "KEPT_BYTES", 64 << 20)
    grammars = Grammars(tokenizer, 4096, tokenizer.eos_token_ids)
    grammars.mask(SamplingParams(regex="x"))
    before = kept_grammars.allocated_bytes()
    for letter in "abcdef":
        grammars.mask(SamplingParams(regex=f"(({letter}{{1000}}){{20}}){{3}}"))
    taken = kept_grammars.allocated_bytes() - before

    assert 20 << 20 < taken < 100 << 20 and 1 <= len(grammars._kept) <= 3


class WatchedMatcher:
    """A matcher of llguidance's, and so are its copies, of which `held` knows those that are still held."""

    def __init__(self, matcher, held):
        self._matcher, self._held = matcher, held
        held.add(self)

    def __getattr__(self, name):
        return getattr(self._matcher, name)

    def deep_copy(self):
        return WatchedMatcher(self._matcher.deep_copy(), self._held)


@pytest.fixture
def held(monkeypatch):
    """The matchers that anybody holds, of which one at a time is kept for others."""
    found, compiled = weakref.WeakSet(), Grammars._compile
    monkeypatch.setattr(kept_grammars, "MOST_KEPT", 1)
    monkeypatch.setattr(Grammars, "_compile", lambda self, *wanted: WatchedMatcher(compiled(self, *wanted), found))
    return found


def test_requests_that_wait_hold_no_grammar(tokenizer, held):
    """256 of them held 100 MB each."""
    grammars = Grammars(tokenizer, 4096, tokenizer.eos_token_ids)
    masks = [grammars.mask(SamplingParams(regex=f"{letter}{{3}}")) for letter in "abcd"]
    waiting = len(held)
    first = [mask.allowed([]) for mask in masks]
    running = len(held)
    for mask in masks:
        mask.let_go()

    assert (waiting, running, len(held)) == (1, 5, 1)
    assert all(torch.equal(mask.allowed([]), allowed) for mask, allowed in zip(masks, first, strict=True))


def test_a_grammar_is_held_from_a_place_to_the_end_of_the_answer(held):
    """And what had to be compiled again is followed from where the answer stands."""
    with load_tiny(batch=2) as llm:
        words = ["list", "tuple", "string", "number"]
        requests = [llm.add("A", SamplingParams(regex=f"{word}( {word}){{3}}", temperature=0.0)) for word in words]
        most = 0
        while llm.step():
            most = max(most, len(held))

        assert [request.text for request in requests] == [" ".join([word] * 4) for word in words]
        assert most == 3 and len(held) == 1


def test_what_cannot_be_followed_to_its_end_is_not_kept(tokenizer):
    """What each had taken, 100 MB of `a{1000000000}`, stayed with what was kept of it: 6 GB of 64 such regexes."""
    grammars = Grammars(tokenizer, 4096, tokenizer.eos_token_ids)
    choices = " | ".join(f'"{number}"' for number in range(5000))
    mask = grammars.mask(SamplingParams(grammar=f"start: {choices}"))
    kept = len(grammars._kept)
    with pytest.raises(SamplingError, match="cannot be followed further"):
        for length in range(4):
            mask.allowed(tokenizer.encode("1" * length, add_special_tokens=False))

    assert (kept, len(grammars._kept)) == (1, 0)


def test_without_a_tokenizer_it_is_refused():
    with pytest.raises(SamplingError, match="no tokenizer|not of the kind"):
        Grammars(None, 100, ()).mask(SamplingParams(regex="a"))


@pytest.mark.parametrize(
    ("vocab_size", "ends", "said"), [(4096, (), "eos"), (100, (0,), "vocab")], ids=["ends", "size"]
)
def test_a_tokenizer_that_no_grammar_fits_is_told(tokenizer, vocab_size, ends, said):
    with pytest.raises(SamplingError, match=f"cannot follow a grammar: .*{said}"):
        Grammars(tokenizer, vocab_size, ends).mask(SamplingParams(regex="a"))


class CountedList(list):
    """A list that counts how many slices of a few tokens are taken of it."""

    def __init__(self, *values: object) -> None:
        super().__init__(*values)
        self.looks = 0

    def __getitem__(self, key: object) -> object:
        self.looks += isinstance(key, slice) and key.stop is not None and key.stop - (key.start or 0) < 8
        return super().__getitem__(key)


def test_a_long_thought_is_searched_once(grammars, tokenizer):
    """Not from its beginning with every token, which would cost seconds of processor time in the end."""
    mask, ids = grammars.mask(SamplingParams(regex="ab", grammar_after="</think>")), CountedList()
    (word,) = tokenizer.encode("a", add_special_tokens=False)
    for _ in range(500):
        ids.append(word)
        assert mask.allowed(ids) is None

    assert ids.looks < 600
    ids.extend(tokenizer.encode("</think>", add_special_tokens=False))
    assert mask.allowed(ids) is not None


def test_a_format_that_nobody_knows_holds_for_everything(grammars, tokenizer):
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "path"}, "b": {"const": {"format": "path"}}, "c": {"type": "string", "format": "path-2"}}, "required": ["format", "b", "c"], "additionalProperties": False}  # fmt: skip
    mask = grammars.mask(SamplingParams(json_schema=schema))
    text = '{"format": "/a", "b": {"format": "path"}, "c": "x"}'
    ids = [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_token_ids[:1]]

    assert all(mask.allowed(ids[:length])[token_id] for length, token_id in enumerate(ids))
    with pytest.raises(SamplingError, match="not"):
        grammars.mask(SamplingParams(json_schema={"not": {"type": "string", "format": "path"}, "minimum": 3}))


STATES = [
    ({"json_schema": PERSON}, '{"name": "Ada", "age": 36, "tags": ["a"]}'),
    (
        {"json_schema": {"type": "array", "items": {"type": "string", "pattern": "^[a-z ]{2,40}$"}}},
        '["some words", "of a',
    ),
    ({"regex": r"[a-z ]{3,40}(\n[A-Za-z0-9 ]{1,9})*"}, "words of some\nLen 4\nA"),
    ({"regex": "(déjà|🎉|[A-Z]+)*"}, "déjàAB🎉"),
    ({"grammar": 'start: <[2]> "yes" <[3]>? /[ -~]+/'}, ""),
]


@pytest.mark.parametrize(("wish", "text"), STATES, ids=[str(next(iter(wish.values())))[:30] for wish, _ in STATES])
def test_one_token_is_judged_as_all_of_them_are(grammars, tokenizer, monkeypatch, wish, text):
    """Every token of the vocabulary, in every state on the way; and as llguidance judges without slices of words."""
    monkeypatch.setattr(grammar, "LETTERS", ())
    plain, params = Grammars(tokenizer, 4096, tokenizer.eos_token_ids), SamplingParams(**wish)
    mask, oracle, ids = grammars.mask(params), plain.mask(params), tokenizer.encode(text, add_special_tokens=False)
    for length in range(len(ids) + 1):
        found = grammars.mask(params).which(ids[:length], range(4096))
        allowed = mask.allowed(ids[:length])

        assert found == allowed.tolist()
        assert torch.equal(allowed, oracle.allowed(ids[:length]))
        assert length == 0 or len(set(found)) == 2


def test_the_benchmark_of_masks_times_every_token(llm):
    path = Path(__file__).resolve().parents[3] / "examples" / "benchmarks" / "server" / "masks.py"
    spec = importlib.util.spec_from_file_location("masks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    times = module.followed(llm, {"regex": "[ab]{5}"}, 0)
    assert 1 < len(times) <= 6 and all(len(each) == 4 and min(each) >= 0 for each in times)
