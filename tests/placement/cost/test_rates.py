"""Measured rates: between row counts, by cache dtype and head sharing, in cache and from DRAM, and how costs use
them."""

from dataclasses import replace

import pytest

from placement import HardwareProfile, LinearPlacement
from placement.cost.attention import attention_cost, cpu_attention_rate
from placement.cost.model import pass_cost, predict
from placement.cost.terms import (
    GPU_PRODUCT_BYTES,
    Call,
    cpu_linear_s_per_unit,
    gpu_products,
    linear_cost,
    queueing_s,
    step_s,
)
from placement.machine.rates import (
    KV_BITS,
    AttentionRate,
    DtypeRates,
    RowRate,
    ThreadRate,
    attention_of_few_heads,
    beside_memory,
    nearest_attention,
    seconds_per_operation_of_a_row,
)
from placement.solve.pairing import paired_workload
from tests.placement.cost.test_cost import MACHINE, placed, rates
from tests.support.planning.planning_models import llama_8b, tiny, with_row_cuts

CURVE = (RowRate(1, rates(1e9)), RowRate(4, rates(4e9)), RowRate(64, rates(16e9)))
# Decode attention over bf16 on two cores of one Zen 4 whose memory has two speeds, GB/s: with 1, 3 and 8 query heads a
# group of 64 and 4 of 128 at one speed of a plain read, and what it then reached at the other.
BESIDE_MEMORY = (
    (24.5, 33.0, 57.0, 25.8),
    (28.5, 33.0, 57.0, 34.6),
    (19.3, 33.0, 57.0, 18.6),
    (24.6, 33.0, 57.0, 25.3),
    (25.8, 57.0, 33.0, 24.5),
    (34.6, 57.0, 33.0, 28.5),
    (18.6, 57.0, 33.0, 19.3),
    (25.3, 57.0, 33.0, 24.6),
    (33.0, 33.0, 57.0, 57.0),
)


@pytest.mark.parametrize(
    ("rows", "nanoseconds"), [(1, 1.0), (2, 1.0), (4, 1.0), (34, 2.5), (64, 4.0), (128, 8.0), (640, 40.0)]
)
def test_time_runs_straight_between_measured_rows_and_grows_beyond(rows, nanoseconds):
    assert pytest.approx(1e-9 * nanoseconds) == seconds_per_operation_of_a_row(CURVE, rows, "bf16")


def test_attention_takes_the_dtype_first_and_then_the_shape():
    found = [AttentionRate(bits, heads, 128, 1.0, 1.0) for bits in (32, 16, 4.5) for heads in (1, 4, 8)]

    nearest = [nearest_attention(found, bits, heads, 64) for bits, heads in ((16, 5), (16, 1.2), (5, 7), (32, 100))]

    assert [(16, 4), (16, 1), (4.5, 8), (32, 8)] == [(rate.bits, rate.heads_per_group) for rate in nearest]


def test_rows_and_activations_make_up_a_linear():
    shard = tiny().linears[0]
    machine = replace(MACHINE, cpu_rows=CURVE, cpu_activation_s=rates(1e-6))

    cost = linear_cost(shard, 4, "bf16", machine, on_gpu=False, call_s=0.5)

    assert pytest.approx(shard.flops_per_row_per_unit * 1e-9) == cpu_linear_s_per_unit(shard, 4, "bf16", machine)
    assert pytest.approx(shard.flops_per_row_per_unit * 1e-9 + 4e-6 * shard.unit_features) == cost.cpu_s_per_unit
    assert pytest.approx(0.5 + 4e-6 * shard.in_features) == cost.launch_s


def test_a_chunk_pays_for_whole_tiles_on_its_diagonal():
    workload = tiny(context=4096)
    base = AttentionRate(16, 2, 16, 1e15, 1e9)
    plain, tiled = (
        attention_cost(
            workload.kv[0], Call(1, 9, 0), 0, workload, replace(MACHINE, cpu_attention=(rate,)), False
        ).cpu_s_per_kv_head
        for rate in (base, replace(base, extra_keys=5.0))
    )

    assert pytest.approx(2.0) == tiled / plain


def cached_machine() -> HardwareProfile:
    return replace(
        MACHINE,
        cpu_cache_bytes=1000,
        cpu_cached_bytes_per_s=rates(160e9),
        step_overhead_s=4.0,
        cached_step_overhead_s=1.0,
        cpu_attention=(AttentionRate(16, 1, 64, 10e9, 1e12, 0.0, 50e9),),
    )


