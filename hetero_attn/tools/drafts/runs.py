"""Answers with drafts beside plain decoding of the same answer, in turns; every answer is compared with the plain one.

An oracle drafts the answer's own tokens, each right with a set probability, so that the gain of an acceptance can be
seen whatever the model; a twin drafts them where n-grams are right about another model's answer. What was learnt by one
answer is what the next one begins with, as in use; the first turn, which also records passes, is not counted. Each turn
begins with another drafter, so that a machine which becomes faster or slower in the course of it favours none.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from hetero_attn.errors import ArgumentError
from hetero_attn.llm import LLM
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.speculation.oracle import OracleDrafter, TwinDrafter
from hetero_attn.speculation.speculator import NgramDrafter, Speculator
from hetero_attn.tools.drafts.passes import PassTime, ceiling
from placement.cost.drafts import pass_s

PASSAGE = (
    'The "finally" clause is always executed before leaving the "try" statement, whether an exception has occurred or '
    'not. When an exception has occurred in the "try" clause and has not been handled by an "except" clause, it is '
    're-raised after the "finally" clause has been executed.\n\n'
)
# A passage that is asked for once more, a list that models hardly go on with, and prose.
TEXTS = {
    "repeats": 2 * PASSAGE + "The",
    "lists": "The list of names:\n" + "".join(f"    name_{number % 3} = value_{number % 3}\n" for number in range(9)),
    "prose": "When the module was first written nobody had thought of threads, and so",
}
# A likely answer repeats itself; one that is drawn does so seldom.
PARAMS: dict[str, dict[str, Any]] = {
    "repeats": {"temperature": 0.0},
    "lists": {"temperature": 0.0},
    "prose": {"temperature": 0.8, "seed": 0},
}
ORACLE, TWIN = "oracle:", "twin"
Text = tuple[Sequence[int], Sequence[int]]  # a prompt and its answer


@dataclass(frozen=True, slots=True)
class DraftsRow:
    """One text with one drafter, medians over the turns.

    tokens_per_s: of decoding. gain, cpu_gain: wall time and processor time of the plain answer over this one's, turn by
    turn. accepted, wrong: drafts that were right, and passes that ended at a wrong one. acceptance: how likely a draft
    was right, given those before it; None without any. ceiling: the gain that
    passes of the best width would give at that acceptance if drafts cost nothing and came in every pass.
    same_tokens: whether every answer was the plain one, which bf16 and a GPU do not promise to the bit.
    predicted_tokens_per_s: by the plan's times of the very passes that were made; predicted_gain: the same over that of
    plain decoding. passes: by their rows. reason: why the last pass had as many drafts as it had.
    """

    text: str
    drafts: str
    tokens_per_s: float
    gain: float
    cpu_gain: float
    accepted: int
    wrong: int
    acceptance: float | None
    ceiling: float | None
    predicted_tokens_per_s: float
    predicted_gain: float
    passes: dict[int, int]
    reason: str
    same_tokens: bool

    @property
    def prediction_error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_tokens_per_s / self.tokens_per_s - 1

    @property
    def gain_error(self) -> float:
        """The same of the gain over plain decoding in the same turns, which a machine that changes its speed between
        profile and run leaves as it is."""
        return self.predicted_gain / self.gain - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"prediction_error": self.prediction_error, "gain_error": self.gain_error}


@dataclass(frozen=True, slots=True)
class _Turn:
    """One answer: its tokens, seconds of decoding and of processors, what became of its drafts."""

    token_ids: tuple[int, ...]
    wall_s: float
    cpu_s: float
    accepted: int
    wrong: int
    passes: Counter[int]
    reason: str


def acceptance_of(wish: str) -> float | None:
    """The probability that `oracle:0.8` names; None for another way to draft. Raises ArgumentError."""
    if not wish.startswith(ORACLE):
        return None
    try:
        share = float(wish.removeprefix(ORACLE))
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ArgumentError(f"speculate is {wish!r}; an oracle needs a probability from 0 to 1, such as oracle:0.8")
    return share


def measure(
    llm: LLM,
    text: str,
    wishes: Sequence[str],
    times: Sequence[PassTime],
    tokens: int,
    repetitions: int,
    twin: Text | None = None,
) -> list[DraftsRow]:
    """Rows for one of TEXTS: plain decoding, then each wish. times: of the model's passes.

    wishes: ngram, oracle:SHARE, or the model with which `llm` was loaded. twin: another model's text, which is a wish
    too.
    """
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **PARAMS[text])
    prompt = prompt_of(llm, text)
    answer = _turn(llm, prompt, params, None).token_ids
    drafters: dict[str, Speculator | None] = {"plain": None}
    drafters |= {wish: _speculator(llm, wish, answer) for wish in wishes}
    if twin is not None:
        drafters[TWIN] = _twin_speculator(llm, twin, answer)
    turns: dict[str, list[_Turn]] = {name: [] for name in drafters}
    order = [*drafters]
    for counts in range(repetitions + 1):
        for name in order:
            turn = _turn(llm, prompt, params, drafters[name])
            if counts:
                turns[name].append(turn)
        order = [*order[1:], order[0]]
    plain = turns["plain"]
    return [_row(llm, (text, name), (turns[name], plain), times, _step_share(drafters[name])) for name in drafters]


def prompt_of(llm: LLM, text: str) -> str | list[int]:
    """One of TEXTS; without a tokenizer bytes stand for tokens, since speed needs no sense."""
    if llm.tokenizer is not None:
        return TEXTS[text]
    return [each % llm.engine.config.vocab_size for each in TEXTS[text].encode()]


def _speculator(llm: LLM, wish: str, answer: tuple[int, ...]) -> Speculator:
    share = acceptance_of(wish)
    if share is not None:
        vocab_size, seeds = llm.engine.config.vocab_size, count()
        return Speculator(llm.report(), lambda: OracleDrafter(answer, share, vocab_size, next(seeds)))
    if wish in ("ngram", "auto"):
        return Speculator(llm.report(), NgramDrafter)
    loaded = llm._scheduler.speculator
    assert loaded is not None, f"{wish} was not loaded"
    return loaded


def _twin_speculator(llm: LLM, twin: Text, answer: tuple[int, ...]) -> Speculator:
    vocab_size = llm.engine.config.vocab_size
    return Speculator(llm.report(), lambda: TwinDrafter(*twin, answer, vocab_size))


def text_of(llm: LLM, text: str, tokens: int) -> Text:
    """What a model has to one of TEXTS, for another one's twin."""
    prompt, params = prompt_of(llm, text), SamplingParams(max_tokens=tokens, ignore_eos=True, **PARAMS[text])
    output = llm.generate([prompt], params)[0]
    return output.prompt_token_ids, output.token_ids


