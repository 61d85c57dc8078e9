"""Predicted time of one forward pass under a placement: named terms, one equation each.

A pass is a sequence of steps (four linears and one attention a layer, then the head). Within a step the CPU lane and
the GPU lane run side by side and the step ends with the slower one; copies run ahead through the staging ring, so they
bound the whole pass and not single steps; CPU kernels and copies drain the same DRAM:

    T = max( sum_i max(cpu_i, gpu_i) + handovers_i,      steps in order
             sum_i cpu_i + (1 - slowdown) * T_pcie,      the CPU lane, slowed while copies run
             T_pcie = streamed bytes / B_h2d,
             T_dram = (streamed + computed-in-place bytes + KV read by the CPU) / B_dram )

All coefficients are linear in units, groups and bytes, so the planner optimises exactly what is predicted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.hardware import HardwareProfile
from placement.memory import KvPlacement, LinearPlacement
from placement.phase_cost import RESOURCES, PhaseCost
from placement.workload import KvShard, LinearShard, Workload, row_tier

BYTES_PER_ACTIVATION = 4
# Two norms, rotary embedding with the KV append, the gated activation and the merge of partials.
SMALL_CALLS_PER_LAYER = 5


@dataclass(frozen=True, slots=True)
class Call:
    """One forward pass: `sequences` sequences, `q_len` new tokens each, `context` tokens already cached in each."""

    sequences: int
    q_len: int
    context: int

    @property
    def rows(self) -> int:
        """Token rows of the pass."""
        return self.sequences * self.q_len

    @property
    def tier(self) -> int:
        """Row tier of the pass."""
        return row_tier(self.rows)


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Coefficients of one linear in one pass, in seconds: per CPU unit, per GPU unit, fixed if the CPU has a share."""

    cpu_s_per_unit: float
    gpu_s_per_unit: float
    handover_s: float
    launch_s: float


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Coefficients of one layer's attention in one pass, for a given number of KV slots in GPU memory.

    cpu_s, dram_bytes: of a group owned by the CPU; spilled_s, spilled_bytes: of the older tokens of a GPU group;
    gpu_s: of the recent tokens of a GPU group.
    """

    cpu_s_per_group: float
    spilled_s_per_group: float
    gpu_s_per_group: float
    dram_bytes_per_group: float
    spilled_bytes_per_group: float
    handover_s: float
    launch_s: float


def cpu_linear_s_per_unit(shard: LinearShard, rows: int, dtype: str, hardware: HardwareProfile) -> float:
    """CPU lane: unit_bytes / B_cpu while bandwidth bounds it, rows * operations / F_cpu when arithmetic does."""
    return max(
        shard.unit_bytes / hardware.cpu_linear_bytes_per_s.of(dtype),
        rows * shard.flops_per_row_per_unit / hardware.cpu_ops_per_s.of(dtype),
    )


def gpu_linear_s_per_unit(shard: LinearShard, rows: int, dtype: str, hardware: HardwareProfile) -> float:
    """GPU lane: unit_bytes / B_gpu or rows * operations / F_gpu, whichever is longer."""
    return max(
        shard.unit_bytes / hardware.gpu_bytes_per_s, rows * shard.flops_per_row_per_unit / hardware.gpu_flops.of(dtype)
    )


def handover_s(rows: int, in_features: int, out_features: float, hardware: HardwareProfile) -> float:
    """Hand-over of a step: fixed cost + input rows to the host + output rows back."""
    down = rows * in_features * BYTES_PER_ACTIVATION / hardware.d2h_bytes_per_s
    up = rows * out_features * BYTES_PER_ACTIVATION / hardware.h2d_bytes_per_s
    return hardware.handover_s + down + up


def linear_cost(shard: LinearShard, rows: int, dtype: str, hardware: HardwareProfile, on_gpu: bool) -> LinearCost:
    """Coefficients of one linear. on_gpu: whether there is a GPU lane; without one nothing is handed over."""
    cpu = cpu_linear_s_per_unit(shard, rows, dtype, hardware)
    if not on_gpu:
        return LinearCost(cpu, float("inf"), 0.0, hardware.cpu_call_s)
    back = rows * shard.unit_features * BYTES_PER_ACTIVATION / hardware.h2d_bytes_per_s
    return LinearCost(
        cpu + back,
        gpu_linear_s_per_unit(shard, rows, dtype, hardware),
        handover_s(rows, shard.in_features, 0, hardware),
        hardware.launch_overhead_s,
    )


def attention_cost(
    kv: KvShard, call: Call, gpu_tokens: int, workload: Workload, hardware: HardwareProfile, on_gpu: bool
) -> AttentionCost:
    """Coefficients of attention: K and V read once per pass, 4 * head_dim operations per query head, row and key.

    A chunk of q_len rows sees on average context + (q_len + 1) / 2 keys, capped by the sliding window.
    """
    keys = kv.visible_tokens(call.context + (call.q_len + 1) // 2)
    stored = kv.visible_tokens(call.context + call.q_len)
    near = min(stored, gpu_tokens / call.sequences) if on_gpu else 0
    far_share = (stored - near) / stored
    heads = workload.num_heads / kv.groups
    operations = 4 * workload.head_dim * heads * call.rows * keys
    read = call.sequences * stored * kv.bytes_per_token
    cpu = max(read / hardware.cpu_attention_bytes_per_s, operations / hardware.cpu_attention_ops_per_s)
    if not on_gpu:
        return AttentionCost(cpu, 0.0, 0.0, read, 0.0, 0.0, hardware.cpu_call_s)
    gpu = (1 - far_share) * max(read / hardware.gpu_bytes_per_s, operations / hardware.gpu_attention_ops_per_s)
    features = workload.num_heads * workload.head_dim
    return AttentionCost(
        cpu,
        far_share * cpu,
        gpu,
        read,
        far_share * read,
        handover_s(call.rows, features, features, hardware),
        hardware.launch_overhead_s,
    )


def small_ops_s(workload: Workload, call: Call, hardware: HardwareProfile, on_gpu: bool) -> float:
    """Norms, rotary embedding, activation functions: their calls, and all linears' rows in and out moved once more."""
    calls = SMALL_CALLS_PER_LAYER * workload.num_layers
    moved = (
        BYTES_PER_ACTIVATION
        * call.rows
        * sum(s.in_features + s.out_features for s in workload.linears if s.kind != "head")
    )
    if on_gpu:
        return calls * hardware.launch_overhead_s + moved / hardware.gpu_bytes_per_s
    return calls * hardware.cpu_call_s + moved / hardware.dram_bytes_per_s


