"""The cost model: each term against its equation, its monotony, and figures that others measured and published."""

from dataclasses import replace

import pytest

from placement import HardwareProfile, KvPlacement, LinearPlacement, Policy, make_plan
from placement.cost.attention import attention_cost, attention_handovers
from placement.cost.baselines import layer_split, stream_all
from placement.cost.model import pass_cost, predict
from placement.cost.terms import (
    Call,
    cpu_linear_s_per_unit,
    gpu_linear_s_per_unit,
    handover_s,
)
from placement.machine.rates import DtypeRates
from tests.support.planning.planning_models import decoder, linear, llama_8b, tiny

GB, GFLOP = 1e9, 1e9


def rates(value: float) -> DtypeRates:
    return DtypeRates(value, value, value, value)


def ideal_machine(*, dram: float, cpu: float, pcie: float, gpu: float, gpu_memory: int = 32 * 10**9) -> HardwareProfile:
    """Bandwidths in GB/s and nothing else: no hand-overs, no overheads, unlimited arithmetic."""
    return HardwareProfile(
        "ideal",
        "entered for a test",
        8,
        10**12,
        dram * GB,
        rates(cpu * GB),
        rates(1e18),
        cpu * GB,
        1e18,
        h2d_bytes_per_s=pcie * GB,
        d2h_bytes_per_s=1e18,
        gpu_memory_bytes=gpu_memory,
        gpu_bytes_per_s=gpu * GB,
        gpu_flops=rates(1e18),
        gpu_attention_ops_per_s=1e18,
        cpu_call_s=0.0,
    )


MACHINE = ideal_machine(dram=50, cpu=40, pcie=10, gpu=400)


def placed(workload, gpu: float, stream: float, groups: int = 0):
    """The same fractions of every linear, in every row tier."""
    linears = tuple(
        LinearPlacement(s.name, round(gpu * s.units), (round(stream * s.units),) * 5, s.units) for s in workload.linears
    )
    tokens = workload.full_tokens if groups else 0
    return linears, tuple(KvPlacement(s.name, groups, tokens, s.kv_heads) for s in workload.kv)


def test_cpu_linear_is_bound_by_bytes_then_by_operations():
    shard = linear("head", "head", None, 4, 16, 64)
    machine = replace(MACHINE, cpu_ops_per_s=rates(100 * GFLOP))

    few, many = (cpu_linear_s_per_unit(shard, rows, "bf16", machine) for rows in (1, 512))

    assert (shard.unit_bytes / 40e9, 512 * 2 * 16 * 64 / 100e9) == (few, many)


def test_gpu_linear_is_bound_by_bytes_then_by_operations():
    shard = linear("head", "head", None, 4, 16, 64)
    machine = replace(MACHINE, gpu_flops=rates(1000 * GFLOP))

    few, many = (gpu_linear_s_per_unit(shard, rows, "bf16", machine) for rows in (1, 512))

    assert (shard.unit_bytes / 400e9, 512 * 2 * 16 * 64 / 1000e9) == (few, many)


def test_handover_is_a_fixed_cost_and_rows_both_ways():
    machine = replace(MACHINE, handover_s=1e-5, d2h_bytes_per_s=1e9)

    assert pytest.approx(1e-5 + 2 * 100 * 4 / 1e9 + 2 * 50 * 4 / 10e9) == handover_s(2, 100, 50, machine)


def test_attention_reads_its_segment_where_it_lies():
    workload = tiny(kv_heads=2, head_dim=16, context=128)
    shard = workload.kv[0]

    cost = attention_cost(shard, Call(1, 1, 99), 80, workload, MACHINE, True)

    read = 100 * shard.bytes_per_token
    assert pytest.approx((read / 40e9, 0.2 * read / 40e9, 0.8 * read / 400e9)) == (
        cost.cpu_s_per_kv_head,
        cost.spilled_s_per_kv_head,
        cost.gpu_s_per_kv_head,
    )


def test_a_sliding_window_bounds_what_is_read():
    workload = tiny(windows=(32,))

    cost = attention_cost(workload.kv[0], Call(1, 1, 99), 64, workload, MACHINE, True)

    assert (32 * workload.kv[0].bytes_per_token, 0.0) == (cost.dram_bytes_per_kv_head, cost.spilled_s_per_kv_head)


