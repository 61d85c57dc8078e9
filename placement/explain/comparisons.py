"""Other plans and other machines beside a plan: more hardware or less, other policies, shapes and engines."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from placement.cost.baselines import everything_bytes, largest_layer_split, layer_split
from placement.cost.model import predict
from placement.cost.objective import long_prompt
from placement.explain.explanation import SAME, SHOWN, Estimate
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import OF_OTHERS
from placement.plan.phase import PhaseCost
from placement.plan.plan import Plan
from placement.plan.units import format_bytes
from placement.plan.workload import Workload
from placement.policy.policy import Policy
from placement.policy.problems import PolicyError
from placement.solve.make_plan import plan_for_figures, predict_plan
from placement.solve.problem import Candidate
from placement.solve.refusals import BudgetError
from placement.solve.request import requested

GIB = 2**30
BASELINE_CHUNK = 512  # rows that llama.cpp computes at a time
# What a machine of estimated rates may lack: a display and other programs in its GPU memory, a second memory channel.
LESS_GPU_BYTES, LESS_DRAM = 2 * GIB, 0.5
SHAPE_WORDS = {"column": "shape column: four hand-overs a layer", "paired": "shape paired: two hand-overs a layer"}
COMPARED_POLICIES = ("gpu_only", "stream_only", "host_attention", "cpu_only")


def _estimate(
    label: str,
    workload: Workload,
    hardware: HardwareProfile,
    policy: Policy,
    device: str,
    gpu_memory_bytes: int | None,
    note: Callable[[Plan], str] = lambda found: "",
) -> Estimate:
    """The best plan under these circumstances. note: what is to be said of it."""
    try:
        asked = requested(workload, hardware, policy, device=device, gpu_memory_bytes=gpu_memory_bytes)
        found = plan_for_figures(asked)
    except BudgetError as error:
        return Estimate(label, None, None, f"needs {format_bytes(error.needed_bytes)}")
    except PolicyError as error:
        return Estimate(label, None, None, error.problems[0])
    decode, prefill = found.predicted.decode.tokens_per_s, found.predicted.prefill.tokens_per_s
    return Estimate(label, decode, prefill, note(found), found.predicted.objective_s)


def losses(workload: Workload, hardware: HardwareProfile, policy: Policy, plan: Plan) -> Iterator[Estimate]:
    """What the plan, and whole layers as other engines have them, would do on a machine whose estimated rates are too
    good: where a part of the model is in DRAM, people see a fraction of what both memories at their best would give."""
    if plan.device != "cuda" or hardware.source == "measured" or hardware.unified_memory or plan.is_all_on_gpu:
        return
    less, budget = hardware.with_less_dram(LESS_DRAM), plan.gpu_memory_bytes - LESS_GPU_BYTES
    try:
        asked = requested(workload, less, policy, device=plan.device, gpu_memory_bytes=max(1, budget))
        slower = plan_for_figures(asked)
    except (BudgetError, PolicyError):
        return
    predicted = slower.predicted
    yield Estimate("planned again", predicted.decode.tokens_per_s, predicted.prefill.tokens_per_s)
    machine = less if less.cores == slower.num_threads else less.with_threads(slower.num_threads)
    yield _whole_layers(slower, machine)


def gains(workload: Workload, hardware: HardwareProfile, policy: Policy, plan: Plan) -> Iterator[Estimate]:
    """The best plans with a little more of what the machine has."""
    device, budget = plan.device, plan.gpu_memory_bytes
    more = policy.model_copy(update={"threads": plan.num_threads + 1})

    traded = partial(_traded, plan, hardware)
    if device != "cpu":
        yield _estimate("1 GiB more GPU memory", workload, hardware, policy, device, budget + GIB, traded)
        faster = replace(
            hardware, h2d_bytes_per_s=2 * hardware.h2d_bytes_per_s, d2h_bytes_per_s=2 * hardware.d2h_bytes_per_s
        )
        yield _estimate("PCIe twice as fast", workload, faster, policy, device, budget, partial(_traded, plan, faster))
    yield _estimate("one more CPU thread", workload, hardware, more, device, budget, traded)


def _traded(plan: Plan, hardware: HardwareProfile, found: Plan) -> str:
    """For what a plan with more of something gave up speed in one of the figures that are shown and gained none in the
    other, or a little in both; empty where it did not. Both are predicted on one machine, that with the faster bus too,
    but for its threads: only the plans differ."""
    before, after = plan.predicted, found.predicted
    pairs = (before.decode, after.decode), (before.prefill, after.prefill)
    ratios = [now.tokens_per_s / then.tokens_per_s for then, now in pairs]
    is_shown = min(ratios) < 1 - SHOWN and max(ratios) < 1 + SHOWN
    if not is_shown and max(ratios) >= 1 - SAME:
        return ""
    rows = long_prompt(plan.workload)
    then, now = (_prompt_tokens_per_s(each, hardware, rows) for each in (plan, found))
    return f"traded for prompts of {rows} tokens ({now / then - 1:+.1%})" if now > then * (1 + SAME) else ""


def _prompt_tokens_per_s(plan: Plan, hardware: HardwareProfile, rows: int) -> float:
    machine = hardware if hardware.cores == plan.num_threads else hardware.with_threads(plan.num_threads)
    on_gpu = plan.device != "cpu"
    return predict(
        plan.workload, plan.linears, plan.kv, machine, phase="prefill", rows=rows, context=0, on_gpu=on_gpu
    ).tokens_per_s


def alternatives(
    workload: Workload, hardware: HardwareProfile, policy: Policy, plan: Plan, found: list[Candidate]
) -> Iterator[Estimate]:
    """What lost: the nearest candidates, whole layers, the other shape, and the shipped policies."""
    machine = hardware if hardware.cores == plan.num_threads else hardware.with_threads(plan.num_threads)

    def slower(other: Plan) -> str:
        return _slower_at(plan, other, hardware)

    for candidate in _nearest(found):
        other = replace(plan, workload=candidate.problem.workload, linears=candidate.linears, kv=candidate.kv)
        predicted = predict_plan(other, machine, by_context=False)
        yield Estimate(
            candidate.label,
            predicted.decode.tokens_per_s,
            predicted.prefill.tokens_per_s,
            slower(replace(other, predicted=predicted)),
            predicted.objective_s,
        )
    yield _whole_layers(plan, machine)
    yield from _other_shape(workload, hardware, policy, plan, slower)
    for name in COMPARED_POLICIES:
        shipped = with_rules_of(name, policy)
        yield _estimate(f"policy {name}", workload, hardware, shipped, plan.device, plan.gpu_memory_bytes, slower)


def _slower_at(plan: Plan, other: Plan, hardware: HardwareProfile) -> str:
    """What a plan that lost is slower at, where the two figures that are shown, rounded, have it faster in one and
    slower in none; empty where they tell."""
    ratios = [
        getattr(other.predicted, phase).tokens_per_s / getattr(plan.predicted, phase).tokens_per_s
        for phase in ("decode", "prefill")
    ]
    if min(ratios) < 1 - SHOWN or max(ratios) < 1 + SHOWN:
        return ""
    rows = long_prompt(plan.workload)
    long = _prompt_tokens_per_s(other, hardware, rows) / _prompt_tokens_per_s(plan, hardware, rows)
    least, what = min((ratios[0], "at decoding"), (long, f"at prompts of {rows} tokens"))
    return f"slower {what} ({least - 1:+.1%})" if least < 1 - SAME else ""


def with_rules_of(name: str, policy: Policy) -> Policy:
    """A shipped policy in the sizes of another, so that its errors name its own file and lines."""
    sizes = {key: getattr(policy, key) for key in Policy.model_fields if key != "rules"}
    return Policy.named(name).model_copy(update=sizes)


def _nearest(found: list[Candidate]) -> list[Candidate]:
    """Of the candidates that lost and that no policy or baseline is, the fastest of each shape, concentrated and
    spread."""
    searched = [candidate for candidate in found[1:] if candidate.spread is not None]
    by_shape = {candidate.concentrated: candidate for candidate in reversed(searched)}
    return sorted(by_shape.values(), key=lambda candidate: candidate.seconds)


def _whole_layers(plan: Plan, hardware: HardwareProfile) -> Estimate:
    """Whole layers on the GPU as llama.cpp has them, and the head where all fit: the rest computes on the CPU, except
    that of a prompt's rows the GPU multiplies all, once the weights have been copied from pageable memory, 512 rows at
    a time and nothing side by side."""
    fixed = sum(plan.memory.gpu.get(kind, 0) for kind in ("activations", "resident", *OF_OTHERS))
    room = plan.gpu_memory_bytes - fixed
    layers, with_head = largest_layer_split(plan.workload, room), everything_bytes(plan.workload) <= room
    workload, decode, prefill = plan.workload, plan.predicted.decode, plan.predicted.prefill
    copies = hardware.h2d_pageable_bytes_per_s or hardware.h2d_bytes_per_s / 2
    one_by_one = replace(hardware, h2d_bytes_per_s=copies, prompt_overlap=1e-9)

    def speed(cost: PhaseCost, machine: HardwareProfile, streams_prompts: bool) -> float:
        linears, kv = layer_split(workload, layers, with_head, streams_prompts)
        shape = replace(workload, prefill_chunk=min(workload.prefill_chunk, BASELINE_CHUNK))
        found = predict(
            shape, linears, kv, machine, phase=cost.phase, rows=cost.rows, context=cost.context, on_gpu=True
        )
        return found.tokens_per_s

    count = f"{layers} whole layer{'' if layers == 1 else 's'}"
    label = "whole layers on the GPU, and the head" if with_head else f"{count} on the GPU, rest CPU"
    return Estimate(label, speed(decode, hardware, False), speed(prefill, one_by_one, True))


def _other_shape(
    workload: Workload, hardware: HardwareProfile, policy: Policy, plan: Plan, note: Callable[[Plan], str]
) -> Iterator[Estimate]:
    """The best plan of the shape that this plan does not have, where the model and the plan allow both."""
    if workload.row_cuts and not plan.workload.elastic:
        shape = "column" if plan.shape == "paired" else "paired"
        other = policy.model_copy(update={"shape": shape})
        yield _estimate(SHAPE_WORDS[shape], workload, hardware, other, plan.device, plan.gpu_memory_bytes, note)
