"""Predicted time of attention in one pass: on either side, over what stayed in GPU memory and what did not.

Every coefficient is linear in KV heads and bytes; see `terms` for the linears of a pass.
"""

from dataclasses import dataclass

from placement.cost.terms import Call, cpu_call_s, handover_s
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import KV_BITS, AttentionRate, attention_of_few_heads, nearest_attention
from placement.plan.shards import KvShard
from placement.plan.workload import Workload

MOST_VECTORS = 8  # queries of one KV head for which the CPU takes a page once; more of them find it in its cache


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Coefficients of one layer's attention in one pass, for a given number of KV slots in GPU memory.

    cpu_s, dram_bytes: of a KV head owned by the CPU; spilled_s, spilled_bytes: of the older tokens of a GPU KV head,
    which the CPU attends in place for one row and the GPU for several, once streamed_bytes of them have crossed the
    bus;
    gpu_s: of the recent tokens of a GPU KV head. read_s: of cpu_s, the seconds for which it reads DRAM as fast as it
    can.
    """

    cpu_s_per_kv_head: float
    spilled_s_per_kv_head: float
    gpu_s_per_kv_head: float
    dram_bytes_per_kv_head: float
    spilled_bytes_per_kv_head: float
    streamed_bytes_per_kv_head: float
    handover_s: float
    launch_s: float
    read_s_per_kv_head: float


def attention_key(shard: KvShard, gpu_tokens: int) -> tuple[int, ...]:
    """What caches have in common whose attention costs the same in a pass."""
    return shard.kv_heads, shard.bytes_per_token, shard.window, shard.heads, shard.head_dim, gpu_tokens


def cpu_attention_rate(
    shard: KvShard, workload: Workload, hardware: HardwareProfile, vectors: float = 0.0
) -> AttentionRate:
    """Rates of CPU attention over this cache: measured for the most similar one, else overall. vectors: queries that
    share a KV head, 0 for those of one row."""
    bits, heads = KV_BITS[workload.kv_dtype], vectors or workload.heads_of(shard) / shard.kv_heads
    if hardware.cpu_attention:
        near = nearest_attention(hardware.cpu_attention, bits, heads, workload.head_dim_of(shard))
        return attention_of_few_heads(hardware.cpu_attention, near, heads, hardware.dram_bytes_per_s)
    overall = hardware.cpu_attention_bytes_per_s, hardware.cpu_attention_ops_per_s
    return AttentionRate(bits, round(heads), workload.head_dim_of(shard), *overall)


def attention_cost(
    kv: KvShard, call: Call, gpu_tokens: int, workload: Workload, hardware: HardwareProfile, on_gpu: bool
) -> AttentionCost:
    """Coefficients of attention: K and V read once per pass, 4 * head_dim operations per query head, row and key.

    A chunk of q_len rows sees on average context + (q_len + 1) / 2 keys, capped by the sliding window. Drafts are rows
    of a decode step: the CPU takes them as it takes heads that share K and V, and reads those once; on the GPU each
    reads them by itself.
    """
    new, rows_of_one = call.q_len + call.drafts, 1 + call.drafts
    keys = kv.visible_tokens(call.context + (new + 1) // 2)
    stored = kv.visible_tokens(call.stored)
    near = min(stored, gpu_tokens / call.sequences) if on_gpu else 0
    far_share = (stored - near) / stored
    heads = workload.heads_of(kv) / kv.kv_heads
    operations = 4 * workload.head_dim_of(kv) * heads * call.rows * keys
    read = call.sequences * stored * kv.bytes_per_token
    together = max(heads, min(heads * rows_of_one, MOST_VECTORS))
    rate = cpu_attention_rate(kv, workload, hardware, together)
    # One row a sequence is what the first rate was measured with, its arithmetic included.
    computed = 0.0 if call.q_len == 1 else operations * (1 + rate.extra_keys / keys) / rate.ops_per_s
    cpu = max(heads * rows_of_one / together * read / rate.bytes_per_s, computed)
    if not on_gpu:
        return AttentionCost(cpu, 0.0, 0.0, read, 0.0, 0.0, 0.0, cpu_call_s(call, hardware, on_gpu), 0.0)
    streams = call.q_len > 1
    gpu = max(rows_of_one * read / hardware.gpu_bytes_per_s, operations / hardware.gpu_attention_ops_per_s)
    features = workload.heads_of(kv) * workload.head_dim_of(kv)
    return AttentionCost(
        cpu,
        0.0 if streams else far_share * cpu,
        gpu if streams else (1 - far_share) * gpu,
        read,
        far_share * read,
        far_share * read if streams else 0.0,
        handover_s(call.rows, features, features, hardware),
        hardware.launch_overhead_s,
        read / rate.bytes_per_s,
    )


def attention_handovers(cpu_linear_units: int, gpu_kv_heads: int, kv_heads: int, spills: bool) -> int:
    """Hand-overs of attention itself, beyond that of qkv.

    None when the GPU owns every KV head and nothing spilled, or when exactly the KV heads whose q, k, v the CPU
    computed
    are attended there: their results cross once, after attention. Otherwise one.
    """
    attended_by_cpu = kv_heads - gpu_kv_heads
    if spills and gpu_kv_heads:
        return 1
    return int(attended_by_cpu > cpu_linear_units)
