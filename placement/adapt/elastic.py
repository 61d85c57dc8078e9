"""Plans that a loaded elastic model can move to: another GPU budget, or cuts for the context that it has reached.

Every unit has a copy in DRAM, so any home boundary can be reached. What stays is who owns which KV heads, because
their keys and values are in one owner's store, and everything that buffers were sized for.
"""

from dataclasses import replace

from placement.cost.model import predict
from placement.cost.objective import judged_s
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Means, Plan, build_plan
from placement.plan.workload import round_up
from placement.policy.bind import bind
from placement.policy.bounds import KvBounds
from placement.policy.policy import Policy
from placement.policy.rules import KvRule, Rule
from placement.solve.decisions import gpu_tokens_of
from placement.solve.make_plan import make_plan, predict_plan
from placement.solve.refusals import BudgetError


def plan_for_budget(plan: Plan, hardware: HardwareProfile, policy: Policy, gpu_memory_bytes: int) -> Plan:
    """The fastest plan within another GPU budget that keeps the owners of the cache.

    Raises BudgetError, with the smallest budget that works, and PolicyError.
    """
    fixed = policy.model_copy(update={"rules": _rules(plan, policy, None)})
    return make_plan(plan.workload, hardware, fixed, device=plan.device, gpu_memory_bytes=gpu_memory_bytes)


def plan_for_context(plan: Plan, hardware: HardwareProfile, policy: Policy, context: int) -> Plan:
    """The fastest plan within the same budget for sequences of up to `context` tokens together.

    The cache gets GPU memory for all of them, for half, or for as few as work: whatever the cost model finds fastest
    beside the weights that then find room. Raises BudgetError and PolicyError.
    """
    fixed_tokens = max((bound.gpu_tokens or 0 for bound in bind(policy, plan.workload, plan.device).kv), default=0)
    workload = replace(plan.workload, max_context=max(context, -(-fixed_tokens // plan.max_batch)))
    found, refused = [], None
    for tokens in _token_choices(plan, context):
        fixed = policy.model_copy(update={"rules": _rules(plan, policy, tokens), "context": None})
        try:
            found.append(
                make_plan(workload, hardware, fixed, device=plan.device, gpu_memory_bytes=plan.gpu_memory_bytes)
            )
        except BudgetError as error:
            refused = error
    if not found:
        raise refused
    best = min(found, key=lambda each: judged_s(each.predicted.objective_s, each.is_all_on_gpu))
    whole = build_plan(
        replace(plan.workload, inserts=best.workload.inserts),
        best.linears,
        best.kv,
        Means(
            device=plan.device,
            gpu_memory_bytes=plan.gpu_memory_bytes,
            staging_slots=best.staging_slots,
            num_threads=plan.num_threads,
            context_bytes=plan.memory.gpu.get("context", 0),
            pinned_memory_bytes=plan.pinned_memory_bytes,
            host_memory_bytes=plan.host_memory_bytes,
        ),
        objective=plan.objective,
    )
    return replace(whole, predicted=predict_plan(whole, hardware))


def decode_s(plan: Plan, hardware: HardwareProfile, context: int) -> float:
    """Predicted seconds of one decode step after `context` cached tokens."""
    arguments = (plan.workload, plan.linears, plan.kv, hardware)
    return predict(*arguments, phase="decode", rows=1, context=context, on_gpu=plan.device != "cpu").seconds


def _token_choices(plan: Plan, context: int) -> list[int]:
    workload = plan.workload
    pages = workload.page_size * workload.max_batch
    wanted = (round_up(context, workload.page_size) + pages, round_up(context // 2, workload.page_size) + pages)
    return sorted({workload.min_gpu_tokens} | {t for t in wanted if workload.min_gpu_tokens < t < workload.full_tokens})


def _rules(plan: Plan, policy: Policy, gpu_tokens: int | None) -> tuple[Rule, ...]:
    """The policy's rules, those of the cache replaced by the plan's owners; token counts that it fixes stay.

    gpu_tokens: what the other layers keep in GPU memory, windows permitting; None leaves it open.
    """
    workload = plan.workload

    def tokens(shard, placement, bound: KvBounds) -> int | None:
        if not placement.gpu_kv_heads:
            return 0
        return bound.gpu_tokens if gpu_tokens is None else gpu_tokens_of(workload, shard, bound, gpu_tokens)

    bounds = bind(policy, workload, plan.device).kv
    owners = tuple(
        Rule(
            match=shard.name,
            kv=KvRule(gpu_heads=placement.gpu_kv_heads, gpu_tokens=tokens(shard, placement, bound)),
        )
        for shard, placement, bound in zip(workload.kv, plan.kv, bounds, strict=True)
    )
    return owners + tuple(rule.model_copy(update={"kv": None}) for rule in policy.rules if rule.sets_linears)
