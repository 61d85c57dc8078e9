"""What is minimised: the seconds of a reference request, a prompt and the tokens generated after it."""

from collections.abc import Sequence

from placement.cost.model import pass_cost
from placement.cost.terms import Call, WeightedCall
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.workload import ROW_TIER_LIMITS, Workload

REFERENCE_PROMPT = 512
REFERENCE_OUTPUT = 128


def reference_batch(workload: Workload, objective: str) -> int:
    """Sequences decoded together: one for latency, max_batch for throughput."""
    return workload.max_batch if objective == "throughput" else 1


def reference_context(workload: Workload, batch: int = 1) -> int:
    """Cached tokens of each sequence in a reference decode step: half of the longest context, the mean over a sequence
    that fills it, or what the cache holds for each of `batch`."""
    return max(1, min(workload.max_context // 2, workload.full_tokens // batch))


def reference_prompt(workload: Workload) -> int:
    """Tokens of the reference prompt."""
    return max(1, min(REFERENCE_PROMPT, workload.max_context // 2))


def reference_calls(workload: Workload, objective: str) -> list[WeightedCall]:
    """Passes of the reference request with their counts: decode steps, the chunks of the prompt, its last chunk.

    Chunks before the last are represented by the middle one; under `throughput` every sequence of the batch brings a
    prompt.
    """
    batch, prompt, chunk = reference_batch(workload, objective), reference_prompt(workload), workload.prefill_chunk
    steps = max(1, min(REFERENCE_OUTPUT, workload.max_context // 2))
    calls = [WeightedCall(Call(batch, 1, reference_context(workload, batch)), steps)]
    before = (prompt - 1) // chunk
    if before:
        middle = (before - 1) * chunk // 2
        calls.append(WeightedCall(Call(1, chunk, middle), before * batch, with_head=False))
    calls.append(WeightedCall(Call(1, prompt - before * chunk, before * chunk), batch))
    return calls


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
    return sum(
        weighted.weight * pass_cost(workload, linears, kv, hardware, weighted.call, on_gpu, weighted.with_head).seconds
        for weighted in calls
    )