def attention_handovers(cpu_linear_units: int, gpu_groups: int, groups: int, spills: bool) -> int:
    """Hand-overs of attention itself, beyond that of qkv.

    None when the GPU owns every group and nothing spilled, or when exactly the groups whose q, k, v the CPU computed
    are attended there: their results cross once, after attention. Otherwise one.
    """
    attended_by_cpu = groups - gpu_groups
    if spills and gpu_groups:
        return 1
    return int(attended_by_cpu > cpu_linear_units)


def pass_cost(
    workload: Workload,
    linears: Sequence[LinearPlacement],
    kv: Sequence[KvPlacement],
    hardware: HardwareProfile,
    call: Call,
    on_gpu: bool,
    with_head: bool = True,
) -> tuple[float, dict[str, float]]:
    """Seconds of one pass and the seconds each resource needs by itself (equations in the module docstring).

    with_head: whether logits are computed; they are for the last row of each sequence only.
    """
    lanes = dict.fromkeys(RESOURCES, 0.0)
    lanes["steps"] = lanes["gpu" if on_gpu else "cpu"] = small_ops_s(workload, call, hardware, on_gpu)
    cpu_qkv_units: dict[int | None, int] = {}
    for shard, placement in zip(workload.linears, linears, strict=True):
        if shard.kind != "head" or with_head:
            cpu_units = _add_linear(lanes, shard, placement, workload, hardware, call, on_gpu)
            if shard.kind == "qkv":
                cpu_qkv_units[shard.layer] = cpu_units
    for kv_shard, kv_placement in zip(workload.kv, kv, strict=True):
        cpu_units = cpu_qkv_units.get(kv_shard.layer, 0)
        _add_attention(lanes, kv_shard, kv_placement, cpu_units, workload, hardware, call, on_gpu)
    if lanes["cpu"]:
        lanes["cpu"] += (1 - hardware.cpu_slowdown_while_copying) * lanes["pcie"]
    return max(lanes.values()) + hardware.step_overhead_s, lanes