@pytest.mark.parametrize(
    ("cpu_units", "gpu_kv_heads", "spills", "expected"),
    [
        (0, 4, False, 0),
        (1, 3, False, 0),
        (2, 3, False, 0),
        (0, 3, False, 1),
        (1, 2, False, 1),
        (0, 4, True, 1),
        (4, 0, True, 0),
    ],
)
def test_attention_hands_over_only_what_qkv_did_not(cpu_units, gpu_kv_heads, spills, expected):
    assert expected == attention_handovers(cpu_units, gpu_kv_heads, 4, spills)


def test_resources_add_up_over_a_pass():
    workload = replace(llama_8b(), kv=tuple(replace(kv, bytes_per_token=1) for kv in llama_8b().kv))
    linears, kv = placed(workload, 0.25, 0.25, groups=8)

    lanes = pass_cost(workload, linears, kv, MACHINE, Call(1, 1, 1), True).lanes

    weights = workload.weight_bytes
    assert pytest.approx(
        (0.25 * weights / 10e9, 0.75 * weights / 50e9, 0.5 * weights / 40e9, 0.5 * weights / 400e9), 1e-2
    ) == (lanes["pcie"], lanes["dram"], lanes["cpu"], lanes["gpu"])


def test_copies_slow_the_cpu_lane():
    workload = llama_8b()
    linears, kv = placed(workload, 0.0, 0.25, groups=8)
    slowed = replace(MACHINE, cpu_slowdown_while_copying=0.8)

    alone, together = (
        pass_cost(workload, linears, kv, machine, Call(1, 1, 1), True).lanes for machine in (MACHINE, slowed)
    )

    assert pytest.approx(alone["cpu"] + 0.2 * alone["pcie"]) == together["cpu"]


def together_s(cpu_s: float, copy_s: float, cpu_share: float, copy_share: float) -> float:
    """Two lanes that slow each other while both run, step by step of a millionth of their time."""
    time, step = 0.0, (cpu_s + copy_s) / 1e5
    while cpu_s > 0 or copy_s > 0:
        both = cpu_s > 0 and copy_s > 0
        cpu_s -= step * (cpu_share if both else 1.0)
        copy_s -= step * (copy_share if both else 1.0)
        time += step
    return time


@pytest.mark.parametrize("on_cpu,streamed", [(0.5, 0.1), (0.1, 0.5), (0.3, 0.3), (0.6, 0.0), (0.0, 0.6)])
def test_copies_and_the_cpu_lane_slow_each_other_for_as_long_as_both_run(on_cpu, streamed):
    """On the H100 machine copies fell from 53 to 43 GB/s beside a CPU lane that fell from 112 to 77."""
    workload = replace(llama_8b(), kv=tuple(replace(kv, bytes_per_token=1) for kv in llama_8b().kv))
    linears, kv = placed(workload, 1 - on_cpu - streamed, streamed, groups=8)
    machine = replace(MACHINE, cpu_slowdown_while_copying=77 / 112, copy_slowdown_while_computing=43 / 53)

    alone, lanes = (pass_cost(workload, linears, kv, each, Call(1, 1, 1), True).lanes for each in (MACHINE, machine))

    expected = together_s(alone["cpu"], alone["pcie"], 77 / 112, 43 / 53)
    assert pytest.approx(max(lanes["cpu"], lanes["pcie"]), rel=1e-3) == expected


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_longer_context_and_a_slower_machine_are_never_faster(phase):
    workload = tiny(context=4096)
    linears, kv = placed(workload, 0.5, 0.25, groups=1)
    machine = HardwareProfile.named("emulated")
    slower = replace(machine, gpu_bytes_per_s=machine.gpu_bytes_per_s / 2, h2d_bytes_per_s=machine.h2d_bytes_per_s / 2)

    seconds = [
        predict(workload, linears, kv, machine, phase=phase, rows=4, context=context, on_gpu=True).seconds
        for context in (0, 1, 100, 1000, 4000)
    ]

    assert seconds == sorted(seconds)
    assert predict(workload, linears, kv, slower, phase=phase, rows=4, context=0, on_gpu=True).seconds >= seconds[0]


def test_a_prompt_is_the_sum_of_its_chunks():
    workload = tiny(chunk=16)
    linears, kv = placed(workload, 0.5, 0.5, groups=2)
    machine = HardwareProfile.named("emulated")

    whole = predict(workload, linears, kv, machine, phase="prefill", rows=40, context=0, on_gpu=True).seconds
    parts = [
        pass_cost(workload, linears, kv, machine, Call(1, rows, start), True, start == 32).seconds
        for start, rows in ((0, 16), (16, 16), (32, 8))
    ]

    assert pytest.approx(sum(parts)) == whole