def test_what_fits_in_the_cache_is_read_from_it():
    inside, outside = (cached_machine().for_working_set(size) for size in (500, 3000))

    assert (160e9, 1.0, 50e9) == (
        inside.cpu_linear_bytes_per_s.q4,
        inside.step_overhead_s,
        inside.cpu_attention[0].bytes_per_s,
    )
    assert (40e9, 4.0, 10e9, 50e9) == (
        outside.cpu_linear_bytes_per_s.q4,
        outside.step_overhead_s,
        outside.cpu_attention[0].bytes_per_s,
        outside.dram_bytes_per_s,
    )


def test_a_larger_working_set_is_never_read_faster_and_one_profile_is_adapted_once():
    speeds = [cached_machine().for_working_set(size).cpu_linear_bytes_per_s.bf16 for size in range(100, 4000, 100)]
    adapted = cached_machine().for_working_set(1500)

    assert speeds == sorted(speeds, reverse=True)
    assert adapted == adapted.for_working_set(10)


def test_a_profile_as_it_is_now_scales_memory_and_arithmetic_apart():
    attention = AttentionRate(16, 1, 64, MACHINE.dram_bytes_per_s, 100.0)
    machine = replace(MACHINE, cpu_rows=CURVE, cpu_attention=(attention,))

    now = machine.as_now(machine.dram_bytes_per_s / 2, 0.5)

    assert (0.5e9, 2e9, 8e9) == tuple(rate.ops_per_s.q8 for rate in now.cpu_rows)
    assert (0.5 * attention.bytes_per_s, 50.0) == (now.cpu_attention[0].bytes_per_s, now.cpu_attention[0].ops_per_s)
    assert 0.5 * machine.dram_bytes_per_s == now.dram_bytes_per_s == now.sweep_bytes_per_s


def test_a_profile_as_it_is_now_is_measured_by_what_a_plain_read_reached():
    """The DRAM rate is the best of all measurements; a read that reaches what it did then says that nothing changed."""
    sweep = (ThreadRate(4, 30e9, 33e9), ThreadRate(MACHINE.cores, 44e9, 40e9))
    machine = replace(MACHINE, thread_sweep=sweep)

    halved = machine.as_now(20e9)

    assert machine == machine.as_now(40e9) and 40e9 == machine.sweep_bytes_per_s < machine.dram_bytes_per_s
    assert (25e9, 20e9, 20e9) == (
        halved.dram_bytes_per_s,
        halved.cpu_linear_bytes_per_s.bf16,
        halved.sweep_bytes_per_s,
    )
    assert machine == halved.as_now(40e9)


@pytest.mark.parametrize(("rate", "then", "now", "expected"), BESIDE_MEMORY)
def test_what_waits_for_memory_follows_it_and_what_computes_does_not(rate, then, now, expected):
    assert pytest.approx(expected, rel=0.07) == beside_memory(rate, then, now)


def test_a_rate_beside_memory_comes_back_and_never_falls_when_memory_is_faster():
    speeds = [beside_memory(25.0, 36.0, now) for now in range(5, 200, 5)]

    assert speeds == sorted(speeds) and all(speed < now for speed, now in zip(speeds, range(5, 200, 5), strict=True))
    assert pytest.approx(25.0) == beside_memory(beside_memory(25.0, 36.0, 57.0), 57.0, 36.0)


@pytest.mark.parametrize("own,expected", [(20.0, 15.8), (1000.0, 33.0)])
def test_a_rate_from_the_cache_says_how_far_a_kernel_follows_memory(own, expected):
    """Both kernels read 15 beside 30; the one that computes at 20 gains little from memory twice as fast."""
    bound = [(sweep**-4 + own**-4) ** -0.25 for sweep in (30.0, 66.0)]

    assert pytest.approx(15.0 * bound[1] / bound[0]) == beside_memory(15.0, 30.0, 66.0, own)
    assert pytest.approx(expected, rel=0.01) == beside_memory(15.0, 30.0, 66.0, own)
    assert pytest.approx(15.0) == beside_memory(beside_memory(15.0, 30.0, 66.0, own), 66.0, 30.0, own)


# What three CPUs read a second of a cache, GB/s: their memory; from it, with four query heads per KV head; the same from
# the cache; that with eight heads; and from memory with one head, as it was measured.
FEW_HEADS = {
    "q8, two cores of a Zen 3": (16.1, 7.2, 8.2, 4.8, 9.4),
    "q4, two cores of a Zen 3": (16.1, 3.6, 3.3, 2.1, 6.0),
    "q4, two cores of a Zen 4": (33.0, 13.0, 12.2, 8.2, 20.1),
    "q8, 15 threads of a Xeon with AMX": (175.0, 109.2, 97.2, 58.7, 154.4),
    "q4, 15 threads of a Xeon with AMX": (175.0, 74.2, 56.1, 38.4, 118.5),
    "bf16, 15 threads of a Xeon with AMX": (175.0, 133.3, 88.8, 53.7, 165.8),
}


