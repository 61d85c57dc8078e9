"""Predicted time of one forward pass under a placement: named terms, one equation each.

A pass is a sequence of stages (four linears and one attention a layer, then the head). Within a stage the CPU lane and
the GPU lane run side by side and the stage ends with the slower one; copies run ahead through the staging ring, so they
bound the whole pass and not single stages; CPU kernels and copies drain the same DRAM:

    T = max( sum_i max(cpu_i, gpu_i) + handovers_i,      stages in order
             sum_i cpu_i + (1 - a) * T_pcie / b,          the CPU lane at its share a of speed while copies run
             T_pcie + (1 - b) * reads / a,                copies at their share b while the CPU lane reads DRAM
             T_pcie(layers) + (1 - b) * reads(layers) / a + head,    nothing is left to hide the head behind
             T_dram = (streamed + computed-in-place bytes + KV read by the CPU) / B_dram )

T_pcie is streamed bytes / B_h2d, reads the CPU lane's seconds of reading at its own full rate. Both rows hold at once
because two lanes together do more than one alone, a + b >= 1: whichever ends last was slowed for as long as the other
ran.

The head's stage is max(cpu, gpu, its own copies + (1 - b) * its reads / a): the ring holds a few pieces of it, so most
of what it streams crosses the bus when the layers are done. What the CPU reads of it slows no copies of layers, which
are over by then.

That is the least: lanes that could run side by side do so in part, as machines have shown. What is expected is

    overlap * T + (1 - overlap) * (cpu + gpu + T_pcie + handovers)

with the profile's overlap for decode and for prompts; work on one lane alone has nothing to lose.

A `paired` layer cuts o and down by rows of the weight, to follow the heads and neurons of qkv and gate_up: a block is
then one stage of max(cpu, gpu) with one hand-over, rows in and the partial sum back, two hand-overs a layer instead of
four.

Expert slots (placement.cost.experts) take from cpu_i the share of the experts that they are expected to hold. No step
waits for what is brought into them: that takes the time that the bus has left of a step, and slows the CPU lane
meanwhile. Where it has too little for those of a step, a batch of copies takes several steps, and the slots serve less
(placement.cost.sums).

Of experts that are streamed by heat (placement.cost.experts) those left to the CPU have fewer rows than others, where a
profile says so.

All coefficients are linear in units, KV heads and bytes, so the planner optimises exactly what is predicted here, apart
from expert slots and heat, by which plans are weighed once they are cut.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from placement.cost.attention import attention_cost, attention_handovers, attention_key
from placement.cost.experts import BATCH_STEPS, RowsOfLanes, expert_hits, inserted_experts, rows_of_lanes
from placement.cost.sums import Interplay, PassCost, Sums, cost_of, shortest
from placement.cost.tally import KnownCosts, Tally
from placement.cost.terms import (
    Call,
    LinearCost,
    copy_passes,
    cost_key,
    cpu_call_s,
    gpu_products,
    interference,
    linear_cost,
    queueing_s,
    small_ops_s,
    stage_cost,
    step_s,
)
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.phase import RESOURCES, TERMS, PhaseCost
from placement.plan.placed import PlacedLayer, placed_layers
from placement.plan.shards import KvShard, LinearShard
from placement.plan.workload import Workload, row_tier


def pass_cost(
    workload: Workload,
    linears: Sequence[LinearPlacement],
    kv: Sequence[KvPlacement],
    hardware: HardwareProfile,
    call: Call,
    on_gpu: bool,
    with_head: bool = True,
) -> PassCost:
    """Cost of one pass (equations in the module docstring).

    with_head: whether logits are computed; they are for the last row of each sequence and its drafts only.
    """
    return layers_pass_cost(workload, placed_layers(workload, linears, kv), hardware, call, on_gpu, with_head)


def layers_pass_cost(
    workload: Workload,
    layers: Sequence[PlacedLayer],
    hardware: HardwareProfile,
    call: Call,
    on_gpu: bool,
    with_head: bool = True,
    costs: KnownCosts | None = None,
) -> PassCost:
    """`pass_cost` of a placement whose different layers are known, for who asks it of several passes. costs: of other
    placements on this machine, to which this one's are added."""
    known = None if costs is None else costs.of(workload, call, on_gpu)
    tallies = (Tally(workload, hardware, call, on_gpu, batch_steps, known) for batch_steps in BATCH_STEPS)
    interplay, alike = Interplay.of(hardware, call, on_gpu), _alike(layers, call)
    if not any(layer.has_expert_slots for layer in layers):
        return cost_of(_sums(next(tallies), alike, with_head), interplay)
    return shortest((_sums(tally, alike, with_head) for tally in tallies), interplay)


def _alike(layers: Sequence[PlacedLayer], call: Call) -> Mapping[Hashable, tuple[PlacedLayer, int]]:
    """One layer of those that are alike in a pass, and how many they are, by what they have in common."""
    tier, head_tier = call.tier, row_tier(call.logits_rows)
    alike: dict[Hashable, tuple[PlacedLayer, int]] = {}
    for layer in layers:
        key = layer.key_of(tier, head_tier)
        first, times = alike.get(key, (layer, 0))
        alike[key] = first, times + layer.times
    return alike


