"""Why a plan is as fast as it is: the bottleneck, what would help, and what was considered and rejected."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpu_kernels.formats import segments
from placement.cost.baselines import largest_layer_split, layer_split
from placement.cost.model import predict
from placement.cost.objective import MODEL_ERROR
from placement.machine.hardware import HardwareProfile
from placement.plan.phase import RESOURCE_WORDS, PhaseCost
from placement.plan.plan import Plan
from placement.plan.units import format_bytes
from placement.plan.workload import Workload
from placement.policy.policy import Policy
from placement.policy.problems import PolicyError
from placement.solve.make_plan import BudgetError, make_plan, plan_with_alternatives, predict_plan
from placement.solve.search import Candidate

GIB = 2**30
SAME = 1e-3  # what the search may miss
BASELINE_CHUNK = 512  # rows that llama.cpp computes at a time
LABEL_COLUMNS = 38
# What a machine of estimated rates may lack: a display and other programs in its GPU memory, a second memory channel.
LESS_GPU_BYTES, LESS_DRAM = 2 * GIB, 0.5
LESS_WORDS = "should other programs hold 2 GiB of GPU memory, and DRAM have half its rate (one channel of two)"
SHAPE_WORDS = {"column": "shape column: four hand-overs a layer", "paired": "shape paired: two hand-overs a layer"}
COMPARED_POLICIES = ("gpu_only", "stream_only", "host_attention", "cpu_only")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted speed of another plan or another machine.

    decode_tokens_per_s, prefill_tokens_per_s: None when it cannot run; note then says why. objective_s: the seconds
    that its plan was chosen by, None for what is no plan of ours.
    """

    label: str
    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    note: str = ""
    objective_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "label": self.label,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan with its bottleneck sentences, the value of more hardware, and the nearest rejected alternatives."""

    plan: Plan
    bottleneck: str
    gains: tuple[Estimate, ...]
    losses: tuple[Estimate, ...]
    alternatives: tuple[Estimate, ...]
    notes: tuple[str, ...]

    @property
    def within_error(self) -> tuple[Estimate, ...]:
        """Alternatives that the model takes for faster, by less than its own error: the simpler plan was chosen."""
        return tuple(other for other in self.alternatives if self._is_faster(other))

    def _is_faster(self, other: Estimate) -> bool:
        return other.objective_s is not None and other.objective_s < self.plan.predicted.objective_s * (1 - SAME)

    def lines(self) -> list[str]:
        """The explanation as text, one line each, no row of a table wider than 80 columns."""
        lines = [self.bottleneck, *self.notes]
        beaten = [other for other in self.alternatives if not self._is_faster(other)]
        for title, estimates in (
            ("what more hardware would bring, planned again", self.gains),
            (LESS_WORDS, self.losses),
            ("alternatives that were weighed and rejected", beaten),
            (f"faster by less than the model's own error of {MODEL_ERROR:.0%}, so not taken", self.within_error),
        ):
            if estimates:
                lines.append(f"{title} (tokens/s):")
                lines.append(f"  {'':{LABEL_COLUMNS}s}{'decode':>9s} {'':8s}{'prefill':>11s}")
                lines += [line for estimate in estimates for line in self._row(estimate)]
        return lines

    def _row(self, estimate: Estimate) -> list[str]:
        """An estimate as a row of a table; what its label is too long for goes before it."""
        *before, label = textwrap.wrap(estimate.label, LABEL_COLUMNS)
        decode, prefill = estimate.decode_tokens_per_s, estimate.prefill_tokens_per_s
        if decode is None or prefill is None:
            figures = f"  {estimate.note}"
        else:
            planned = self.plan.predicted
            changes = [
                _difference(value / cost.tokens_per_s)
                for value, cost in ((decode, planned.decode), (prefill, planned.prefill))
            ]
            figures = f"{decode:9.1f} {changes[0]:8s}{prefill:11.1f} {changes[1]}".rstrip()
        return [*(f"  {part}" for part in before), f"  {label:{LABEL_COLUMNS}s}{figures}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: those of the plan, and beside them why."""
        return self.plan.to_dict() | {
            "bottleneck": self.bottleneck,
            "notes": list(self.notes),
            "gains": [gain.to_dict() for gain in self.gains],
            "losses": [loss.to_dict() for loss in self.losses],
            "alternatives": [other.to_dict() for other in self.alternatives],
        }


def explain(
    workload: Workload, hardware: HardwareProfile, policy: Policy, *, device: str, gpu_memory_bytes: int | None = None
) -> Explanation:
    """Plan and explain: arguments and errors of make_plan, and several times its time, for it plans several times."""
    plan, found = plan_with_alternatives(workload, hardware, policy, device=device, gpu_memory_bytes=gpu_memory_bytes)
    gains = tuple(_gains(workload, hardware, policy, plan))
    losses = tuple(_losses(workload, hardware, policy, plan))
    alternatives = () if device == "cpu" else tuple(_alternatives(workload, hardware, policy, plan, found))
    return Explanation(
        plan,
        bottleneck(plan.predicted.decode, plan.predicted.prefill),
        gains,
        losses,
        alternatives,
        tuple(_notes(plan, hardware, policy)),
    )


