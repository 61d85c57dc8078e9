"""From workload, hardware and policy to a plan: pure and deterministic."""

from collections.abc import Sequence
from dataclasses import replace

from placement.constraints import Bounds, KvBounds, LinearBounds, bind
from placement.cost import cpu_linear_s_per_unit, gpu_linear_s_per_unit, predict
from placement.hardware import HardwareProfile
from placement.memory import KvPlacement, LinearPlacement, MemoryReport, kv_gpu_bytes, staging_piece_units
from placement.plan import DEVICES, Plan, Prediction, build_plan
from placement.policy import Policy
from placement.units import format_bytes
from placement.workload import NUM_ROW_TIERS, ROW_TIER_LIMITS, LinearShard, Workload

DEFAULT_STAGING_SLOTS = 4
REFERENCE_PROMPT = 512


class BudgetError(ValueError):
    """A memory budget that no plan can meet. needed_bytes: the smallest budget that works; budget_bytes: what was given."""

    def __init__(self, message: str, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


def make_plan(workload: Workload, hardware: HardwareProfile, policy: Policy, *, device: str,
              gpu_memory_bytes: int | None = None) -> Plan:
    """Choose what lives and runs where.

    device: cpu | cuda | emulated. gpu_memory_bytes: the GPU budget; None takes the policy's, then the profile's.
    Raises PolicyError when a rule cannot be met and BudgetError, with the smallest size that works, for a budget too small.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device != "cpu" and not hardware.has_gpu:
        raise ValueError(f"device {device} needs a hardware profile with a GPU; {hardware.name} has none")
    workload = resolved_workload(workload, policy)
    bounds = bind(policy, workload, device)
    threads = policy.threads or hardware.cores
    machine = hardware if threads == hardware.cores else hardware.with_threads(threads)
    budget = None
    if device != "cpu":
        budget = gpu_memory_bytes or policy.gpu_memory or hardware.gpu_memory_bytes
    linears, kv = _greedy(workload, machine, policy, bounds, device, budget)
    slots = policy.staging_slots if policy.staging_slots is not None else DEFAULT_STAGING_SLOTS
    plan = build_plan(workload, linears, kv, device=device, gpu_memory_bytes=budget, staging_slots=slots,
                      num_threads=threads, context_bytes=machine.gpu_context_bytes if device == "cuda" else 0,
                      objective=policy.objective)
    _check_budgets(plan, policy)
    return replace(plan, predicted=predict_plan(plan, machine))


def resolved_workload(workload: Workload, policy: Policy) -> Workload:
    """The workload with the policy's context, batch and prefill chunk. A context beyond the model's is the caller's check."""
    return replace(workload, max_context=policy.context or workload.max_context, max_batch=policy.batch or workload.max_batch,
                   prefill_chunk=policy.prefill_chunk or workload.prefill_chunk)


def reference_calls(workload: Workload, objective: str) -> tuple[int, int, int]:
    """(sequences decoded together, their context, prompt tokens) for which a plan is optimised.

    latency: one sequence; throughput: max_batch of them; at half of the longest context, the mean over a full one.
    """
    rows = workload.max_batch if objective == "throughput" else 1
    return rows, max(1, workload.max_context // 2), max(1, min(REFERENCE_PROMPT, workload.max_context // 2))


def predict_plan(plan: Plan, hardware: HardwareProfile) -> Prediction:
    """Predicted cost of both phases at the reference calls, and of decoding along the context."""
    rows, context, prompt = reference_calls(plan.workload, plan.objective)
    on_gpu = plan.device != "cpu"

    def cost(phase: str, count: int, cached: int):
        return predict(plan.workload, plan.linears, plan.kv, hardware, phase=phase, rows=count, context=cached, on_gpu=on_gpu)

    decode, prefill = cost("decode", rows, context), cost("prefill", prompt, 0)
    contexts = sorted({min(plan.max_context, step) for step in (128, 512, 2048, 8192, 32768, 131072)} | {plan.max_context})
    return Prediction(hardware.name, plan.objective, decode.seconds, decode, prefill,
                      tuple(cost("decode", rows, context) for context in contexts))


def _check_budgets(plan: Plan, policy: Policy) -> None:
    if plan.gpu_memory_bytes is not None:
        _check_budget("gpu_memory", plan.memory.gpu, plan.gpu_memory_bytes, plan.memory)
    if policy.pinned_memory is not None:
        _check_budget("pinned_memory", plan.memory.pinned, policy.pinned_memory, plan.memory)
    if policy.host_memory is not None:
        _check_budget("host_memory", plan.memory.host, policy.host_memory, plan.memory)


def _check_budget(name: str, kinds: dict[str, int], budget: int, memory: MemoryReport) -> None:
    needed = sum(kinds.values())
    if needed > budget:
        parts = " + ".join(f"{kind} {format_bytes(size)}" for kind, size in kinds.items() if size)
        raise BudgetError(f"{name}: needs {format_bytes(needed)} ({needed} bytes: {parts}), the budget is "
                          f"{format_bytes(budget)}; the smallest budget that works is {needed} bytes", needed, budget)


def _greedy(workload: Workload, hardware: HardwareProfile, policy: Policy, bounds: Bounds, device: str,
            budget: int | None) -> tuple[list[LinearPlacement], list[KvPlacement]]:
    context = hardware.gpu_context_bytes if device == "cuda" else 0
    left = (budget or 0) - workload.activation_bytes_per_row * workload.activation_rows - workload.resident_bytes - context
    may_stream = policy.staging_slots != 0
    slots = policy.staging_slots if policy.staging_slots is not None else DEFAULT_STAGING_SLOTS
    everything = workload.weight_bytes + sum(k.groups * k.bytes_per_token for k in workload.kv) * workload.full_tokens
    if device == "cpu":
        may_stream, left = False, 0
    elif everything <= left:
        may_stream = False
    staging = slots * max(min(s.units, staging_piece_units(s)) * s.unit_bytes for s in workload.linears) if may_stream else 0
    may_stream = may_stream and staging <= left
    left -= staging if may_stream else 0
    kv, homes = [], {}
    for shard, bound in zip(workload.kv, bounds.kv, strict=True):
        placement = _greedy_kv(workload, shard, bound, left if everything > left else None)
        left -= kv_gpu_bytes(shard, placement, workload.page_size)
        kv.append(placement)
        for linear, limits in zip(workload.linears, bounds.linears, strict=True):
            if linear.layer == shard.layer:
                homes[linear.name] = _greedy_home(linear, limits, left)
                left -= homes[linear.name] * linear.unit_bytes
    linears = []
    for shard, limits in zip(workload.linears, bounds.linears, strict=True):
        if shard.name not in homes:
            homes[shard.name] = _greedy_home(shard, limits, left)
            left -= homes[shard.name] * shard.unit_bytes
        stream = tuple(_greedy_stream(workload, hardware, shard, limits, homes[shard.name], tier,
                                      may_stream) for tier in range(NUM_ROW_TIERS))
        linears.append(LinearPlacement(shard.name, homes[shard.name], stream, shard.units))
    return linears, kv


def _greedy_kv(workload: Workload, shard, bound: KvBounds, left: int | None) -> KvPlacement:
    groups = shard.groups if bound.gpu_groups is None else bound.gpu_groups
    if bound.gpu_groups is None and left is not None:
        for tokens in (workload.full_tokens, workload.min_gpu_tokens):
            tokens = bound.gpu_tokens or tokens
            if groups * tokens * shard.bytes_per_token <= max(0, left):
                return KvPlacement(shard.name, groups, tokens, shard.groups)
        return KvPlacement(shard.name, 0, 0, shard.groups)
    tokens = (bound.gpu_tokens or workload.full_tokens) if groups else 0
    return KvPlacement(shard.name, groups, tokens, shard.groups)


def _greedy_home(shard: LinearShard, limits: LinearBounds, left: int) -> int:
    if limits.gpu is not None:
        return limits.gpu
    taken = max((s or 0) + (c or 0) for s, c in zip(limits.stream, limits.cpu, strict=True))
    return max(0, min(shard.units - taken, left // shard.unit_bytes))


def _greedy_stream(workload: Workload, hardware: HardwareProfile, shard: LinearShard, limits: LinearBounds, home: int,
                   tier: int, may_stream: bool) -> int:
    dram = shard.units - home
    if limits.stream[tier] is not None:
        return limits.stream[tier]
    if limits.cpu[tier] is not None:
        return dram - limits.cpu[tier]
    if not may_stream or not hardware.has_gpu:
        return 0
    rows = (*ROW_TIER_LIMITS, workload.prefill_chunk)[tier]
    cpu = cpu_linear_s_per_unit(shard, rows, workload.weight_dtype, hardware)
    copy = max(shard.unit_bytes / hardware.h2d_bytes_per_s, gpu_linear_s_per_unit(shard, rows, workload.weight_dtype, hardware))
    return min(round(dram * cpu / (cpu + copy)), dram)
