"""What the page shows beside the conversation: the plan, the lanes' time, what other budgets of GPU memory promise."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from hetero_attn.errors import ArgumentError, MemoryBudgetError
from hetero_attn.server.bodies import checked
from hetero_attn.server.failures import ApiError
from hetero_attn.server.protocols.fields import Fields, Integer
from hetero_attn.server.service import Service
from hetero_attn.server.sse import JsonAnswer
from placement.adapt.elastic import plan_for_budget
from placement.policy.problems import PolicyError
from placement.solve.make_plan import make_plan
from placement.solve.refusals import BudgetError

if TYPE_CHECKING:  # it needs torch, whose import would keep a server from answering while it loads
    from hetero_attn.planning.settle import PlannedModel
    from placement import Plan

POINTS = 12  # budgets on the curve, beside the one in force


class ResizeBody(Fields):
    """The GPU memory that the model should have."""

    gpu_memory_bytes: Integer


async def report(service: Service, request: Request) -> Any:
    """The plan in force and how the model is doing."""
    llm, driver = service.llm, service.driver
    plan, gauges = llm.plan, service.gauges()
    predicted = plan.predicted
    lengths = [len(r.prompt_token_ids) + r.progress.tokens for r in driver.live if r.sequence is not None]
    return JsonAnswer(
        {
            "model": service.model_name,
            "device": plan.device,
            "state": driver.state.value,
            "elastic": plan.workload.elastic,
            "gpu_memory_bytes": plan.gpu_memory_bytes,
            "memory": plan.memory.to_dict(),
            "max_context": plan.max_context,
            "max_batch": plan.max_batch,
            "cache_tokens": plan.workload.full_tokens,
            "cache_used": gauges["vllm:kv_cache_usage_perc"],
            "longest_context": max(lengths, default=0),
            "running": gauges["vllm:num_requests_running"],
            "waiting": gauges["vllm:num_requests_waiting"],
            "phases": llm.report().to_dict(),
            "predicted": predicted
            and {"prefill": predicted.prefill.tokens_per_s, "decode": predicted.decode.tokens_per_s},
        }
    )


async def curve(service: Service, request: Request) -> Any:
    """Expected speeds by GPU memory, from plans that nobody carries out."""
    planned = service.llm.planned
    if planned.plan.gpu_memory_bytes is None:
        raise ApiError(400, f"{service.model_name} runs on the CPU alone; there is no GPU memory to choose")
    return JsonAnswer({"curve": await asyncio.shield(service.once(planned, lambda: _curve(planned)))})


async def resize(service: Service, request: Request) -> Any:
    """Change the GPU memory of an elastic model, between two steps."""
    wanted = checked(ResizeBody, await service.bodies.read(request)).gpu_memory_bytes
    llm = service.llm
    try:
        plan = await asyncio.wrap_future(service.driver.between_steps(lambda: llm.resize(wanted)))
    except (MemoryBudgetError, ArgumentError) as error:
        raise ApiError(400, str(error), param="gpu_memory_bytes") from None
    return JsonAnswer({"gpu_memory_bytes": plan.gpu_memory_bytes})


def _curve(planned: PlannedModel) -> list[dict[str, Any]]:
    return [_point(planned, size) for size in _budgets(planned)]


def _budgets(planned: PlannedModel) -> list[int]:
    plan = planned.plan
    most = plan.gpu_memory_bytes or 0
    if plan.device != "cuda" or not plan.workload.elastic:  # there it is taken once, and cannot grow
        memory = plan.memory
        most = max(most, memory.gpu_bytes + memory.pinned_bytes + memory.host_bytes)
    return sorted({most * number // POINTS for number in range(1, POINTS + 1)} | {plan.gpu_memory_bytes or 0})


def _point(planned: PlannedModel, size: int) -> dict[str, Any]:
    try:
        predicted = _plan(planned, size).predicted
    except (BudgetError, PolicyError) as error:
        return {"gpu_memory_bytes": size, "decode_tokens_per_s": None, "prefill_tokens_per_s": None, "why": str(error)}
    decode, prefill = predicted.decode.tokens_per_s, predicted.prefill.tokens_per_s
    return {"gpu_memory_bytes": size, "decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill, "why": None}


def _plan(planned: PlannedModel, size: int) -> Plan:
    plan, hardware, policy = planned.plan, planned.hardware, planned.policy
    if plan.workload.elastic:
        return plan_for_budget(plan, hardware, policy, size)
    workload = planned.workload or plan.workload
    return make_plan(workload, hardware, policy, device=plan.device, gpu_memory_bytes=size)