@pytest.mark.parametrize("case", FEW_HEADS)
def test_one_head_is_told_from_four_and_eight_within_a_third(case):
    """No profile measures one head, whose kernels are a fifth of all that a profile compiled."""
    dram, of_four, cached_four, cached_eight, measured = FEW_HEADS[case]
    found = [
        AttentionRate(5, 4, 128, of_four, 1.0, 0.0, cached_four),
        AttentionRate(5, 8, 128, 1, 1.0, 0.0, cached_eight),
    ]

    one, two, three = (attention_of_few_heads(found, found[0], heads, dram) for heads in (1, 2, 3))

    assert one.bytes_per_s == pytest.approx(measured, rel=0.35)
    assert of_four < two.bytes_per_s <= one.bytes_per_s <= dram
    assert three == found[0] == attention_of_few_heads(found[:1], found[0], 1, dram)


def test_a_cache_is_known_by_its_dtype_however_much_padding_it_has():
    """Rows of 80 numbers are padded to 128 codes in q8: more bits a number than the middle between q8 and bf16."""
    workload = replace(tiny(head_dim=80), kv_dtype="q8")
    shard = replace(workload.kv[0], bytes_per_token=2 * (128 + 4))
    found = tuple(AttentionRate(bits, 1, 64, 1e9, 1e9) for bits in KV_BITS.values())

    rate = cpu_attention_rate(shard, workload, replace(MACHINE, cpu_attention=found))

    assert KV_BITS["q8"] == rate.bits


def test_python_counts_per_layer_only_where_a_step_is_not_recorded():
    workload = tiny()
    machine = replace(MACHINE, step_overhead_s=1.0, layer_overhead_s=0.25, logits_s_per_token=0.5 / workload.vocab_size)

    assert (1.5, 2.5, 1.5) == (
        step_s(workload, Call(1, 1, 0), machine, on_gpu=False),
        step_s(workload, Call(1, 8, 0), machine, on_gpu=False),
        step_s(workload, Call(1, 8, 0), machine, on_gpu=True),
    )


def test_the_head_cannot_hide_behind_copies_that_come_before_it():
    """On the CPU the head computes after the last layer, when nothing is left to copy: the times add up."""
    workload = llama_8b()
    linears, kv = placed(workload, 0.0, 1.0, groups=8)
    head = replace(linears[-1], stream_units=(0,) * 5)

    streamed, on_cpu = (
        pass_cost(workload, cut, kv, MACHINE, Call(1, 1, 1), True) for cut in (linears, (*linears[:-1], head))
    )

    copies = (workload.weight_bytes - workload.linears[-1].total_bytes) / 10e9
    assert pytest.approx(copies + workload.linears[-1].total_bytes / 40e9, rel=1e-3) == on_cpu.seconds
    assert pytest.approx(streamed.lanes["pcie"]) == streamed.seconds


def test_terms_add_up_to_the_resources():
    workload = tiny()
    linears, kv = placed(workload, 0.25, 0.25, groups=1)
    cost = predict(
        workload, linears, kv, HardwareProfile.named("emulated"), phase="decode", rows=1, context=50, on_gpu=True
    )
    terms, lanes = dict(cost.terms), dict(cost.lanes)

    assert pytest.approx(lanes["gpu"]) == terms["gpu_linears"] + terms["gpu_attention"] + terms["small_ops"]
    slowed = (1 - 0.8) * lanes["pcie"]
    assert pytest.approx(lanes["cpu"] - slowed) == terms["cpu_linears"] + terms["cpu_attention"]
    assert pytest.approx(lanes["pcie"]) == terms["copies"]


def test_tables_survive_json_and_bad_ones_are_named():
    machine = replace(cached_machine(), cpu_rows=CURVE)
    values = machine.to_dict()

    assert machine == HardwareProfile.from_json(machine.to_json())
    with pytest.raises(ValueError, match=r"cpu_rows\[0\] needs one value for each of rows, ops_per_s"):
        HardwareProfile.from_dict(values | {"cpu_rows": [{"rows": 1}]})
    with pytest.raises(ValueError, match="cpu_rows must have ascending row counts, got .4, 1."):
        replace(machine, cpu_rows=(CURVE[1], CURVE[0]))


def test_a_thread_less_scales_the_tables_too():
    machine = replace(MACHINE, cpu_rows=CURVE, cpu_activation_s=DtypeRates(1.0, 1.0, 1.0, 1.0))

    half = machine.with_threads(4)

    assert (8e9, 2.0) == (half.cpu_rows[2].ops_per_s.bf16, half.cpu_activation_s.bf16)


