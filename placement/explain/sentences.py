"""What an explanation says in sentences: what decides the time, and what a reader should know of the rates."""

from collections.abc import Iterator

from placement.cost.attention import cpu_attention_rate
from placement.cost.objective import MODEL_ERROR
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import KV_BITS, AttentionRate
from placement.plan.phase import RESOURCE_WORDS, PhaseCost
from placement.plan.plan import Plan
from placement.plan.shards import KvShard
from placement.plan.units import format_bytes
from placement.plan.workload import Workload
from placement.policy.policy import Policy

ALIKE_SHARING = 2  # query heads per KV head that differ by no more than this factor go by each other without a word


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


def notes(plan: Plan, hardware: HardwareProfile, policy: Policy) -> Iterator[str]:
    """What a reader of the plan should know: its shape, where its rates come from, what does not fit the machine."""
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
    yield from _borrowed_attention(plan.workload, hardware)
    host = plan.memory.host_bytes + plan.memory.pinned_bytes
    if host > hardware.dram_bytes:
        has = format_bytes(hardware.dram_bytes)
        yield f"The plan needs {format_bytes(host)} of host memory; {hardware.name} has {has}."
    if plan.gpu_memory_bytes is not None and plan.gpu_memory_bytes > hardware.gpu_memory_bytes:
        has = format_bytes(hardware.gpu_memory_bytes)
        yield f"The GPU budget of {format_bytes(plan.gpu_memory_bytes)} is more than the {has} of {hardware.name}."


def _borrowed_attention(workload: Workload, hardware: HardwareProfile) -> Iterator[str]:
    """Whose rates are taken for attention over a cache like the model's that was not measured."""
    if not (hardware.cpu_attention and workload.kv):
        return
    pairs: dict[str, None] = {}
    for shard in workload.kv:
        pairs |= dict.fromkeys(_stand_ins(shard, workload, cpu_attention_rate(shard, workload, hardware)))
    if pairs:
        yield (
            f"There are no rates of some of this model's attention for {hardware.name}; planned are "
            f"{', '.join(pairs)}. "
            "`hetero-attn profile --for MODEL` measures them there."
        )


def _stand_ins(shard: KvShard, workload: Workload, rate: AttentionRate) -> Iterator[str]:
    """In what the attention whose rate is taken differs from a layer's."""
    if rate.bits != KV_BITS[workload.kv_dtype]:
        names = {bits: name for name, bits in KV_BITS.items()}
        yield f"a {workload.kv_dtype} cache by one in {names.get(rate.bits, f'{rate.bits:g} bits')}"
    heads, size = workload.heads_of(shard) / shard.kv_heads, workload.head_dim_of(shard)
    if not 1 / ALIKE_SHARING <= heads / rate.heads_per_group <= ALIKE_SHARING:
        yield f"{heads:g} query head{'' if heads == 1 else 's'} per KV head by {rate.heads_per_group}"
    if size != rate.head_dim:
        yield f"heads of {size} by those of {rate.head_dim}"


def _borrowed_rates(workload: Workload, hardware: HardwareProfile) -> Iterator[str]:
    """Which formats of the weights the profile has not met, and whose rates are taken."""
    borrowed = hardware.cpu_linear_bytes_per_s.borrowed(workload.weight_formats)
    if borrowed:
        pairs = ", ".join(f"{name} by those of {measured}" for name, measured in borrowed.items())
        yield (
            f"There are no rates of some formats of these weights for {hardware.name}; planned are {pairs}. "
            "`hetero-attn profile --for MODEL` measures them there."
        )