def _add_linear(
    lanes: dict[str, float],
    shard: LinearShard,
    placement: LinearPlacement,
    workload: Workload,
    hardware: HardwareProfile,
    call: Call,
    on_gpu: bool,
) -> int:
    """Add one linear to `lanes` in place; returns the units that the CPU computes."""
    rows = call.sequences if shard.kind == "head" else call.rows
    home, streamed, on_cpu = placement.cut(row_tier(rows))
    cost = linear_cost(shard, rows, workload.weight_dtype, hardware, on_gpu)
    gpu_s = (home + streamed) * cost.gpu_s_per_unit if home + streamed else 0.0
    _add_step(lanes, on_cpu * cost.cpu_s_per_unit, gpu_s, cost.handover_s * (on_cpu > 0), cost.launch_s, on_gpu)
    from_dram = streamed + on_cpu + (home if hardware.unified_memory else 0)
    lanes["dram"] += from_dram * shard.unit_bytes / hardware.dram_bytes_per_s
    if streamed:
        lanes["pcie"] += streamed * shard.unit_bytes / hardware.h2d_bytes_per_s
    return on_cpu


def _add_attention(
    lanes: dict[str, float],
    shard: KvShard,
    placement: KvPlacement,
    cpu_qkv_units: int,
    workload: Workload,
    hardware: HardwareProfile,
    call: Call,
    on_gpu: bool,
) -> None:
    """Add one layer's attention to `lanes` in place."""
    cost = attention_cost(shard, call, placement.gpu_tokens, workload, hardware, on_gpu)
    on_gpu_groups, on_cpu_groups = placement.gpu_groups, shard.groups - placement.gpu_groups
    handovers = attention_handovers(cpu_qkv_units, on_gpu_groups, shard.groups, cost.spilled_s_per_group > 0)
    cpu_s = on_cpu_groups * cost.cpu_s_per_group + on_gpu_groups * cost.spilled_s_per_group
    gpu_s = on_gpu_groups * cost.gpu_s_per_group
    _add_step(lanes, cpu_s, gpu_s, handovers * cost.handover_s, cost.launch_s, on_gpu)
    read = on_cpu_groups * cost.dram_bytes_per_group + on_gpu_groups * cost.spilled_bytes_per_group
    lanes["dram"] += read / hardware.dram_bytes_per_s


def _add_step(
    lanes: dict[str, float], cpu_s: float, gpu_s: float, handovers_s: float, launch_s: float, on_gpu: bool
) -> None:
    lanes["steps"] += max(cpu_s, gpu_s) + handovers_s + launch_s
    lanes["cpu"] += cpu_s + (0.0 if on_gpu else launch_s)
    lanes["gpu"] += gpu_s + (launch_s if on_gpu else 0.0)


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
) -> PhaseCost:
    """Predicted cost of a decode step of `rows` sequences, or of a prompt of `rows` tokens, after `context` cached
    tokens.

    A prompt runs in chunks of workload.prefill_chunk rows; only its last chunk computes logits.
    """
    if phase == "decode":
        seconds, lanes = pass_cost(workload, linears, kv, hardware, Call(rows, 1, context), on_gpu)
        return PhaseCost(phase, rows, context, seconds, tuple(lanes.items()))
    if phase != "prefill":
        raise ValueError(f"phase must be decode or prefill, got {phase!r}")
    total, lanes_total = 0.0, dict.fromkeys(RESOURCES, 0.0)
    for start in range(0, rows, workload.prefill_chunk):
        q_len = min(workload.prefill_chunk, rows - start)
        seconds, lanes = pass_cost(
            workload, linears, kv, hardware, Call(1, q_len, context + start), on_gpu, with_head=start + q_len == rows
        )
        total += seconds
        for name, value in lanes.items():
            lanes_total[name] += value
    return PhaseCost(phase, rows, context, total, tuple(lanes_total.items()))