@contextmanager
def _drafting(llm: LLM, speculator: Speculator | None) -> Iterator[None]:
    """Within this, somebody else drafts, or nobody."""
    before, llm._scheduler.speculator = llm._scheduler.speculator, speculator
    try:
        yield
    finally:
        llm._scheduler.speculator = before


def _turn(llm: LLM, prompt: Any, params: SamplingParams, speculator: Speculator | None) -> _Turn:
    llm.report().reset()
    with _drafting(llm, speculator):
        request = llm.add(prompt, params)
        while not request.token_ids:
            llm.step()
        began = time.process_time()
        while request.finish_reason is None:
            llm.step()
        cpu_s, output = time.process_time() - began, request.output()
    drafts, metrics = llm.report().drafts, output.metrics
    passes = Counter({1 + count: passes for count, passes in drafts.by_count.items()})
    passes[1] += metrics.generated_tokens - 1 - drafts.passes - drafts.accepted
    reason = metrics.drafts_reason
    return _Turn(output.token_ids, metrics.decode_s, cpu_s, drafts.accepted, drafts.wrong, passes, reason)


def _step_share(speculator: Speculator | None) -> float:
    return 0.0 if speculator is None else speculator.step_share


def _row(
    llm: LLM,
    names: tuple[str, str],
    both: tuple[Sequence[_Turn], Sequence[_Turn]],
    times: Sequence[PassTime],
    step_share: float,
) -> DraftsRow:
    (text, name), (turns, plain) = names, both
    made = len(turns[0].token_ids) - 1
    passes = sum((turn.passes for turn in turns), Counter[int]())
    accepted, wrong = sum(turn.accepted for turn in turns), sum(turn.wrong for turn in turns)
    acceptance = accepted / (accepted + wrong) if accepted + wrong else None
    context = len(TEXTS[text]) // (1 if llm.tokenizer is None else 4) + made // 2
    predicted_s = {rows: pass_s(llm.plan, llm.planned.hardware, rows, context) for rows in {1, *passes}}
    drafts_s = step_share * predicted_s[1]  # of each row of a pass that has drafts
    whole_s = sum(count * (predicted_s[rows] + drafts_s * rows * (rows > 1)) for rows, count in passes.items())
    plain_per_s = 1 / predicted_s[1]
    return DraftsRow(
        text=text,
        drafts=name,
        tokens_per_s=made / statistics.median(turn.wall_s for turn in turns),
        gain=statistics.median(other.wall_s / turn.wall_s for turn, other in zip(turns, plain, strict=True)),
        cpu_gain=statistics.median(other.cpu_s / turn.cpu_s for turn, other in zip(turns, plain, strict=True)),
        accepted=accepted,
        wrong=wrong,
        acceptance=acceptance,
        ceiling=None if acceptance is None else ceiling(times, acceptance),
        predicted_tokens_per_s=made * len(turns) / whole_s,
        predicted_gain=made * len(turns) / whole_s / plain_per_s,
        passes=dict(sorted(passes.items())),
        reason=turns[-1].reason,
        same_tokens=all(turn.token_ids == plain[0].token_ids for turn in turns),
    )