def _sums(tally: Tally, layers: Mapping[Hashable, tuple[PlacedLayer, int]], with_head: bool) -> Sums:
    """What a pass adds up to, into a tally that is empty."""
    workload, hardware, call, on_gpu = tally.workload, tally.hardware, tally.call, tally.on_gpu
    small, step = small_ops_s(workload, call, hardware, on_gpu), step_s(workload, call, hardware, on_gpu, with_head)
    for parts in (tally.lanes["steps"], tally.lanes["gpu" if on_gpu else "cpu"], tally.terms["small_ops"]):
        parts.append(small)
    tally.terms["step"].append(step)
    for layer_key, (layer, times) in layers.items():
        key = layer_key, tally.batch_steps * layer.has_expert_slots, with_head
        tally.add_layers(tally.layer(key, partial(_add_layer, layer=layer, with_head=with_head)), times)
    return tally.sums(queueing_s(workload, tally.products, call, hardware, on_gpu), step)


def _add_layer(tally: Tally, layer: PlacedLayer, with_head: bool) -> None:
    """Add one layer."""
    paired = {shard.block for shard, _ in layer.linears if shard.row_cut}
    attending, cpu_units = "", 0
    for shard, placement in layer.linears:
        if not shard.is_head or with_head:
            block = shard.block if shard.block in paired else None
            units = _add_linear(tally, shard, placement, block)
            if shard.per_kv_head:
                attending, cpu_units = shard.block, units
    if layer.kv is not None:
        block = attending if attending in paired else None
        _add_attention(tally, *layer.kv, cpu_units, block)
    tally.end_blocks()


def _add_linear(tally: Tally, shard: LinearShard, placement: LinearPlacement, block: str | None) -> int:
    """Add one linear; returns the units that the CPU computes."""
    workload, hardware, call = tally.workload, tally.hardware, tally.call
    rows = call.logits_rows if shard.is_head else call.rows
    home, streamed, cpu_units = placement.cut(row_tier(rows))
    on_cpu: float = cpu_units
    if placement.expert_slots:
        on_cpu *= 1.0 - expert_hits(workload, shard, placement, call, tally.batch_steps)

    of_lanes = rows_of_lanes(shard, placement, rows)
    cost = _cost_by_heat(tally, shard, rows, of_lanes, block is not None)
    on_gpu = shard.units - on_cpu
    gpu_s = on_gpu * cost.gpu_s_per_unit if on_gpu else 0.0
    cpu_s, handover = on_cpu * cost.cpu_s_per_unit, cost.handover_s * (cpu_units > 0)
    copy_s = streamed * shard.unit_bytes / hardware.h2d_bytes_per_s if streamed else 0.0
    tally.add_stage("linears", cpu_s, gpu_s, handover, cost.launch_s, block)
    if shard.is_head:
        tally.head_waits_s = interference(hardware)[1] * on_cpu * cost.read_s_per_unit if copy_s else 0.0
        head_s = max(cpu_s, gpu_s, copy_s + tally.head_waits_s)
        tally.head_s = head_s + handover + cost.launch_s
        tally.add(tally.lanes["steps"], head_s - max(cpu_s, gpu_s))
    else:
        tally.add(tally.reads_s, on_cpu * cost.read_s_per_unit)
    in_dram = home + streamed if hardware.unified_memory else 0
    from_dram = streamed * copy_passes(hardware) + shard.touched(of_lanes.cpu, call.together) * (on_cpu + in_dram)
    tally.add(tally.lanes["dram"], from_dram * shard.unit_bytes / hardware.dram_bytes_per_s)
    tally.add(tally.lanes["pcie"], copy_s)
    tally.add(tally.before_head_s, copy_s * (not shard.is_head))
    tally.add(tally.terms["copies"], copy_s)
    if tally.on_gpu and not shard.is_head:
        tally.products += gpu_products(shard, placement, rows, workload, hardware)
    if placement.expert_slots:
        inserted = inserted_experts(workload, shard, placement, call, tally.batch_steps) * shard.unit_bytes
        tally.add(tally.inserts_s, inserted / hardware.h2d_bytes_per_s)
    return cpu_units


def _cost_by_heat(tally: Tally, shard: LinearShard, rows: int, of_lanes: RowsOfLanes, paired: bool) -> LinearCost:
    """What a linear costs whose units count as having other rows on either lane."""
    cost = _cost_of_linear(tally, shard, rows, paired)
    if of_lanes.cpu == rows:
        return cost
    cold, warm = (_cost_of_linear(tally, shard, each, paired) for each in of_lanes)
    on_cpu = {"cpu_s_per_unit": cold.cpu_s_per_unit, "read_s_per_unit": cold.read_s_per_unit}
    return replace(cost, gpu_s_per_unit=warm.gpu_s_per_unit, **on_cpu)


