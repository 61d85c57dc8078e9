"""Elastic GPU memory: a loaded model goes over to the plan of another budget, or of another context, between two steps.

Every unit of an elastic plan is in host memory, and those at home on the GPU are in GPU memory too. So a home boundary
moves down by giving GPU memory back and up by copying; nothing is read from the checkpoint again. GPU memory is always
given back before more is taken, so the budget holds at every moment in between.
"""

from collections.abc import Sequence

import torch

from hetero_attn.cache.cache import KVCache
from hetero_attn.devices.slab import NoGapError
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.staging import make_ring
from hetero_attn.ops.expert_slot_keeper import SlotKeeper
from hetero_attn.ops.linear import LinearWeights
from placement.plan.memory import LinearPlacement
from placement.plan.plan import Plan

Moving = tuple[LinearWeights, LinearPlacement]


def go_over(
    lanes: Lanes, linears: Sequence[LinearWeights], kv_cache: KVCache, expert_slots: SlotKeeper, plan: Plan
) -> None:
    """Bring weights, cache, expert slots and staging ring from whatever state they are in to `plan`, all in place.

    linears: in plan order. Raises MemoryBudgetError when GPU memory runs out, and may then be called again.
    """
    lanes.finish()
    targets = list(zip(linears, plan.linears, strict=True))
    moving = [pair for pair in targets if not _is_home(*pair)]
    expert_slots.close()  # they hold copies alone
    _give_all_back(lanes, moving)
    kv_cache.shrink(plan)
    lanes.device.arena.budget_bytes = plan.own_gpu_bytes
    try:
        _take_all(lanes, moving, kv_cache, plan)
        expert_slots.open(linears, plan)
    except NoGapError:  # there is enough, but in pieces between what stayed: nothing stays
        lanes.finish()
        expert_slots.close()
        _give_all_back(lanes, targets)
        _take_all(lanes, targets, kv_cache, plan, anew=True)
        expert_slots.open(linears, plan)
    for weights, placement in targets:
        weights.placement = placement
    lanes.finish()


def _give_all_back(lanes: Lanes, moving: Sequence[Moving]) -> None:
    for weights, _ in moving:
        _give_back(lanes, weights)
    if lanes.ring is not None:
        lanes.ring.close()
        lanes.ring = None


def _take_all(lanes: Lanes, moving: Sequence[Moving], kv_cache: KVCache, plan: Plan, anew: bool = False) -> None:
    kv_cache.grow(plan, anew)
    lanes.ring = make_ring(plan, lanes.device)
    for weights, placement in moving:
        _take(lanes, weights, placement)


def _is_home(weights: LinearWeights, placement: LinearPlacement) -> bool:
    return weights.gpu is not None and weights.gpu.shape[0] == placement.gpu_units * weights.spec.unit_rows


def _give_back(lanes: Lanes, weights: LinearWeights) -> None:
    if weights.gpu is not None:
        lanes.device.release(weights.gpu, "weights")
        weights.gpu = None


def _take(lanes: Lanes, weights: LinearWeights, placement: LinearPlacement) -> None:
    copies = weights.gpu_copy(placement.gpu_units)
    gpu = lanes.device.empty(tuple(copies.shape), torch.uint8, "weights")
    try:
        lanes.copy(gpu, copies)
    except BaseException:
        lanes.device.release(gpu, "weights")
        raise
    weights.gpu = gpu