def budget_curve(
    workload: Workload,
    hardware: HardwareProfile,
    policy: Policy,
    *,
    device: str,
    steps: int = 12,
    watched: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[Plan]:
    """Plans for GPU budgets from the least that works to everything the model can use, in equal steps.

    watched: what the budgets are passed through, such as a progress bar; a large model takes seconds for each.
    """
    try:
        make_plan(workload, hardware, policy, device=device, gpu_memory_bytes=1)
        return []
    except BudgetError as error:
        least = error.needed_bytes
    most = _everything_bytes(workload, hardware, policy, device)
    budgets = [least + (most - least) * step // steps for step in range(steps + 1)]
    return [
        make_plan(workload, hardware, policy, device=device, gpu_memory_bytes=budget) for budget in watched(budgets)
    ]


def bottleneck(decode: PhaseCost, prefill: PhaseCost) -> str:
    """Both phases in one sentence: what decides the time and how busy the other resources are."""
    return f"Decoding is bound by {_busy(decode)}; prefill is bound by {_busy(prefill)}."


def _busy(cost: PhaseCost) -> str:
    """The binding resource, and how much of the time it and the others are at work."""
    terms, idle = dict(cost.terms), cost.slack
    shares = {name: 1 - share for name, share in idle.items() if name != cost.binding and share < 0.995}
    if cost.binding == "python":
        own = f"{terms['step'] / cost.seconds:.0%} of the time"
    elif cost.binding == "steps":
        own = f"hand-overs alone {terms.get('handovers', 0.0) / cost.seconds:.0%} of the time"
    else:
        own = f"{1 - idle[cost.binding]:.0%} busy"
    others = ", ".join(f"{RESOURCE_WORDS[name]} {share:.0%}" for name, share in shares.items())
    return f"{RESOURCE_WORDS[cost.binding]} ({own}{'; ' + others if others else ''})"


def _everything_bytes(workload: Workload, hardware: HardwareProfile, policy: Policy, device: str) -> int:
    everything = _with_rules_of("gpu_only", policy)
    return make_plan(workload, hardware, everything, device=device, gpu_memory_bytes=2**60).memory.gpu_bytes


def _estimate(
    label: str, workload: Workload, hardware: HardwareProfile, policy: Policy, device: str, gpu_memory_bytes: int | None
) -> Estimate:
    try:
        predicted = make_plan(workload, hardware, policy, device=device, gpu_memory_bytes=gpu_memory_bytes).predicted
    except BudgetError as error:
        return Estimate(label, None, None, f"needs {format_bytes(error.needed_bytes)}")
    except PolicyError as error:
        return Estimate(label, None, None, error.problems[0])
    return Estimate(
        label, predicted.decode.tokens_per_s, predicted.prefill.tokens_per_s, objective_s=predicted.objective_s
    )


def _losses(workload: Workload, hardware: HardwareProfile, policy: Policy, plan: Plan) -> Iterator[Estimate]:
    """What the plan, and whole layers as other engines have them, would do on a machine whose estimated rates are too
    good: where a part of the model is in DRAM, people see a fraction of what both memories at their best would give."""
    if plan.device != "cuda" or hardware.source == "measured" or hardware.unified_memory or plan.is_all_on_gpu:
        return
    less, budget = hardware.with_less_dram(LESS_DRAM), plan.gpu_memory_bytes - LESS_GPU_BYTES
    try:
        slower = make_plan(workload, less, policy, device=plan.device, gpu_memory_bytes=max(1, budget))
    except (BudgetError, PolicyError):
        return
    predicted = slower.predicted
    yield Estimate("planned again", predicted.decode.tokens_per_s, predicted.prefill.tokens_per_s)
    machine = less if less.cores == slower.num_threads else less.with_threads(slower.num_threads)
    yield _whole_layers(slower, machine)


def _gains(workload: Workload, hardware: HardwareProfile, policy: Policy, plan: Plan) -> Iterator[Estimate]:
    device, budget = plan.device, plan.gpu_memory_bytes
    more = policy.model_copy(update={"threads": plan.num_threads + 1})
    if device != "cpu":
        yield _estimate("1 GiB more GPU memory", workload, hardware, policy, device, budget + GIB)
        faster = replace(
            hardware, h2d_bytes_per_s=2 * hardware.h2d_bytes_per_s, d2h_bytes_per_s=2 * hardware.d2h_bytes_per_s
        )
        yield _estimate("PCIe twice as fast", workload, faster, policy, device, budget)
    yield _estimate("one more CPU thread", workload, hardware, more, device, budget)


def _alternatives(
    workload: Workload, hardware: HardwareProfile, policy: Policy, plan: Plan, found: list[Candidate]
) -> Iterator[Estimate]:
    machine = hardware if hardware.cores == plan.num_threads else hardware.with_threads(plan.num_threads)
    for candidate in _nearest(found):
        other = replace(plan, workload=candidate.problem.workload, linears=candidate.linears, kv=candidate.kv)
        predicted = predict_plan(other, machine)
        yield Estimate(
            candidate.label,
            predicted.decode.tokens_per_s,
            predicted.prefill.tokens_per_s,
            objective_s=predicted.objective_s,
        )
    yield _whole_layers(plan, machine)
    yield from _other_shape(workload, hardware, policy, plan)
    for name in COMPARED_POLICIES:
        shipped = _with_rules_of(name, policy)
        yield _estimate(f"policy {name}", workload, hardware, shipped, plan.device, plan.gpu_memory_bytes)


def _with_rules_of(name: str, policy: Policy) -> Policy:
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
    """Whole layers on the GPU as llama.cpp has them: the rest computes on the CPU, except that of a prompt's rows the
    GPU multiplies all, once the weights have been copied from pageable memory, 512 rows at a time and nothing side by
    side."""
    fixed = sum(plan.memory.gpu[kind] for kind in ("activations", "resident", "context"))
    layers = largest_layer_split(plan.workload, plan.gpu_memory_bytes - fixed)
    workload, decode, prefill = plan.workload, plan.predicted.decode, plan.predicted.prefill
    copies = hardware.h2d_pageable_bytes_per_s or hardware.h2d_bytes_per_s / 2
    one_by_one = replace(hardware, h2d_bytes_per_s=copies, prompt_overlap=1e-9)

    def speed(cost: PhaseCost, machine: HardwareProfile, streams_prompts: bool) -> float:
        linears, kv = layer_split(workload, layers, streams_prompts=streams_prompts)
        shape = replace(workload, prefill_chunk=min(workload.prefill_chunk, BASELINE_CHUNK))
        sizes = {"rows": cost.rows, "context": cost.context}
        return predict(shape, linears, kv, machine, phase=cost.phase, on_gpu=True, **sizes).tokens_per_s

    label = f"{layers} whole layers on the GPU, rest CPU"
    return Estimate(label, speed(decode, hardware, False), speed(prefill, one_by_one, True))


def _other_shape(workload: Workload, hardware: HardwareProfile, policy: Policy, plan: Plan) -> Iterator[Estimate]:
    """The best plan of the shape that this plan does not have, where the model and the plan allow both."""
    if workload.row_cuts and not plan.workload.elastic:
        shape = "column" if plan.shape == "paired" else "paired"
        other = policy.model_copy(update={"shape": shape})
        yield _estimate(SHAPE_WORDS[shape], workload, hardware, other, plan.device, plan.gpu_memory_bytes)


def _notes(plan: Plan, hardware: HardwareProfile, policy: Policy) -> Iterator[str]:
    if plan.shape == "paired":
        yield (
            "The shape is paired: o and down are cut beside the heads and neurons before them, two hand-overs a layer."
        )
    if plan.device == "emulated":
        yield "This GPU is emulated with invented rates: the figures show how plans behave, they predict no GPU."
    elif hardware.source != "measured":
        yield f"The rates of {hardware.name} are {hardware.source} (`hetero-attn profile` measures this machine's)."
    if plan.device == "cuda" and not hardware.streams_in_decode and plan.memory.pinned_bytes:
        yield (
            f"Decode streams no weights unless a rule says so: that it brings more than it takes from the CPU lane's "
            f"reads of DRAM was not measured on {hardware.name}."
        )
    if hardware.is_of_a_busy_machine:
        yield (
            f"Other programs used {hardware.busy_share:.0%} of the CPUs while {hardware.name} was measured: it may be "
            "faster than predicted (`hetero-attn profile` measures it again)."
        )
    if plan.device != "cpu" and plan.is_all_on_gpu and not policy.rules:
        yield (
            f"Everything is in GPU memory: a share for the CPU lane would gain less than the model's own error of "
            f"{MODEL_ERROR:.0%}, if anything."
        )
    yield from _borrowed_rates(plan.workload, hardware)
    host = plan.memory.host_bytes + plan.memory.pinned_bytes
    if host > hardware.dram_bytes:
        has = format_bytes(hardware.dram_bytes)
        yield f"The plan needs {format_bytes(host)} of host memory; {hardware.name} has {has}."
    if plan.gpu_memory_bytes is not None and plan.gpu_memory_bytes > hardware.gpu_memory_bytes:
        has = format_bytes(hardware.gpu_memory_bytes)
        yield f"The GPU budget of {format_bytes(plan.gpu_memory_bytes)} is more than the {has} of {hardware.name}."


def _borrowed_rates(workload: Workload, hardware: HardwareProfile) -> Iterator[str]:
    """Which formats of the weights the profile has not met, and whose rates are taken."""
    names = dict.fromkeys(
        segment.format.name
        for shard in workload.linears
        for segment in segments(workload.format_of(shard), shard.in_features)
    )
    borrowed = hardware.cpu_linear_bytes_per_s.borrowed(names)
    if borrowed:
        pairs = ", ".join(f"{name} by those of {measured}" for name, measured in borrowed.items())
        yield f"{hardware.name} has no rates of some formats of these weights; planned are {pairs}."


def _difference(ratio: float) -> str:
    return "(same)" if abs(ratio - 1) < 0.005 else f"({ratio - 1:+.0%})"
