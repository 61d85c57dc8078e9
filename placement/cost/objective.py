"""What is minimised: the seconds of reference requests, prompts and the tokens generated after them.

Where somebody drafts, tokens are generated in passes of several rows and of one, as placement.plan.drafting mixes them,
and what the drafter takes counts too.

Two requests stand for what people send: one with a short prompt and one with a long one, half of the longest context. A
plan that is best for short prompts only can be several times too slow for long ones, whose rows outweigh every
hand-over.

The model errs. A plan that keeps everything in GPU memory has neither hand-overs nor copies to go wrong, so another one
is taken only where it gains more than that error: seconds are judged with MODEL_ERROR on top of all plans but that one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from placement.cost.model import layers_pass_cost
from placement.cost.tally import KnownCosts
from placement.cost.terms import Call, WeightedCall
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.placed import PlacedLayer, placed_layers
from placement.plan.workload import ROW_TIER_LIMITS, Workload

REFERENCE_PROMPT = 512
# A long prompt counts as much as one of this many tokens, or prompts of 64k would be all that a plan is made for.
LONG_PROMPT_TOKENS = 4096
# The median error of decode over seven plans that an H100 recorded; a test fits and holds it.
MODEL_ERROR = 0.05


class Requests(NamedTuple):
    """What one unit of the objective is made of: decode steps, and how often each prompt is read."""

    decode_steps: int
    short_prompts: float
    long_prompts: float


REQUESTS = {
    "latency": Requests(128, 1.0, 1.0),
    "throughput": Requests(128, 1.0, 1.0),
    "prefill": Requests(16, 2.0, 2.0),
}


def judged_s(seconds: float, all_on_gpu: bool) -> float:
    """The seconds by which plans are compared."""
    return seconds if all_on_gpu else seconds * (1 + MODEL_ERROR)


def reference_batch(workload: Workload, objective: str) -> int:
    """Sequences decoded together: max_batch for throughput, else one."""
    return workload.max_batch if objective == "throughput" else 1


def reference_context(workload: Workload, batch: int = 1) -> int:
    """Cached tokens of each sequence in a reference decode step: half of the longest context, the mean over a sequence
    that fills it, or what the cache holds for each of `batch`."""
    return max(1, min(workload.max_context // 2, workload.full_tokens // batch))


def reference_prompt(workload: Workload) -> int:
    """Tokens of the short reference prompt."""
    return max(1, min(REFERENCE_PROMPT, workload.max_context // 2))


def long_prompt(workload: Workload) -> int:
    """Tokens of the long reference prompt: half of the longest context."""
    return max(1, workload.max_context // 2)


def reference_calls(workload: Workload, objective: str) -> list[WeightedCall]:
    """Passes of the reference requests with their counts: those that generate, the chunks of both prompts.

    Under `throughput` every sequence of the batch brings its prompts.
    """
    requests, batch = REQUESTS[objective], reference_batch(workload, objective)
    steps = max(1, min(requests.decode_steps, workload.max_context // 2))
    short, long = reference_prompt(workload), long_prompt(workload)
    share = requests.long_prompts * min(1.0, LONG_PROMPT_TOKENS / long)
    return [
        *_generating_calls(workload, batch, steps),
        *_merged(
            _prompt_calls(workload, short, batch * requests.short_prompts)
            + _prompt_calls(workload, long, batch * share)
        ),
    ]


def _generating_calls(workload: Workload, batch: int, tokens: int) -> list[WeightedCall]:
    """Passes that generate so many tokens of each sequence: one row each, or with drafts in some."""
    drafting, plain = workload.drafting, Call(batch, 1, reference_context(workload, batch))
    if drafting is None:
        return [WeightedCall(plain, tokens)]
    passes, verify = tokens / drafting.tokens, replace(plain, drafts=drafting.rows - 1)
    both = [
        WeightedCall(verify, passes * drafting.share, beside_s=batch * drafting.drafts_s),
        WeightedCall(plain, passes * (1.0 - drafting.share)),
    ]
    return [weighted for weighted in both if weighted.weight]


def _prompt_calls(workload: Workload, prompt: int, weight: float) -> list[WeightedCall]:
    """A prompt's chunks; those before the last are represented by the middle one."""
    chunk = workload.prefill_chunk
    drafting = workload.drafting
    row_s = drafting.prompt_row_s if drafting and drafting.rows > 1 else 0.0
    before = (prompt - 1) // chunk
    last = prompt - before * chunk
    calls = [WeightedCall(Call(1, last, before * chunk), weight, beside_s=last * row_s)]
    if before:
        middle = Call(1, chunk, (before - 1) * chunk // 2)
        calls.append(WeightedCall(middle, before * weight, with_head=False, beside_s=chunk * row_s))
    return calls


def _merged(calls: list[WeightedCall]) -> list[WeightedCall]:
    """Equal passes as one, which counts as often as they do together."""
    weights: dict[WeightedCall, float] = {}
    for weighted in calls:
        key = replace(weighted, weight=0.0)
        weights[key] = weights.get(key, 0.0) + weighted.weight
    return [replace(key, weight=weight) for key, weight in weights.items()]


def tier_call(workload: Workload, tier: int) -> WeightedCall:
    """A pass for a row tier that no reference call uses."""
    rows = (*ROW_TIER_LIMITS, max(workload.prefill_chunk, ROW_TIER_LIMITS[-1] + 1))[tier]
    return WeightedCall(Call(rows, 1, max(1, min(reference_context(workload), workload.full_tokens // rows))), 1.0)


def objective_s(
    workload: Workload,
    linears: Sequence[LinearPlacement],
    kv: Sequence[KvPlacement],
    hardware: HardwareProfile,
    calls: Sequence[WeightedCall],
    on_gpu: bool,
) -> float:
    """Seconds of the reference request under a placement."""
    return layers_objective_s(workload, placed_layers(workload, linears, kv), hardware, calls, on_gpu)


def layers_objective_s(
    workload: Workload,
    layers: Sequence[PlacedLayer],
    hardware: HardwareProfile,
    calls: Sequence[WeightedCall],
    on_gpu: bool,
    costs: KnownCosts | None = None,
) -> float:
    """`objective_s` of a placement whose different layers are known. costs: as for `layers_pass_cost`."""
    return sum(
        weighted.weight
        * (
            layers_pass_cost(workload, layers, hardware, weighted.call, on_gpu, weighted.with_head, costs).seconds
            + weighted.beside_s
        )
        for weighted in calls
    )
