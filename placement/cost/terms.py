"""Predicted time of single operations of a pass: a linear on either side, hand-overs, what Python adds.

Every coefficient is linear in units, KV heads and bytes; `cost` adds them up to a pass, `formulation` optimises over
them.
"""

from dataclasses import dataclass, replace
from math import inf

from cpu_kernels.formats import widest
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import RowRate, seconds_per_operation_of_a_row
from placement.plan.memory import LinearPlacement, staging_piece_units
from placement.plan.shards import LinearShard
from placement.plan.workload import Workload, row_tier

BYTES_PER_ACTIVATION = 4
# Two norms, rotary embedding with the KV append, the gated activation, where a workload says nothing else; on a GPU
# also adding what the CPU computed.
SMALL_CALLS_PER_LAYER_ON_CPU = 4
SMALL_CALLS_PER_LAYER_ON_GPU = 5
LINEARS_PER_LAYER = 4
# Those, the linears and attention.
LAUNCHES_PER_LAYER = SMALL_CALLS_PER_LAYER_ON_GPU + LINEARS_PER_LAYER + 1
GPU_PRODUCT_BYTES = 64 << 20  # of weights as bf16 in one product of many rows, as the GPU's linear has it


@dataclass(frozen=True, slots=True)
class Call:
    """One forward pass: `sequences` sequences, `q_len` new tokens each, `context` tokens already cached in each.

    drafts: rows of each sequence behind those; they attend one by one, as a decode step's, and each gives logits.
    """

    sequences: int
    q_len: int
    context: int
    drafts: int = 0

    @property
    def rows(self) -> int:
        """Token rows of the pass."""
        return self.sequences * (self.q_len + self.drafts)

    @property
    def logits_rows(self) -> int:
        """Rows of which logits are computed, unless none are."""
        return self.sequences * (1 + self.drafts)

    @property
    def together(self) -> int:
        """Rows whose experts are counted as those of neighbours; a prompt's are counted as if each chose by itself."""
        return 1 + self.drafts

    @property
    def stored(self) -> int:
        """Tokens in the cache of each sequence at the end of the pass."""
        return self.context + self.q_len + self.drafts

    @property
    def tier(self) -> int:
        """Row tier of the pass."""
        return row_tier(self.rows)


