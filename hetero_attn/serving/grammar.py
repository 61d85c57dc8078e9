"""Answers that follow a JSON schema, a regular expression or a grammar: the one door to llguidance (extra `[grammar]`).

Before a token is chosen, a mask leaves those that the grammar allows next. It depends only on the tokens so far, so it
is worked out anew, or taken back, wherever a request stands. llguidance bounds what a grammar may cost, at the begin
and in every step; sizes and depth are bounded here. Source: https://github.com/guidance-ai/llguidance
"""

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from threading import Lock
from typing import Any

from hetero_attn.errors import SamplingError
from hetero_attn.serving.draws.kept_grammars import KeptGrammars, allocated_bytes
from hetero_attn.serving.draws.token_mask import TokenMask, cause
from hetero_attn.serving.sampling_params import JSON_OPTIONS, SamplingParams
from hetero_attn.serving.text.foreign import failures_told
from hetero_attn.serving.text.tokenizer import Tokenizer

MOST_FORMATS = 16  # that nobody knows, in one schema
# Words of a vocabulary that llguidance tests once for all: where a grammar allows any text of such letters, it walks
# through the others alone. Masks of SmolLM2's 49,152 tokens by `[a-z ]{3,99}` take 30 us in place of 400.
LETTERS = ("a-z ", "a-zA-Z0-9 ")
LENGTHS = ("{1,10}", "{1,30}", "+")
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (\S+)")
_VALUES = ("const", "enum", "default", "examples")  # what they hold is no schema
_OBJECTS = {"true": "{}", "false": '{"not": {}}'}  # schemas of one word as llguidance takes them, which wants objects


class Grammars:
    """Makes masks for one model. Thread-safe; the tokenizer is read at the first grammar.

    tokenizer: None for a model without text. vocab_size: length of the logits. end_token_ids: what may end an answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_token_ids = tokenizer, vocab_size, list(end_token_ids)
        self._tokens_lock = Lock()  # held for an instant, but for the first time
        self._kept = KeptGrammars()
        self._known_tokens: Any = None

    def mask(self, params: SamplingParams) -> TokenMask | None:
        """The mask that the parameters ask for. Raises SamplingError for a grammar that is wrong or too large."""
        wanted = params.wanted_grammar
        if wanted is None:
            return None
        self._matcher_of(wanted)
        after = [] if params.grammar_after is None else self._ids_of(params.grammar_after)
        ready, lost = partial(self._ready, wanted), partial(self._forget, wanted)
        return TokenMask(ready, self._vocab_size, after, self._threads, lost)

    def _ready(self, wanted: tuple[str, str]) -> Future:
        """A matcher at its start, at once where the grammar is still kept, else from another thread."""
        kept = self._kept.get(wanted)
        if kept is None:
            return self._compilers.submit(lambda: self._matcher_of(wanted).deep_copy())
        found: Future = Future()
        found.set_result(kept.deep_copy())
        return found

    def _matcher_of(self, wanted: tuple[str, str]) -> Any:
        """The matcher that is kept of a grammar, not to be moved."""
        found = self._kept.get(wanted)
        if found is None:
            self._tokens()
            before = allocated_bytes()
            found = self._compile(*wanted)
            self._kept.keep(wanted, found, max(0, allocated_bytes() - before))
        return found

    def mark(self, text: str) -> str:
        """A marker of a chat template as a Lark grammar names it: a special token is no text. Raises SamplingError."""
        (token_id, *more) = self._ids_of(text)
        is_special = not more and self._tokens().is_special_token(token_id)
        return f"<[{token_id}]>" if is_special else json.dumps(text, ensure_ascii=False)

    def _forget(self, wanted: tuple[str, str]) -> None:
        """Keep a grammar no longer that an answer could not follow to its end: what it took until then, often 100 MB,
        all its copies share."""
        self._kept.forget(wanted)

    def _compile(self, kind: str, text: str) -> Any:
        matcher = self._matcher(kind, text)
        for _ in range(MOST_FORMATS):
            unknown = _UNKNOWN_FORMAT.search(matcher.get_error() or "") if kind == "json_schema" else None
            if unknown is None:
                break
            text = json.dumps(_without_format(json.loads(text), unknown[1]))
            matcher = self._matcher(kind, text)
        trial = matcher.deep_copy()
        if not matcher.is_error():
            trial.compute_bitmask()  # whether anything may begin is found out here alone
        if trial.is_error():
            raise SamplingError(f"{kind} cannot be followed: {cause(trial.get_error())}", kind)
        return matcher

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="hetero-attn-mask")

    @cached_property
    def _compilers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="hetero-attn-grammar")

    def _matcher(self, kind: str, text: str) -> Any:
        llguidance, tokens = _llguidance(), self._tokens()
        make = llguidance.LLMatcher
        try:
            if kind == "json_schema":
                grammar = make.grammar_from_json_schema(_OBJECTS.get(text.strip(), text), defaults=JSON_OPTIONS)
            else:
                grammar = make.grammar_from_regex(text) if kind == "regex" else make.grammar_from_lark(text)
            return make(tokens, grammar, log_level=0)
        except ValueError as error:
            raise SamplingError(f"{kind} cannot be followed: {cause(str(error))}", kind) from None

    def _ids_of(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise SamplingError("this model has no tokenizer, so its answers cannot follow a grammar of text")
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _tokens(self) -> Any:
        with self._tokens_lock:
            if self._known_tokens is None:
                self._known_tokens = self._made_tokens()
            return self._known_tokens

    def _made_tokens(self) -> Any:
        llguidance = _llguidance()
        description = None if self._tokenizer is None else self._tokenizer.description
        if description is None:
            raise SamplingError("this model's tokenizer is not of the kind that tokenizer.json describes, so its "
                                "answers cannot follow a grammar")  # fmt: skip
        ends = [each for each in self._end_token_ids if each < self._vocab_size]
        words = [f"[{letters}]{length}" for letters in LETTERS for length in LENGTHS]
        known = {"n_vocab": self._vocab_size, "eos_token": ends}
        with failures_told(lambda why: SamplingError(f"this model's answers cannot follow a grammar: {why}")):
            slices = words + llguidance.LLTokenizer.general_slices()
            return llguidance.LLTokenizer(description, slices=slices, **known)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise SamplingError("grammars need llguidance: pip install 'hetero-attn[grammar]'") from None
    return llguidance


def _without_format(schema: Any, name: str) -> Any:
    """A schema without a format that only says what a text is for: as JSON Schema has it, an unknown one holds for
    everything."""
    if isinstance(schema, list):
        return [_without_format(each, name) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if (key, value) != ("format", name)}
    return {key: value if key in _VALUES else _without_format(value, name) for key, value in kept.items()}