def test_the_binding_resource_is_named_and_the_others_have_slack():
    workload = llama_8b()
    linears, kv = stream_all(workload)

    cost = predict(workload, linears, kv, MACHINE, phase="decode", rows=1, context=16, on_gpu=True)

    assert "pcie" == cost.binding
    assert pytest.approx(0.0, abs=1e-9) == cost.slack["pcie"] and cost.slack["gpu"] > 0.9


def test_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="phase must be decode or prefill, got 'verify'"):
        predict(tiny(), *placed(tiny(), 1.0, 0.0), MACHINE, phase="verify", rows=1, context=0, on_gpu=True)


# Published: layers on the GPU against tokens/s; RTX 5060 Ti (448 GB/s) and two DDR4-2666 channels (42.7 GB/s peak),
# Qwen2.5-Coder-14B Q4_K_M at 4.85 bits a weight, llama.cpp. Source: inventivehq.com, "The VRAM cliff" (2026).
VRAM_CLIFF = {0: 2.89, 8: 3.58, 16: 4.24, 24: 5.61, 32: 7.26, 40: 12.5, 48: 43.18}


def qwen_14b():
    workload = decoder(
        "qwen2.5-14b",
        layers=48,
        hidden=5120,
        intermediate=13824,
        heads=40,
        kv_heads=8,
        head_dim=128,
        vocab=152064,
        dtype="q4",
        context=1024,
    )
    return replace(
        workload, linears=tuple(replace(s, unit_bytes=int(s.unit_bytes * 4.85 / 4.5)) for s in workload.linears)
    )


def layer_split_tokens_per_s(workload, machine, layers: int) -> float:
    linears, kv = layer_split(workload, layers, head_on_gpu=layers == workload.num_layers)
    return predict(workload, linears, kv, machine, phase="decode", rows=1, context=512, on_gpu=True).tokens_per_s


@pytest.mark.parametrize("layers", VRAM_CLIFF)
def test_bound_of_a_layer_split_is_never_below_the_published_measurement(layers):
    peaks = ideal_machine(dram=42.7, cpu=42.7, pcie=16, gpu=448)

    assert layer_split_tokens_per_s(qwen_14b(), peaks, layers) >= VRAM_CLIFF[layers]


def test_two_measured_ends_predict_the_published_curve_between_them():
    workload = qwen_14b()
    machine = ideal_machine(
        dram=42.7,
        cpu=VRAM_CLIFF[0] * workload.weight_bytes / GB,
        pcie=16,
        gpu=VRAM_CLIFF[48] * workload.weight_bytes / GB,
    )

    errors = {
        layers: layer_split_tokens_per_s(workload, machine, layers) / measured - 1
        for layers, measured in VRAM_CLIFF.items()
    }

    assert max(map(abs, errors.values())) <= 0.15, errors


# Published: GPU memory cap in GB against tokens/s of pipelined sharding (MLSys 2026, table 4): RTX 5090 (1792 GB/s),
# Mistral-NeMo-Minitron-8B fp16, context 1024. The host is not named; its rate is taken from the smallest cap.
PIPELINED_SHARDING = {2: 7.6, 4: 8.6, 6: 10.0, 8: 12.4, 12: 21.6, 24: 70.0}
# The same system against the best llama.cpp split at context 1024: the smallest of the published ratios.
PUBLISHED_LEAST_GAIN = 1.09


def minitron_8b():
    return decoder(
        "minitron-8b",
        layers=40,
        hidden=4096,
        intermediate=11520,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=131072,
        context=1024,
    )


def host_rate(workload) -> float:
    """GB/s at which the smallest cap reads what is not on the GPU; 0.3 GB of every cap hold no weights by our own
    count."""
    return (workload.weight_bytes - 1.7 * GB) / (1 / PIPELINED_SHARDING[2] - 1.7 / 1792) / GB


def sweep_machine(workload) -> HardwareProfile:
    return ideal_machine(dram=host_rate(workload), cpu=0.8 * host_rate(workload), pcie=52, gpu=1792)