@dataclass(frozen=True, slots=True)
class WeightedCall:
    """A pass and how often it counts in the objective. with_head: whether it computes logits. beside_s: what a drafter
    takes for it, whatever the placement of the model."""

    call: Call
    weight: float
    with_head: bool = True
    beside_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Coefficients of one linear in one pass, in seconds: per CPU unit, per GPU unit, fixed if the CPU has a share.

    read_s_per_unit: of the CPU's seconds, those for which it reads DRAM as fast as it can.
    """

    cpu_s_per_unit: float
    gpu_s_per_unit: float
    handover_s: float
    launch_s: float
    read_s_per_unit: float


def cpu_linear_s_per_unit(
    shard: LinearShard, rows: float, dtype: str, hardware: HardwareProfile, together: int = 1
) -> float:
    """CPU lane: unit_bytes / B_cpu while bandwidth bounds it, rows * operations / F_cpu when arithmetic does.

    With rates measured by rows the time is read from them, straight between measured row counts. Of experts it is the
    expected share of those that have a row, each with the rows that it then has. together: as in `Call`.
    """
    return shard.touched(rows, together) * _unit_s(
        shard,
        shard.rows_of_one(rows, together),
        dtype,
        hardware.cpu_rows,
        hardware.cpu_linear_bytes_per_s.of(dtype),
        hardware.cpu_ops_per_s.of(dtype),
    )


def gpu_linear_s_per_unit(
    shard: LinearShard, rows: float, dtype: str, hardware: HardwareProfile, together: int = 1
) -> float:
    """GPU lane: unit_bytes / B_gpu or rows * operations / F_gpu, whichever is longer; measured by rows, read from
    that; of experts as on the CPU."""
    return shard.touched(rows, together) * _unit_s(
        shard,
        shard.rows_of_one(rows, together),
        dtype,
        hardware.gpu_rows,
        hardware.gpu_bytes_per_s,
        hardware.gpu_ops_per_s(dtype, rows),
    )


def _unit_s(
    shard: LinearShard,
    rows: float,
    dtype: str,
    measured: tuple[RowRate, ...],
    bytes_per_s: float,
    operations_per_s: float,
) -> float:
    if measured:
        return shard.flops_per_row_per_unit * seconds_per_operation_of_a_row(measured, rows, dtype)
    return max(shard.unit_bytes / bytes_per_s, rows * shard.flops_per_row_per_unit / operations_per_s)


def handover_s(rows: float, in_features: int, out_features: float, hardware: HardwareProfile) -> float:
    """Hand-over of a stage: fixed cost + input rows to the host + output rows back."""
    down = rows * in_features * BYTES_PER_ACTIVATION / hardware.d2h_bytes_per_s
    up = rows * out_features * BYTES_PER_ACTIVATION / hardware.h2d_bytes_per_s
    return hardware.handover_s + down + up


def interference(hardware: HardwareProfile) -> tuple[float, float]:
    """How much longer the CPU lane takes for a second of copies beside it, and copies for a second in which it reads
    DRAM."""
    cpu, copies = hardware.cpu_slowdown_while_copying, hardware.copy_slowdown_while_computing
    return (1 - cpu) / copies, (1 - copies) / cpu


def copy_passes(hardware: HardwareProfile) -> int:
    """How often a byte that is copied to the GPU passes DRAM before it is used: where both sides share it, it is read
    and written there."""
    return 2 if hardware.unified_memory else 1


def is_recorded(call: Call, on_gpu: bool) -> bool:
    """Whether a pass replays the CPU's operations instead of calling them: a decode step without a GPU. Beside a GPU
    the measured hand-over holds what the calls cost."""
    return call.q_len == 1 and not on_gpu


def cpu_call_s(call: Call, hardware: HardwareProfile, on_gpu: bool) -> float:
    """One operation of the CPU lane beyond its work."""
    recorded = is_recorded(call, on_gpu) and hardware.cpu_recorded_call_s
    return recorded or hardware.cpu_call_s


def cost_key(shard: LinearShard, rows: float, call: Call, paired: bool) -> tuple[object, ...]:
    """What linears of so many rows have in common that cost the same in a pass."""
    return shard.kind, shard.shape, paired, shard.heat if call.together > 1 else None, rows


def linear_cost(
    shard: LinearShard,
    rows: float,
    dtype: str,
    hardware: HardwareProfile,
    on_gpu: bool,
    call_s: float = 0.0,
    together: int = 1,
) -> LinearCost:
    """Coefficients of one linear. on_gpu: whether there is a GPU lane; without one nothing is handed over and the
    linear costs one CPU call of call_s. together: as in `Call`."""
    activation_s = rows * hardware.cpu_activation_s.of(dtype)
    cpu = cpu_linear_s_per_unit(shard, rows, dtype, hardware, together) + shard.unit_features * activation_s
    read = min(cpu, shard.touched(rows, together) * shard.unit_bytes / hardware.cpu_linear_bytes_per_s.of(dtype))
    rounding_s = shard.in_features * activation_s
    if not on_gpu:
        return LinearCost(cpu, inf, 0.0, call_s + rounding_s, read)
    back = rows * shard.unit_features * BYTES_PER_ACTIVATION / hardware.h2d_bytes_per_s
    return LinearCost(
        cpu + back,
        gpu_linear_s_per_unit(shard, rows, dtype, hardware, together),
        handover_s(rows, shard.in_features, 0, hardware) + rounding_s,
        hardware.launch_overhead_s,
        read,
    )


def stage_cost(
    shard: LinearShard, rows: float, dtype: str, hardware: HardwareProfile, paired: bool, together: int = 1
) -> LinearCost:
    """Coefficients of one linear beside a GPU. paired: it is part of a paired block, into which only rows go, before
    its first linear, and out of which a whole partial sum comes, after its last. together: as in `Call`."""
    cost = linear_cost(shard, rows, dtype, hardware, True, together=together)
    if not paired:
        return cost
    back = rows * shard.out_features * BYTES_PER_ACTIVATION / hardware.h2d_bytes_per_s
    cpu = cpu_linear_s_per_unit(shard, rows, dtype, hardware, together)
    return replace(cost, cpu_s_per_unit=cpu, handover_s=back if shard.row_cut else cost.handover_s)


def small_ops_s(workload: Workload, call: Call, hardware: HardwareProfile, on_gpu: bool) -> float:
    """Norms, rotary embedding, activation functions: their calls, and all linears' rows in and out moved once more."""
    moved = BYTES_PER_ACTIVATION * call.rows * workload.layer_features
    ways = 4 if call.drafts else 2  # of a state: drafts that are right are taken in behind the pass
    moved += ways * call.sequences * sum(state.bytes_per_sequence for state in workload.states)
    calls = workload.small_calls or SMALL_CALLS_PER_LAYER_ON_CPU * workload.num_layers
    if on_gpu:
        calls += (SMALL_CALLS_PER_LAYER_ON_GPU - SMALL_CALLS_PER_LAYER_ON_CPU) * workload.num_layers
        return calls * hardware.launch_overhead_s + moved / hardware.gpu_bytes_per_s
    rate = hardware.cpu_small_bytes_per_s or hardware.dram_bytes_per_s
    return calls * cpu_call_s(call, hardware, on_gpu) + moved / rate


