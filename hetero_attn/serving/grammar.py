"""Answers that follow a JSON schema, a regular expression or a grammar: the one door to llguidance (extra `[grammar]`).

Before a token is chosen, a mask leaves those that the grammar allows next. It depends only on the tokens so far, so it
is worked out anew, or taken back, wherever a request stands. llguidance bounds what a grammar may cost, at the begin
and in every step; sizes and depth are bounded here. Source: https://github.com/guidance-ai/llguidance
"""

import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from threading import Lock
from typing import Any

import numpy as np
import torch

from hetero_attn.errors import SamplingError
from hetero_attn.serving.sampling_params import JSON_OPTIONS, SamplingParams
from hetero_attn.serving.text.tokenizer import Tokenizer

MOST_COMPILED = 16  # `((a{1000}){100}){3}` takes 100 MB
MOST_FORMATS = 16  # that nobody knows, in one schema
AHEAD_S = 1e-4  # of a mask; handing over a shorter one to another thread would take as long
# Words of a vocabulary that llguidance tests once for all: where a grammar allows any text of such letters, it walks
# through the others alone. Masks of SmolLM2's 49,152 tokens by `[a-z ]{3,99}` take 30 us in place of 400.
LETTERS = ("a-z ", "a-zA-Z0-9 ")
LENGTHS = ("{1,10}", "{1,30}", "+")
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (\S+)")
_VALUES = ("const", "enum", "default", "examples")  # what they hold is no schema
_OBJECTS = {"true": "{}", "false": '{"not": {}}'}  # schemas of one word as llguidance takes them, which wants objects


class TokenMask:
    """What one request may say next. matcher: llguidance's. after: token ids behind which the grammar holds, empty for
    from the start. threads: where masks that take long are found out ahead. lost: called where it can be followed no
    further."""

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        after: Sequence[int],
        threads: ThreadPoolExecutor,
        lost: Callable[[], object] = tuple,
    ) -> None:
        self._lost = lost
        self._matcher, self._vocab_size, self._after, self._threads = matcher, vocab_size, list(after), threads
        self._start = None if after else 0  # position of the first token that has to follow the grammar
        self._before: list[int] = []  # tokens among which `after` was looked for last
        self._seen: list[int] = []  # tokens that the matcher has taken
        self._ahead: Future | None = None  # of the mask behind `_seen`
        self._found: np.ndarray | None = None  # that mask
        self._forced: list[int] | None = None  # tokens that have to come behind `_seen`
        self._took_s = 0.0  # processor time of the last mask

    def copy(self, lost: Callable[[], object]) -> "TokenMask":
        """A fresh one, from the start."""
        return TokenMask(self._matcher.deep_copy(), self._vocab_size, self._after, self._threads, lost)

    def prepare(self, generated_ids: Sequence[int]) -> None:
        """Begin to find out on another thread what may come behind these, while a step is computed; only where the last
        time took long."""
        if self._took_s >= AHEAD_S and self.holds(generated_ids):
            self._follow(generated_ids)
            if self._found is None and self._ahead is None:
                self._ahead = self._threads.submit(self._bits)

    def holds(self, generated_ids: Sequence[int]) -> bool:
        """Whether what comes behind these has to follow the grammar, which may begin behind a text that is to come."""
        return self._found_start(generated_ids) is not None

    def which(self, generated_ids: Sequence[int], token_ids: Sequence[int]) -> list[bool]:
        """Whether each of some tokens may come behind these; a small part of the work of finding out all that may.

        Where text is forced llguidance allows one way of writing it, and takes any; at the end it allows the end, and
        takes nothing. There all are found out, which is soon done.
        """
        if not self.holds(generated_ids):
            return [True] * len(token_ids)
        self._follow(generated_ids)
        is_known = self._ahead is not None or self._found is not None
        if is_known or self._matcher.is_stopped() or self._forced_tokens():
            return self._mask()[list(token_ids)].tolist()
        return [self._matcher.validate_tokens([token_id]) == 1 for token_id in token_ids]

    def allowed(self, generated_ids: Sequence[int]) -> torch.Tensor | None:
        """Which tokens may come next: bool [vocab_size] on the CPU, not to be written to; None while every one may.

        generated_ids: all tokens of the answer so far; they may be fewer than at the call before. Raises SamplingError
        where the grammar has become too costly to follow.
        """
        if not self.holds(generated_ids):
            return None
        self._follow(generated_ids)
        return torch.from_numpy(self._mask())

    def forced(self, generated_ids: Sequence[int]) -> list[int]:
        """Tokens that write what the grammar forces behind these, empty where it leaves a choice of text."""
        if not self.holds(generated_ids):
            return []
        self._follow(generated_ids)
        self._rest()
        return [] if self._matcher.is_error() else self._forced_tokens()

    def _found_start(self, generated_ids: Sequence[int]) -> int | None:
        width, known = len(self._after), len(self._before)
        if not width:
            return 0
        if self._start is None or self._start > len(generated_ids):
            is_longer = list(generated_ids[:known]) == self._before
            first = max(width, known + 1 if is_longer and self._start is None else 0)
            ends = range(first, len(generated_ids) + 1)
            self._start = next((end for end in ends if [*generated_ids[end - width : end]] == self._after), None)
            self._before = list(generated_ids)
        return self._start

    def _follow(self, generated_ids: Sequence[int]) -> None:
        """Bring the matcher to where the answer stands; what was found out is kept only there."""
        tokens = list(generated_ids[self._start :])
        if tokens == self._seen:
            return
        self._rest()
        self._found = self._forced = None
        shared = len(self._seen) if tokens[: len(self._seen)] == self._seen else 0
        while shared < min(len(tokens), len(self._seen)) and tokens[shared] == self._seen[shared]:
            shared += 1
        if shared < len(self._seen):
            self._matcher.rollback(len(self._seen) - shared)
            self._seen = self._seen[:shared]
        if tokens[shared:]:
            self._matcher.consume_tokens(tokens[shared:])
            self._seen = tokens

    def _forced_tokens(self) -> list[int]:
        if self._forced is None:
            self._forced = self._matcher.compute_ff_tokens()
        return self._forced

    def _mask(self) -> np.ndarray:
        """What may come where the matcher stands: bool [vocab_size]."""
        if self._found is None:
            bits = self._bits() if self._ahead is None else self._ahead.result()
            if self._matcher.is_error():
                self._lost()
                raise SamplingError(f"the grammar cannot be followed further: {_cause(self._matcher.get_error())}")
            words = np.frombuffer(bits, np.uint8)
            self._found = np.unpackbits(words, count=self._vocab_size, bitorder="little").view(np.bool_)
        return self._found

    def _bits(self) -> bytes:
        begin = time.thread_time()
        bits = self._matcher.compute_bitmask()
        self._took_s = time.thread_time() - begin
        return bits

    def _rest(self) -> None:
        """Let the other thread come to its end: the matcher is for one at a time."""
        if self._ahead is not None:
            self._ahead.exception()
            self._ahead = None