def _cost_of_linear(tally: Tally, shard: LinearShard, rows: float, paired: bool) -> LinearCost:
    """What it costs where every unit counts as in a pass of so many rows; of equal linears it is worked out once."""
    workload, hardware, call = tally.workload, tally.hardware, tally.call

    def computed() -> LinearCost:
        if tally.on_gpu:
            return stage_cost(shard, rows, workload.format_of(shard), hardware, paired, call.together)
        call_s = cpu_call_s(call, hardware, False)
        return linear_cost(shard, rows, workload.format_of(shard), hardware, False, call_s, call.together)

    return tally.once(cost_key(shard, rows, call, paired), computed)


def _add_attention(tally: Tally, shard: KvShard, placement: KvPlacement, cpu_qkv_units: int, block: str | None) -> None:
    """Add one layer's attention."""
    workload, hardware, call = tally.workload, tally.hardware, tally.call
    cost = tally.once(
        attention_key(shard, placement.gpu_tokens),
        lambda: attention_cost(shard, call, placement.gpu_tokens, workload, hardware, tally.on_gpu),
    )
    on_gpu_kv_heads, on_cpu_kv_heads = placement.gpu_kv_heads, shard.kv_heads - placement.gpu_kv_heads
    handovers = attention_handovers(cpu_qkv_units, on_gpu_kv_heads, shard.kv_heads, cost.spilled_s_per_kv_head > 0)
    cpu_s = on_cpu_kv_heads * cost.cpu_s_per_kv_head + on_gpu_kv_heads * cost.spilled_s_per_kv_head
    gpu_s = on_gpu_kv_heads * cost.gpu_s_per_kv_head
    tally.add_stage("attention", cpu_s, gpu_s, handovers * cost.handover_s, cost.launch_s, block)
    tally.add(tally.reads_s, on_cpu_kv_heads * cost.read_s_per_kv_head + on_gpu_kv_heads * cost.spilled_s_per_kv_head)
    read = on_cpu_kv_heads * cost.dram_bytes_per_kv_head + on_gpu_kv_heads * cost.spilled_bytes_per_kv_head
    tally.add(tally.lanes["dram"], read / hardware.dram_bytes_per_s)
    streamed_s = (
        on_gpu_kv_heads * cost.streamed_bytes_per_kv_head / hardware.h2d_bytes_per_s if on_gpu_kv_heads else 0.0
    )
    tally.add(tally.lanes["pcie"], streamed_s)
    tally.add(tally.before_head_s, streamed_s)
    tally.add(tally.terms["copies"], streamed_s)


def working_set_bytes(workload: Workload, context: int) -> int:
    """Bytes that a step with one sequence reads: every weight, of experts those that a row is computed by, and the
    cache."""
    cache = sum(kv.kv_heads * kv.bytes_per_token * kv.visible_tokens(context) for kv in workload.kv)
    return round(sum(shard.touched(1) * shard.total_bytes for shard in workload.linears)) + cache


def predict(
    workload: Workload,
    linears: Sequence[LinearPlacement],
    kv: Sequence[KvPlacement],
    hardware: HardwareProfile,
    *,
    phase: str,
    rows: int,
    context: int,
    on_gpu: bool,
    drafts: int = 0,
    layers: Sequence[PlacedLayer] | None = None,
) -> PhaseCost:
    """Predicted cost of a decode step of `rows` sequences with `drafts` drafts each, or of a prompt of `rows` tokens,
    after `context` cached tokens. layers: the different ones of the placements, where they are known.

    A prompt runs in chunks of workload.prefill_chunk rows; only its last chunk chooses a token.
    """
    hardware = hardware.for_working_set(working_set_bytes(workload, context))
    layers = layers or placed_layers(workload, linears, kv)
    if phase == "decode":
        cost = layers_pass_cost(workload, layers, hardware, Call(rows, 1, context, drafts), on_gpu)
        parts = tuple(cost.lanes.items()), tuple(cost.terms.items())
        return PhaseCost(phase, rows, context, cost.seconds, *parts, cost.overlapped_s, cost.batch_steps)
    if phase != "prefill":
        raise ValueError(f"phase must be decode or prefill, got {phase!r}")
    total, overlapped = 0.0, 0.0
    lanes, terms = Counter[str](dict.fromkeys(RESOURCES, 0.0)), Counter[str](dict.fromkeys(TERMS, 0.0))
    for start in range(0, rows, workload.prefill_chunk):
        call = Call(1, min(workload.prefill_chunk, rows - start), context + start)
        cost = layers_pass_cost(workload, layers, hardware, call, on_gpu, with_head=start + call.q_len == rows)
        total += cost.seconds
        overlapped += cost.overlapped_s
        lanes.update(cost.lanes)
        terms.update(cost.terms)
    return PhaseCost(phase, rows, context, total, tuple(lanes.items()), tuple(terms.items()), overlapped)