def step_s(workload: Workload, call: Call, hardware: HardwareProfile, on_gpu: bool, with_head: bool = True) -> float:
    """What a pass costs beside its operations: Python around it and, unless it is recorded, around every layer; and
    choosing a token from each row of logits.

    With a GPU, Python's time per layer is in the launches and hand-overs.
    """
    layers = 0 if on_gpu or is_recorded(call, on_gpu) else workload.num_layers
    chosen = with_head * call.logits_rows * workload.vocab_size
    return hardware.step_overhead_s + layers * hardware.layer_overhead_s + chosen * hardware.logits_s_per_token


def queueing_s(workload: Workload, products: int, call: Call, hardware: HardwareProfile, on_gpu: bool) -> float:
    """What Python needs to queue a prompt's layers on a GPU, which works on them meanwhile; a decode step is captured.
    products: `gpu_products` of all layers.

    The profile's layer has four linears of one product each; large ones over codes are several, and so is one of which
    a part is streamed.
    """
    if not on_gpu or call.q_len == 1:
        return 0.0
    more = max(0, products - LINEARS_PER_LAYER * workload.num_layers)
    return hardware.gpu_layer_overhead_s * workload.num_layers + product_queueing_s(hardware) * more


def product_queueing_s(hardware: HardwareProfile) -> float:
    """What Python needs to queue one product more than a layer of the profile has."""
    return hardware.gpu_product_overhead_s or hardware.gpu_layer_overhead_s / LINEARS_PER_LAYER


def least_products(shard: LinearShard, rows: int, workload: Workload, hardware: HardwareProfile) -> tuple[float, float]:
    """Products of `gpu_products` for a unit at home and for one that is streamed, nothing rounded up."""
    unit = _unit_bytes_as_bf16(shard, rows, workload, hardware)
    return max(1 / shard.units, unit / GPU_PRODUCT_BYTES), 1 / staging_piece_units(shard, workload)


def _unit_bytes_as_bf16(shard: LinearShard, rows: int, workload: Workload, hardware: HardwareProfile) -> int:
    """Bytes that a unit becomes for a product of many rows; 0 where it is multiplied as it is."""
    fmt = workload.format_of(shard)
    is_coded = not widest(fmt).is_row_major and rows > hardware.int8_rows.get(fmt, 0)
    return 2 * shard.unit_features * shard.in_features if is_coded else 0


def gpu_products(
    shard: LinearShard, placement: LinearPlacement, rows: int, workload: Workload, hardware: HardwareProfile
) -> int:
    """Products that Python queues for one linear of many rows: of its columns at home, one in int8, else as many as it
    becomes bf16 in, and one for each streamed piece."""
    home, streamed, _ = placement.cut(row_tier(rows))
    unit = _unit_bytes_as_bf16(shard, rows, workload, hardware)
    at_home = max(1, -(-home * unit // GPU_PRODUCT_BYTES)) if home else 0
    return at_home + -(-streamed // staging_piece_units(shard, workload))