class Grammars:
    """Makes masks for one model. Thread-safe; the tokenizer is read at the first grammar.

    tokenizer: None for a model without text. vocab_size: length of the logits. end_token_ids: what may end an answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_token_ids = tokenizer, vocab_size, list(end_token_ids)
        self._lock = Lock()
        self._compiled: OrderedDict[tuple[str, str], TokenMask] = OrderedDict()
        self._known_tokens: Any = None

    def mask(self, params: SamplingParams) -> TokenMask | None:
        """The mask that the parameters ask for. Raises SamplingError for a grammar that is wrong or too large."""
        wanted = params.wanted_grammar
        if wanted is None:
            return None
        with self._lock:
            key = (repr(wanted), params.grammar_after or "")
            if key not in self._compiled:
                self._compiled[key] = self._compile(*wanted, params.grammar_after)
            self._compiled.move_to_end(key)
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
            return self._compiled[key].copy(partial(self._forget, key))

    def mark(self, text: str) -> str:
        """A marker of a chat template as a Lark grammar names it: a special token is no text. Raises SamplingError."""
        (token_id, *more) = self._ids_of(text)
        is_special = not more and self._tokens().is_special_token(token_id)
        return f"<[{token_id}]>" if is_special else json.dumps(text, ensure_ascii=False)

    def _forget(self, key: tuple[str, str]) -> None:
        """Keep a grammar no longer that an answer could not follow to its end: what it took until then, often 100 MB,
        all its copies share."""
        with self._lock:
            self._compiled.pop(key, None)

    def _compile(self, kind: str, text: str, after: str | None) -> TokenMask:
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
            raise SamplingError(f"{kind} cannot be followed: {_cause(trial.get_error())}", kind)
        return TokenMask(matcher, self._vocab_size, [] if after is None else self._ids_of(after), self._threads)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="hetero-attn-mask")

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
            raise SamplingError(f"{kind} cannot be followed: {_cause(str(error))}", kind) from None

    def _ids_of(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise SamplingError("this model has no tokenizer, so its answers cannot follow a grammar of text")
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _tokens(self) -> Any:
        if self._known_tokens is None:
            llguidance = _llguidance()
            description = None if self._tokenizer is None else self._tokenizer.description
            if description is None:
                raise SamplingError("this model's tokenizer is not of the kind that tokenizer.json describes, so its "
                                    "answers cannot follow a grammar")  # fmt: skip
            ends = [each for each in self._end_token_ids if each < self._vocab_size]
            words = [f"[{letters}]{length}" for letters in LETTERS for length in LENGTHS]
            known = {"n_vocab": self._vocab_size, "eos_token": ends}
            try:
                slices = words + llguidance.LLTokenizer.general_slices()
                self._known_tokens = llguidance.LLTokenizer(description, slices=slices, **known)
            except ValueError as error:
                raise SamplingError(f"this model's answers cannot follow a grammar: {_cause(str(error))}") from None
        return self._known_tokens


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


def _cause(text: str) -> str:
    """What llguidance says in many lines, in one."""
    if text.startswith("NoExtensionBias"):
        return "there is no text that fits it"
    first, *more = text.strip().splitlines() or [""]
    return " ".join([first, *(line for line in more if line.startswith("error: "))])[:300]
