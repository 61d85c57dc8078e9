"""What a user asks of the choice of tokens: `SamplingParams`, with vLLM's names, defaults and meaning.

Every value is checked here, once, when the object is made; `sampling.Sampler` and the loop that calls it can then trust
it. The caps on list lengths keep one request from costing the others time or memory.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import NamedTuple

from hetero_attn.errors import SamplingError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_GRAMMAR_CHARACTERS = 1 << 16
MAX_SCHEMA_DEPTH = 32
# As json.dumps writes it. Where blanks are free, a model may write them until its context is full.
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
GRAMMARS = ("json_schema", "regex", "grammar")
LARGEST_SEED = 2**63 - 1


class _Range(NamedTuple):
    """The closed range of a number (`low` itself is excluded when `above_low`), and what to write instead."""

    low: float
    high: float
    way_out: str
    integer: bool = False
    above_low: bool = False
    optional: bool = False

    def __str__(self) -> str:
        kind = ("None or " if self.optional else "") + ("an integer" if self.integer else "a number")
        if math.isinf(self.high):
            return f"{kind} {'greater than' if self.above_low else 'of at least'} {self.low}"
        return f"{kind} in {'(' if self.above_low else '['}{self.low}, {self.high}]"

    def holds(self, value: float) -> bool:
        """Whether `value` is inside; never for NaN and the infinities."""
        above = self.low < value if self.above_low else self.low <= value
        return above and value <= min(self.high, sys.float_info.max)


_RANGES = {
    "temperature": _Range(0, math.inf, "0 is greedy, 1 leaves the model's distribution as it is"),
    "top_p": _Range(0, 1, "1 keeps every token; for the most likely token only, use temperature=0", above_low=True),
    "top_k": _Range(-1, math.inf, "0 or -1 keeps every token", integer=True),
    "min_p": _Range(0, 1, "0 keeps every token"),
    "repetition_penalty": _Range(0, math.inf, "1 is no penalty", above_low=True),
    "presence_penalty": _Range(-2, 2, "0 is no penalty"),
    "frequency_penalty": _Range(-2, 2, "0 is no penalty"),
    "seed": _Range(-1, LARGEST_SEED, "None or -1 draws a fresh seed", integer=True, optional=True),
    "logprobs": _Range(-1, math.inf, "None reports none, -1 the whole vocabulary", integer=True, optional=True),
    "max_tokens": _Range(1, math.inf, "None goes on to the end of the context", integer=True, optional=True),
    "min_tokens": _Range(0, math.inf, "0 lets the first token be the last", integer=True),
    "logit_bias value": _Range(-100, 100, "-100 all but bans a token, 100 all but forces it"),
    "token id": _Range(0, 2**31 - 1, "token ids are indices into the vocabulary", integer=True),
}


def _checked_number(name: str, value: object, rule: _Range | None = None) -> float | int | None:
    """Return `value` as a plain int or float, or raise `SamplingError` where it is of another type or out of range."""
    rule = rule or _RANGES[name]
    if value is None and rule.optional:
        return None
    right_type = isinstance(value, Integral if rule.integer else Real) and not isinstance(value, bool)
    try:
        # A plain number first: comparing numpy's small floats with large limits warns of an overflow.
        plain = (int(value) if rule.integer else float(value)) if right_type else None
    except OverflowError:
        plain = None
    if plain is None or not rule.holds(plain):
        raise SamplingError(f"{name} must be {rule}, got {value!r:.80}; {rule.way_out}", name.partition(" ")[0])
    return plain


def _checked_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SamplingError(f"{name} must be True or False, got {value!r}", name)
    return value


def _checked_items(name: str, value: object, container: type, most: int) -> tuple | dict:
    """Return `value` (None is empty) as a new `container`, or raise where it cannot be or holds over `most` items."""
    try:
        items = container(() if value is None else value)
    except (TypeError, ValueError):
        kind = "a mapping of token ids to numbers" if container is dict else "a list"
        raise SamplingError(f"{name} must be {kind}, got {value!r:.80}", name) from None
    if len(items) > most:
        raise SamplingError(f"{name} holds {len(items)} items, at most {most} are allowed; pass fewer", name)
    return items


def _checked_stop(value: object) -> tuple[str, ...]:
    strings = _checked_items("stop", (value,) if isinstance(value, str) else value, tuple, MAX_STOP_STRINGS)
    for text in strings:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise SamplingError(
                f"stop must hold strings of 1 to {MAX_STOP_CHARACTERS} characters, got {text!r:.80}", "stop"
            )
    return strings


def _checked_stop_token_ids(value: object) -> tuple[int, ...]:
    token_ids = _checked_items("stop_token_ids", value, tuple, MAX_STOP_TOKEN_IDS)
    return tuple(_checked_number("stop_token_ids item", token_id, _RANGES["token id"]) for token_id in token_ids)


def _checked_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    pairs = _checked_items("logit_bias", value, dict, MAX_LOGIT_BIASES)
    return tuple(
        sorted(
            (
                _checked_number("logit_bias key", token_id, _RANGES["token id"]),
                _checked_number("logit_bias value", bias),
            )
            for token_id, bias in pairs.items()
        )
    )


def _checked_json_schema(value: object) -> str | None:
    """A schema, a mapping or its text, as text; raises where it is neither, or deeper than any use."""
    if value is None:
        return None
    try:
        schema = json.loads(value) if isinstance(value, (str, bytes)) else value
        text = json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise SamplingError(
            f"json_schema must be a JSON schema, a mapping or its text, got {value!r:.80}", "json_schema"
        ) from None
    if not isinstance(schema, (Mapping, bool)):
        raise SamplingError(
            f"json_schema must be an object, got {text:.80}; write {{'type': 'object', ...}}", "json_schema"
        )
    level: list = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise SamplingError(
            f"json_schema nests more than {MAX_SCHEMA_DEPTH} deep; name its parts under $defs", "json_schema"
        )
    return _checked_text("json_schema", text)


def _checked_text(name: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise SamplingError(f"{name} must be None or text, got {value!r:.80}", name)
    if len(value) > MAX_GRAMMAR_CHARACTERS:
        raise SamplingError(f"{name} has {len(value)} characters, at most {MAX_GRAMMAR_CHARACTERS} are allowed", name)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names, defaults and meaning are vLLM's, but for `max_tokens`.

    Attributes:
        temperature: divides the logits; 0 is greedy (the most likely token, the lowest id on ties), and then top_p,
            top_k and min_p have nothing to do.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum. In (0, 1].
        top_k: keep this many most likely tokens (more where the last ones tie); 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one. In [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output.
        presence_penalty: subtracted from the logits of tokens in the output. In [-2, 2].
        frequency_penalty: subtracted once for every time the token is in the output. In [-2, 2].
        stop: string or strings (at most 16 of 256 characters) that end the text; kept as a tuple.
        stop_token_ids: tokens that end the text, beside the model's own end tokens; kept as a tuple.
        seed: makes the draws repeatable; None or -1 leaves it to the caller of the sampler.
        logprobs: report the log-probability of the chosen token and of this many most likely ones; -1 for all.
        ignore_eos: go on after the model's end tokens.
        max_tokens: tokens to generate at most; None (vLLM: 16) goes on to the end of the context.
        min_tokens: no end token and no `stop_token_ids` before this many tokens.
        logit_bias: added to the logits, `{token id: bias in [-100, 100]}`, at most 1024; kept as sorted pairs.
        skip_special_tokens: leave special tokens out of the text.
        json_schema: the answer is JSON that this schema allows; a mapping or its text, kept as text.
        regex: the answer is matched by this regular expression, from its first to its last character.
        grammar: the answer follows this grammar, in llguidance's form of Lark. One of the three at most; they need the
            extra `[grammar]`.
        grammar_after: text, such as </think>, behind which that begins to hold; None is from the start.

    Raises:
        SamplingError: a value of the wrong type or out of range; the message names parameter, value and range, its
            `parameter` the first.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = ()
    skip_special_tokens: bool = True
    json_schema: Mapping | str | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    grammar_after: str | None = None

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[object], object]] = {
            "stop": _checked_stop,
            "stop_token_ids": _checked_stop_token_ids,
            "logit_bias": _checked_logit_bias,
            "json_schema": _checked_json_schema,
            **{name: partial(_checked_text, name) for name in ("regex", "grammar", "grammar_after")},
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in checks:
                checked = checks[field.name](value)
            elif field.name in _RANGES:
                checked = _checked_number(field.name, value)
            else:
                checked = _checked_flag(field.name, value)
            object.__setattr__(self, field.name, checked)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens must be at most max_tokens, got {self.min_tokens} > {self.max_tokens}; raise max_tokens",
                "min_tokens",
            )
        wanted = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(wanted) > 1:
            raise SamplingError(f"{' and '.join(wanted)} are both given; an answer follows one of them", wanted[1])
        if wanted and self.ignore_eos:
            raise SamplingError(
                f"{wanted[0]} says where an answer ends, and ignore_eos goes on behind it; give one of them",
                "ignore_eos",
            )

    @property
    def wanted_grammar(self) -> tuple[str, str] | None:
        """What an answer has to follow: the name of the parameter that is given, and its text."""
        return next(((name, text) for name in GRAMMARS if (text := getattr(self, name)) is not None), None)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a draw."""
        return self.temperature == 0.0
