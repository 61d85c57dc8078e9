"""Does a plan fit the machine that it is for, and if not, which smaller wishes would."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from hetero_attn.errors import ConfigError, MemoryBudgetError
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import Asked, PlannedModel, ask, settle
from placement.plan.units import format_bytes
from placement.policy.policy import Policy

# From the largest to the smallest, weights and cache.
SMALLER_DTYPES = ("bf16", "q8", "q4")
SMALLER_KV_DTYPES = ("bf16", "q8", "q4")
ARGUMENTS = {"dtype": "dtype", "kv-dtype": "kv_dtype", "batch": "max_batch", "context": "max_context"}
LEAST_CONTEXT = 1024
MOST_WAYS = 3
CONTEXT = "--context"
WITHOUT_BUDGET = "no --gpu-memory"

Settle = Callable[[LoadOptions], PlannedModel]


def why_not_fitting(planned: PlannedModel, machine: str = "") -> str:
    """Why the machine of a plan's profile cannot hold it and what drafts for it, in plain words; empty where it can.

    machine: what it is called; as the profile is where that is not said.
    """
    plan, workload, hardware = planned.plan, planned.plan.workload, planned.hardware
    machine = machine or hardware.name
    beside = " with the drafter" if workload.drafter_host_bytes else ""
    needed = plan.memory.host_bytes + plan.memory.pinned_bytes
    if needed > hardware.dram_bytes:
        has = format_bytes(hardware.dram_bytes)
        return f"needs {format_bytes(needed)} of host memory{beside}; {machine} has {has}"
    budget = plan.gpu_memory_bytes or 0
    if plan.device == "cuda" and budget > hardware.gpu_memory_bytes:
        has = format_bytes(hardware.gpu_memory_bytes)
        return f"the GPU budget is {format_bytes(budget)}; {machine} has {has}"
    return ""


def settle_or_suggest(wishes: LoadOptions, asked: Asked | None = None) -> PlannedModel:
    """As `settle`; where no plan fits the budget, the MemoryBudgetError names arguments of `LLM` that would."""
    try:
        return settle(wishes, asked)
    except MemoryBudgetError as error:
        raise MemoryBudgetError(f"{error}; {as_arguments(would_fit(wishes))}") from None


def as_arguments(suggestion: str) -> str:
    """Options of the command line, such as `--kv-dtype q8`, as arguments of `LLM`: `kv_dtype=q8`."""
    named = re.sub(r"--([a-z-]+) (\w+)", lambda found: f"{ARGUMENTS[found[1]]}={found[2]}", suggestion)
    return named.replace(WITHOUT_BUDGET, "no gpu_memory")


def settle_unless_too_large(wishes: LoadOptions, asked: Asked | None = None) -> PlannedModel:
    """As `settle`; MemoryBudgetError for weights that no plan can hold, without a search for one."""
    asked = asked or ask(wishes)
    if asked.is_too_large:
        raise MemoryBudgetError("GPU and host memory together are less than the weights")
    return settle(wishes, asked)


def would_fit(wishes: LoadOptions, settled: Settle = settle_unless_too_large) -> str:
    """What would fit, as part of a sentence. settled: how wishes are planned."""
    ways = ways_to_fit(wishes, settled)
    return f"would fit with {', or '.join(ways)}" if ways else "no smaller dtype, cache, context or batch would fit"


def ways_to_fit(wishes: LoadOptions, settled: Settle = settle_unless_too_large) -> list[str]:
    """Options of the command line with which the model would fit, the least sacrifice first; empty when none does.

    One wish is made smaller at a time, and all together where one is not enough, but for those that need not be. Of
    contexts the longest is named.
    """
    found: list[str] = []
    for option, smaller in _smaller_wishes(wishes):
        is_context = option.startswith(CONTEXT)
        if not (is_context and any(way.startswith(CONTEXT) for way in found)) and _fits(smaller, settled):
            found.append(option)
    least = {} if found else _least_that_fit(wishes, settled)
    if least:
        return [" ".join(f"--{option} {value}" for option, value in least.items()) + " together" * (len(least) > 1)]
    return found[:MOST_WAYS]


def _least_that_fit(wishes: LoadOptions, settled: Settle) -> dict[str, Any]:
    """Options that fit at their least together, without those that may stay as they are; empty where none do."""

    def fit(options: dict[str, Any]) -> bool:
        return _fits(replace(wishes, **{ARGUMENTS[option]: value for option, value in options.items()}), settled)

    least = _least(wishes)
    if not (least and fit(least)):
        return {}
    for option in reversed([*least]):
        others = {name: value for name, value in least.items() if name != option}
        least = others if len(others) > 1 and fit(others) else least
    return least


def _least(wishes: LoadOptions) -> dict[str, Any]:
    """Every option at its least, but for those that are not above it already."""
    policy = wishes.policy if isinstance(wishes.policy, Policy) else Policy.load(wishes.policy)
    context = wishes.max_context or policy.context
    above = {
        "dtype": ("q4", wishes.dtype != "q4"),
        "kv-dtype": ("q4", "q4" not in (wishes.kv_dtype, policy.kv_dtype)),
        "batch": (1, _is_many(wishes, policy)),
        "context": (LEAST_CONTEXT, context is None or context > LEAST_CONTEXT),
    }
    return {option: value for option, (value, is_above) in above.items() if is_above}


def _is_many(wishes: LoadOptions, policy: Policy) -> bool:
    """Whether more than one sequence is planned for: as many as were asked for, else one unless throughput counts."""
    asked_for = wishes.max_batch or policy.batch
    return policy.objective == "throughput" if asked_for is None else asked_for > 1


def _smaller_wishes(wishes: LoadOptions) -> Iterator[tuple[str, LoadOptions]]:
    """The wishes with one made smaller, and its option."""
    if (wishes.max_batch or 1) > 1:
        yield "--batch 1", replace(wishes, max_batch=1)
    for kv_dtype in _below(wishes.kv_dtype, SMALLER_KV_DTYPES):
        yield f"--kv-dtype {kv_dtype}", replace(wishes, kv_dtype=kv_dtype)
    context = wishes.max_context or 0
    while context // 2 >= LEAST_CONTEXT:
        context //= 2
        yield f"{CONTEXT} {context}", replace(wishes, max_context=context)
    for dtype in _below(wishes.dtype, SMALLER_DTYPES):
        yield f"--dtype {dtype}", replace(wishes, dtype=dtype)
    if wishes.gpu_memory is not None:
        yield WITHOUT_BUDGET, replace(wishes, gpu_memory=None)


def _below(dtype: str, order: tuple[str, ...]) -> tuple[str, ...]:
    """The dtypes that take less than one; `auto` and fp16 are taken for bf16."""
    return order[order.index(dtype) + 1 :] if dtype in order else order[1 if dtype in ("auto", "fp16") else 0 :]


def _fits(wishes: LoadOptions, settled: Settle) -> bool:
    try:
        return not why_not_fitting(settled(wishes))
    except (MemoryBudgetError, ConfigError):  # the latter where the model was made for fewer positions
        return False