def test_a_paired_block_hands_over_once_and_meets_once():
    workload = tiny(layers=1)
    machine = replace(MACHINE, handover_s=1.0)
    linears, kv = placed(workload, 0.5, 0.0, groups=1)
    call = Call(1, 1, 1)

    column = pass_cost(workload, linears, kv, machine, call, True)
    rows = paired_workload(with_row_cuts(workload))
    beside, _ = placed(rows, 0.5, 0.0, groups=1)
    together = pass_cost(rows, beside, kv, machine, call, True)

    # Four linears of a layer and the head, against two blocks and the head.
    assert pytest.approx((5.0, 3.0), abs=1e-3) == (column.terms["handovers"], together.terms["handovers"])
    assert together.seconds < column.seconds
    assert all(shard.row_cut == (shard.kind in ("o", "down")) for shard in rows.linears)
    assert rows.weight_bytes == pytest.approx(workload.weight_bytes, rel=0.01)


def test_lanes_of_a_paired_block_may_be_uneven_in_its_parts():
    """The CPU waits in qkv and the GPU in o, or neither: within a block only the sums count."""
    workload = tiny(layers=1)
    linears, kv = placed(workload, 0.5, 0.0, groups=1)
    slow_cpu = replace(MACHINE, cpu_linear_bytes_per_s=rates(1e9), gpu_bytes_per_s=1e9)

    rows = paired_workload(with_row_cuts(workload))
    beside, _ = placed(rows, 0.5, 0.0, groups=1)

    cost = pass_cost(rows, beside, kv, slow_cpu, Call(1, 1, 1), True)
    column = pass_cost(workload, linears, kv, slow_cpu, Call(1, 1, 1), True)

    assert cost.lanes["steps"] <= column.lanes["steps"] * (1 + 1e-9)


def test_a_prompt_takes_at_least_what_python_needs_to_queue_it_and_a_captured_step_does_not():
    workload = llama_8b()
    linears, kv = placed(workload, 1.0, 0.0, groups=8)
    slow = replace(MACHINE, gpu_layer_overhead_s=1.0)

    queued, decoded, before = (
        pass_cost(workload, linears, kv, machine, call, True)
        for machine, call in ((slow, Call(1, 64, 0)), (slow, Call(1, 1, 64)), (MACHINE, Call(1, 1, 64)))
    )

    assert queued.seconds == pytest.approx(workload.num_layers * 1.0 + MACHINE.step_overhead_s, rel=0.01)
    assert queued.terms["step"] > 0.9 * queued.seconds
    assert decoded == before


def kind(workload, name="gate_up"):
    """The first linear of a kind."""
    return next(shard for shard in workload.linears if shard.kind == name)


def test_large_linears_over_codes_are_several_products_and_each_streamed_piece_is_one():
    shard = next(shard for shard in llama_8b().linears if shard.kind == "gate_up")
    half = shard.units // 2
    whole, split = (
        LinearPlacement(shard.name, home, (shard.units - home,) * 5, shard.units) for home in (shard.units, half)
    )
    q4, bf16 = llama_8b(dtype="q4"), llama_8b(dtype="bf16")
    at_home = -(-2 * shard.out_features * shard.in_features // GPU_PRODUCT_BYTES)
    pieces = [-(-half // (each.staging_piece_bytes // kind(each).unit_bytes)) for each in (q4, bf16)]

    assert (at_home, 1) == tuple(gpu_products(kind(each), whole, 512, each, MACHINE) for each in (q4, bf16))
    assert (2 + pieces[0], 1 + pieces[1]) == tuple(
        gpu_products(kind(each), split, 512, each, MACHINE) for each in (q4, bf16)
    )
    in_int8 = replace(MACHINE, gpu_q4_int8_rows=512)
    assert 1 == gpu_products(kind(q4), whole, 512, q4, in_int8) < gpu_products(kind(q4), whole, 513, q4, in_int8)
    assert at_home == 4 and pieces[0] > 3 and pieces[1] > 12


def test_a_product_more_than_the_four_of_a_layer_costs_what_was_measured_of_one():
    workload = llama_8b()
    linears, _ = placed(workload, 0.5, 0.5, groups=8)
    machine = replace(MACHINE, gpu_layer_overhead_s=1.0, gpu_product_overhead_s=0.25)
    pairs = list(zip(workload.linears, linears, strict=True))
    products = sum(gpu_products(s, p, 64, workload, machine) for s, p in pairs if s.kind != "head")

    cheap, dear = (
        queueing_s(workload, products, Call(1, 64, 0), replace(machine, gpu_product_overhead_s=each), True)
        for each in (0.25, 0.5)
    )

    assert cheap == workload.num_layers + 0.25 * (products - 4 * workload.num_layers)
    assert dear - cheap == 0.25 * (products - 4 * workload.num_layers) > 0
