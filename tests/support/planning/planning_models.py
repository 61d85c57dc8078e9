"""Workloads and machines for the planning tests: real shapes by name, and small random ones for exhaustive search."""

import random
from dataclasses import replace

from placement import HardwareProfile, KvShard, LinearShard, Workload
from placement.machine.rates import DtypeRates

# The blocks of a decoder's layer: a linear, and the one behind it that a paired plan cuts by rows.
BLOCKS = {"qkv": "attention", "o": "attention", "gate_up": "mlp", "down": "mlp", "head": "head"}
FIRST_OF = {"o": "qkv", "down": "gate_up"}

BITS_PER_WEIGHT = {"fp32": 32, "bf16": 16, "q8": 8.5, "q4": 4.5}


def linear(
    name: str, kind: str, layer: int | None, units: int, unit_features: int, in_features: int, dtype: str = "bf16"
) -> LinearShard:
    """A shard with the sizes that its shape implies."""
    unit_bytes = int(unit_features * in_features * BITS_PER_WEIGHT[dtype] / 8)
    return LinearShard(
        name,
        kind,
        layer,
        units,
        unit_bytes,
        unit_features,
        in_features,
        2 * unit_features * in_features,
        block=BLOCKS[kind],
        per_kv_head=kind == "qkv",
    )


def decoder(
    name: str,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    dtype: str = "bf16",
    context: int = 4096,
    batch: int = 1,
    chunk: int = 512,
    page_size: int = 16,
    windows: tuple[int, ...] = (0,),
) -> Workload:
    """A Llama-shaped workload; layer i has sliding window windows[i % len(windows)]."""
    linears, kv = [], []
    for i in range(layers):
        group_features = (heads // kv_heads + 2) * head_dim
        linears += [
            linear(f"layers.{i}.qkv", "qkv", i, kv_heads, group_features, hidden, dtype),
            linear(f"layers.{i}.o", "o", i, hidden // 16, 16, heads * head_dim, dtype),
            linear(f"layers.{i}.gate_up", "gate_up", i, intermediate // 16, 32, hidden, dtype),
            linear(f"layers.{i}.down", "down", i, hidden // 16, 16, intermediate, dtype),
        ]
        kv.append(KvShard(f"layers.{i}.kv", i, kv_heads, 4 * head_dim, windows[i % len(windows)]))
    linears.append(linear("head", "head", None, -(-vocab // 16), 16, hidden, dtype))
    return Workload(
        name,
        dtype,
        tuple(linears),
        tuple(kv),
        int(vocab * hidden * BITS_PER_WEIGHT[dtype] / 8),
        layers * 8 * hidden,
        4 * (2 * hidden + 3 * intermediate + 2 * heads * head_dim),
        context,
        batch,
        page_size,
        heads,
        head_dim,
        hidden,
        vocab,
        chunk,
    )


def llama_8b(**options) -> Workload:
    """The shape of Llama-3.1-8B."""
    return decoder(
        "llama-8b",
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        **options,
    )


def qwen_14b(**options) -> Workload:
    """The shape of Qwen3-14B."""
    shape = {"hidden": 5120, "intermediate": 17408, "heads": 40, "kv_heads": 8, "head_dim": 128, "vocab": 151936}
    return decoder("qwen-14b", layers=40, **shape, **options)


def qwen_32b(**options) -> Workload:
    """The shape of Qwen3-32B."""
    shape = {"hidden": 5120, "intermediate": 25600, "heads": 64, "kv_heads": 8, "head_dim": 128, "vocab": 151936}
    return decoder("qwen-32b", layers=64, **shape, **options)


def llama_70b(**options) -> Workload:
    """The shape of Llama-3.1-70B."""
    return decoder(
        "llama-70b",
        layers=80,
        hidden=8192,
        intermediate=28672,
        heads=64,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        **options,
    )


def tiny(**options) -> Workload:
    """Four small layers, for tests of everything but speed."""
    return decoder(
        "tiny",
        **(
            {
                "layers": 4,
                "hidden": 64,
                "intermediate": 128,
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 16,
                "vocab": 256,
                "context": 128,
                "chunk": 32,
            }
            | options
        ),
    )


def random_machine(rng: random.Random) -> HardwareProfile:
    """Rates drawn over the ranges in which the lanes compete: no lane is always best."""

    def rates(low: float, high: float) -> DtypeRates:
        return DtypeRates(*[rng.uniform(low, high)] * 4)

    dram = rng.uniform(2e7, 1e8)
    return HardwareProfile(
        "random",
        "invented for a test",
        4,
        10**9,
        dram,
        rates(0.4 * dram, dram),
        rates(1e8, 4e9),
        0.7 * dram,
        rng.uniform(1e8, 1e9),
        h2d_bytes_per_s=rng.uniform(0.2, 1.2) * dram,
        d2h_bytes_per_s=dram,
        gpu_memory_bytes=10**9,
        gpu_bytes_per_s=rng.uniform(1.5, 20) * dram,
        gpu_flops=rates(2e9, 4e10),
        gpu_attention_ops_per_s=1e10,
        handover_s=rng.choice([0.0, 1e-5, 1e-4, 1e-3]),
        cpu_slowdown_while_copying=rng.uniform(0.6, 1.0),
        launch_overhead_s=1e-6,
        cpu_call_s=1e-6,
        unified_memory=rng.random() < 0.1,
        copy_slowdown_while_computing=rng.uniform(0.4, 1.0),
    )


def random_workload(rng: random.Random, *, max_units: int = 2, with_head: bool = True) -> Workload:
    """One or two layers of few, unequal units, so that every placement can be enumerated."""
    groups = rng.randint(1, max_units)
    base = tiny(layers=1, kv_heads=groups, heads=2 * groups, context=rng.choice([32, 64]), chunk=rng.choice([16, 64]))
    linears = [
        replace(linear("layers.0.qkv", "qkv", 0, groups, 64, rng.choice([32, 64, 96]))),
        replace(linear("layers.0.down", "down", 0, rng.randint(1, max_units), 16 * rng.randint(1, 8), 128)),
    ]
    if with_head:
        linears.append(linear("head", "head", None, rng.randint(1, max_units), 16 * rng.randint(1, 12), 64))
    kv = KvShard("layers.0.kv", 0, groups, rng.choice([16, 64, 256]), rng.choice([0, 0, 24]))
    return replace(base, linears=tuple(linears), kv=(kv,))


def with_row_cuts(workload: Workload) -> Workload:
    """The workload, and beside it its o and down in as many row-cut units as the linear before has."""
    units = {(shard.layer, shard.kind): shard.units for shard in workload.linears}
    rows = []
    for shard in workload.linears:
        if shard.kind in FIRST_OF:
            count = units[shard.layer, FIRST_OF[shard.kind]]
            fields = ("unit_bytes", "unit_features", "flops_per_row_per_unit")
            sizes = {field: -(-getattr(shard, field) * shard.units // count) for field in fields}
            rows.append(replace(shard, units=count, row_cut=True, **sizes))
    return replace(workload, row_cuts=tuple(rows))