@pytest.mark.parametrize("cap_gb", PIPELINED_SHARDING)
def test_bound_of_a_plan_is_never_below_pipelined_sharding(cap_gb):
    workload = minitron_8b()

    plan = make_plan(workload, sweep_machine(workload), Policy(), device="cuda", gpu_memory_bytes=int(cap_gb * GB))

    assert plan.predicted.decode.tokens_per_s >= 0.99 * PIPELINED_SHARDING[cap_gb]


def test_pipelined_sharding_follows_from_bytes_and_two_rates():
    workload = minitron_8b()
    host, gpu = host_rate(workload) * GB, PIPELINED_SHARDING[24] * workload.weight_bytes

    errors = {}
    for cap, measured in PIPELINED_SHARDING.items():
        on_gpu = min((cap - 0.3) * GB, workload.weight_bytes)
        errors[cap] = 1 / ((workload.weight_bytes - on_gpu) / host + on_gpu / gpu) / measured - 1

    assert max(map(abs, errors.values())) <= 0.05, errors


@pytest.mark.parametrize("cap_gb", [4, 6, 8, 12])
def test_methods_rank_as_published(cap_gb):
    """Plan over layer split over streaming everything, and the plan gains at least what was published."""
    workload = minitron_8b()
    machine = sweep_machine(workload)
    plan = make_plan(
        workload, machine, Policy(), device="cuda", gpu_memory_bytes=int(cap_gb * GB)
    ).predicted.decode.tokens_per_s
    layers = int((cap_gb * GB) // (workload.weight_bytes / 41))
    split = layer_split_tokens_per_s(workload, machine, layers)
    streamed = predict(
        workload, *stream_all(workload), machine, phase="decode", rows=1, context=512, on_gpu=True
    ).tokens_per_s

    assert plan > split > streamed
    assert plan / split >= PUBLISHED_LEAST_GAIN


# Roofs derived in the literature notes for ideal kernels: GB of weights, DRAM, CPU, PCIe in GB/s, GB left for weights
# on the GPU, tokens/s of a serial layer split, of streaming everything not resident, and of all three lanes.
ROOFS = {
    "laptop 32B": (18.5, 60, 45, 12, 6.6, 3.53, 1.01, 4.79),
    "desktop 70B": (40.0, 70, 60, 25, 13.2, 2.22, 0.93, 2.61),
    "workstation 70B": (40.0, 260, 180, 52, 21.2, 8.04, 2.77, 12.34),
    "four cores 14B": (9.0, 40, 22, 25, 6.1, 7.39, 8.62, 13.79),
}


@pytest.mark.parametrize("name", ROOFS)
def test_three_lanes_reach_the_derived_roof_and_order_the_methods(name):
    weights_gb, dram, cpu, pcie, resident_gb, split, streamed, three = ROOFS[name]
    base = llama_8b(dtype="q4", context=64)
    scale = weights_gb * GB / base.weight_bytes
    workload = replace(
        base,
        linears=tuple(replace(s, unit_bytes=int(s.unit_bytes * scale)) for s in base.linears),
        activation_bytes_per_row=1,
        resident_bytes=0,
    )
    machine = ideal_machine(dram=dram, cpu=cpu, pcie=pcie, gpu=1000)

    plan = make_plan(workload, machine, Policy(), device="cuda", gpu_memory_bytes=int(resident_gb * GB))

    assert plan.predicted.decode.tokens_per_s == pytest.approx(three, rel=0.06)
    assert plan.predicted.decode.tokens_per_s > max(split, streamed)


def test_layers_that_differ_in_query_heads_alone_cost_their_own():
    """Layers alike in cache and window: one of few query heads must not be counted as one of many."""
    machine = ideal_machine(dram=50, cpu=40, pcie=20, gpu=500)
    machine = replace(machine, cpu_attention_ops_per_s=1e6)
    plain = tiny(kv_heads=2, head_dim=16)

    def seconds(*heads: int) -> float:
        kv = tuple(replace(shard, heads=count) for shard, count in zip(plain.kv, heads, strict=False))
        workload = replace(plain, kv=(*kv, *plain.kv[len(kv) :]))
        return pass_cost(workload, *layer_split(workload, 0), machine, Call(1, 16, 48), on_gpu=False).seconds

    assert seconds(2, 32) == pytest.approx(seconds(32, 2), rel=1e-9) and seconds(2, 32) > 1.1 * seconds(2, 2)
