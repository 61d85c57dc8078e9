"""expert_linear, combine and scale_rows against plain formulas: every format, every cut, and the small ops beside them."""

from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cpu_kernels.contract import Partial, Picks, Routes, Scoring
from cpu_kernels.formats import FORMATS, mix_name, unit_bytes
from cpu_kernels.formats import weights as layout
from gpu_kernels import reference
from gpu_kernels.experts import ordered
from gpu_kernels.experts import routing as gpu_routing
from gpu_kernels.experts.ordered import WHOLE_FORMS
from tests.support.kernels.cpu_oracles import (
    ISAS,
    guarded,
    kernels,
    nmse,
    only_inside_written,
    pack,
    round_input,
    routing,
    unpack,
)

KERNEL_NMSE = 1e-11


@pytest.mark.parametrize("features", [40, 1100])
@pytest.mark.parametrize("ops", [reference, gpu_routing, None], ids=["reference", "gpu", "kernels"])
def test_biases_go_to_the_places_of_their_experts_alone(ops, features):
    """Experts 2 .. 6 of 9, some without picks; what stands elsewhere stays, to the bit. features: of one chunk, or of
    several, the last of which is short."""
    starts = torch.tensor([0, 2, 5, 5, 6, 9, 9, 12, 13, 15], dtype=torch.int32)
    bias, out = torch.randn(5, features + 30)[:, 10:-20], torch.randn(15, features)
    expected = out.clone()
    for expert, (start, stop) in enumerate(zip(starts[2:7].tolist(), starts[3:8].tolist(), strict=True)):
        expected[start:stop] += bias[expert]
    (ops or kernels()).add_expert_bias(bias, Picks(None, starts, 2), out)

    assert torch.equal(out, expected)


@pytest.mark.parametrize("ops", [reference, gpu_routing, None], ids=["reference", "gpu", "kernels"])
def test_a_sink_is_one_more_score_without_a_value(ops):
    """Against the softmax with it, over some of the heads of a wider tensor; no key at all stays zero."""
    scores, values, sinks = torch.randn(5, 3, 11) * 3, torch.randn(5, 3, 11, 20), torch.tensor([-90.0, 0.5, 4.0])
    out = torch.zeros(5, 4, 20)[:, 1:]
    out.copy_(torch.einsum("rhk,rhkd->rhd", torch.softmax(scores, -1), values))
    lse = torch.logsumexp(scores, -1)
    out[4], lse[4] = 0.0, -torch.inf
    (ops or kernels()).add_sinks(sinks, Partial(out, lse))

    with_sink = torch.softmax(torch.cat([scores, sinks.expand(5, 3)[..., None]], -1).double(), -1)[..., :-1]
    expected = torch.einsum("rhk,rhkd->rhd", with_sink, values.double())
    assert nmse(out[:4], expected[:4]) < 1e-12 and not out[4].any()


@pytest.mark.parametrize("ops", [reference, gpu_routing, None], ids=["reference", "gpu", "kernels"])
def test_gates_multiply_by_their_sigmoid(ops):
    """Groups that lie apart in both tensors; gates so far from zero that they shut or change nothing."""
    gate, before = torch.randn(5, 3, 60)[:, :, 10:50] * 30, torch.randn(5, 4, 40)
    out = before.clone()
    (ops or kernels()).sigmoid_mul(gate, out[:, 1:])

    assert nmse(out[:, 1:], before[:, 1:].double() * torch.sigmoid(gate.double())) < 1e-12
    assert torch.equal(out[:, 0], before[:, 0])


def expert_weights(experts: int, blocks: int, in_features: int, weight_dtype: str, gap: int = 0):
    """(packed [experts, blocks, bytes], each expert's run `gap` bytes behind the last one's end; plain in float64)."""
    generator = torch.Generator().manual_seed(blocks + in_features)
    size = blocks * unit_bytes(weight_dtype, in_features)
    memory = torch.full((experts, size + gap), 255, dtype=torch.uint8)
    plain = []
    for each in memory:
        packed = pack(torch.randn(16 * blocks, in_features, generator=generator), weight_dtype)
        each[:size] = packed.flatten()
        plain.append(unpack(packed, weight_dtype, in_features))
    return memory[:, :size].unflatten(1, (blocks, -1)), torch.stack(plain)


def one_by_one(x, sources, starts, first, plain, weight_dtype, out):
    """Every pick multiplied by itself."""
    rounded = round_input(x, weight_dtype)
    for expert in range(plain.shape[0]):
        for place in range(int(starts[first + expert]), int(starts[first + expert + 1])):
            source = place if sources is None else int(sources[place])
            out[place] = (rounded[source] @ plain[expert].T).float()


@pytest.mark.table
@pytest.mark.parametrize("weight_dtype", layout.WEIGHT_DTYPES)
@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "in_features"),
    [(1, 8, 2, 192), (3, 16, 4, 100), (40, 6, 2, 63), (30, 3, 3, 64), (5, 64, 1, 200), (2, 2, 1, 4200)],
)
def test_every_pick_meets_its_own_expert(rows, experts, top_k, in_features, weight_dtype):
    (_, _, sources, starts, _), *_ = routing(rows, 64, experts, top_k)
    weight, plain = expert_weights(experts, 3, in_features, weight_dtype, gap=64)
    x, expected = torch.randn(rows, in_features), torch.zeros(rows * top_k, 48)
    one_by_one(x, sources, starts, 0, plain, weight_dtype, expected)
    out, memory = guarded(rows * top_k, 48)

    kernels().expert_linear(x, Picks(sources, starts, 0), weight, weight_dtype, out)

    assert only_inside_written(memory)
    assert nmse(out, expected) < KERNEL_NMSE


@pytest.mark.parametrize("weight_dtype", ["bf16", "q8", "q4"])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (2, 9), (5, 6), (9, 9)])
def test_a_lane_writes_the_picks_of_its_experts_only(first, last, weight_dtype):
    """Inputs by place, as behind the activation; what other lanes have is left as it was."""
    (_, _, _, starts, _), *_ = routing(7, 64, 9, 3)
    weight, plain = expert_weights(9, 2, 128, weight_dtype)
    x, out = torch.randn(21, 128), torch.full((21, 32), 5.0)
    expected = out.clone()
    one_by_one(x, None, starts, first, plain[first:last], weight_dtype, expected)
    kernels().expert_linear(x, Picks(None, starts, first), weight[first:last], weight_dtype, out)

    assert nmse(out, expected) < KERNEL_NMSE
    assert (out[: starts[first]] == 5).all() and (out[starts[last] :] == 5).all()


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in layout.WEIGHT_DTYPES])
def test_experts_of_every_format_are_what_linear_gives(name):
    """Bytes of any value: scales from small exponents, codes as they come; one expert of many rows, one of few."""
    (_, _, sources, starts, _), *_ = routing(12, 64, 4, 2)
    generator = torch.Generator().manual_seed(3)
    in_features, x = 512, torch.randn(12, 512, generator=generator)
    weight = torch.randint(0, 60, (4, 2, unit_bytes(name, in_features)), generator=generator, dtype=torch.uint8)
    out, expected = torch.zeros(24, 32), torch.zeros(24, 32)
    kernels().expert_linear(x, Picks(sources, starts, 0), weight, name, out)
    for place, source in enumerate(sources.tolist()):
        expert = int((starts[1:] <= place).sum())
        kernels().linear(x[source : source + 1], weight[expert], name, None, expected[place : place + 1])

    assert torch.equal(out, expected) or nmse(out, expected) < KERNEL_NMSE


def test_a_mix_of_formats_in_every_unit():
    (_, _, sources, starts, _), *_ = routing(5, 64, 4, 2)
    mix, parts = mix_name([("q4", 1), ("q8", 2)]), [("q4", 1), ("q8", 2)]
    weight, out = torch.zeros(4, 2, unit_bytes(mix, 128), dtype=torch.uint8), torch.zeros(10, 96)
    plain, at = torch.zeros(4, 2, 48, 128, dtype=torch.float64), 0
    for name, blocks in parts:
        packed, values = expert_weights(4 * 2, blocks, 128, name)
        size = packed[0].numel()
        weight.view(8, -1)[:, at : at + size] = packed.flatten(1)
        rows = slice(0, 16) if name == "q4" else slice(16, 48)
        plain.view(8, 48, 128)[:, rows] = values
        at += size
    x = torch.randn(5, 128)
    expected = torch.zeros(10, 96)
    one_by_one(x, sources, starts, 0, plain.flatten(1, 2), "q8", expected)
    kernels().expert_linear(x, Picks(sources, starts, 0), weight, mix, out)

    assert nmse(out, expected) < KERNEL_NMSE


@pytest.mark.parametrize(
    ("isa", "name"), [*((ISAS[0], name) for name in WHOLE_FORMS), *product(ISAS[1:], ("q4", "q8", "mxfp4"))]
)
def test_whole_number_formats_give_the_bits_of_the_prescribed_order(isa, name):
    """Experts of many rows and of one; bytes of any value but for what would make a scale infinite."""
    (_, _, sources, starts, _), *_ = routing(12, 64, 4, 2)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 512, generator=generator)
    weight = torch.randint(0, 60, (4, 2, unit_bytes(name, 512)), generator=generator, dtype=torch.uint8)
    out, expected = torch.zeros(24, 32), torch.zeros(24, 32)
    reference.expert_linear(x, Picks(sources, starts, 0), weight, name, expected)
    kernels(isa).expert_linear(x, Picks(sources, starts, 0), weight, name, out)

    assert torch.equal(out, expected)


@pytest.mark.parametrize("weight_dtype", ["q8", "q4", "q4_k"])
def test_sums_in_pieces_are_one_chain(weight_dtype):
    """More inputs than a piece has, and more picks than are read as one stream."""
    (_, _, sources, starts, _), *_ = routing(20, 64, 3, 2)
    weight = torch.randint(0, 60, (3, 1, unit_bytes(weight_dtype, 4864)), dtype=torch.uint8)
    x, out, expected = torch.randn(20, 4864), torch.zeros(40, 16), torch.zeros(40, 16)
    reference.expert_linear(x, Picks(sources, starts, 0), weight, weight_dtype, expected)
    kernels().expert_linear(x, Picks(sources, starts, 0), weight, weight_dtype, out)

    assert torch.equal(out, expected)


def test_one_multiplication_and_addition_is_rounded_once():
    """Against whole numbers of any size: products that cancel, a hair beside the half of a last bit, also of a
    subnormal one; each alone too, since most are beyond doubt in float64."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(2000, generator=generator) for _ in range(3))
    c[:500], c[500:900], a[900:1000] = -a[:500] * b[:500], c[500:900] * 2.0**-24, a[900:1000] * 2.0**-130
    a[1000:1100], b[1000:1100], c[1000:1100] = (
        1 + 2.0**-12,
        1 + 2.0**-12,
        torch.tensor([-(2.0**-60), 2.0**-60]).repeat(50),
    )
    a[1100:1200], b[1100:1200] = 2.0**-75 * (1 + 2.0**-23), 2.0**-75 * (1 - 2.0**-23)
    c[1100:1200] = 2.0**-127 + torch.arange(100) * 2.0**-149
    exact = [
        float(np.float32(_nearest(Fraction(x) * Fraction(y) + Fraction(z))))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]

    assert ordered.fma(a, b, c).tolist() == exact
    assert [ordered.fma(*each).item() for each in zip(a, b, c, strict=True)] == exact


def _nearest(value: Fraction) -> float:
    """The float32 nearest to a fraction, of two the one whose last bit is 0."""
    guess = np.float32(float(value))
    near = sorted(
        {guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))},
        key=lambda each: (abs(Fraction(float(each)) - value), int(np.float32(each).view(np.int32)) & 1),
    )
    return float(near[0])


def test_silu_has_the_references_bits():
    gate_up = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 20
    gate_up[0, :7] = torch.tensor([0.0, -0.0, 1e30, -1e30, 88.8, -88.8, 1e-40])
    out, expected = torch.empty(40, 48), torch.empty(40, 48)
    reference.silu_mul(gate_up, expected)
    kernels().silu_mul(gate_up, out)

    assert torch.equal(out, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
def test_every_isa_gives_the_bits_of_single_rows(isa, weight_dtype):
    """Integer formats: a row among many is the same bits as alone, so that chunks and batches agree."""
    (_, _, sources, starts, _), *_ = routing(33, 64, 5, 2)
    weight, _ = expert_weights(5, 2, 192, weight_dtype)
    x, out, single = torch.randn(33, 192), torch.zeros(66, 32), torch.zeros(1, 32)
    kernels(isa).expert_linear(x, Picks(sources, starts, 0), weight, weight_dtype, out)
    for place in (0, 20, 65):
        expert = int((starts[1:] <= place).sum())
        kernels(isa).linear(x[sources[place]][None], weight[expert], weight_dtype, None, single)

        assert torch.equal(single[0], out[place])


def test_clamped_activation():
    """Gates and ups beyond the limit on either side; the same bits as the reference, which every lane keeps."""
    gate_up = torch.randn(7, 5 * 32, generator=torch.Generator().manual_seed(1)) * 6
    gate, up = gate_up.double().view(7, 5, 2, 16).unbind(2)
    out, same = torch.empty(7, 80), torch.empty(7, 80)
    kernels().clamped_silu_mul(gate_up, 1.702, 7.0, out)
    reference.clamped_silu_mul(gate_up, 1.702, 7.0, same)

    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    assert nmse(out, ((up + 1) * gate * torch.sigmoid(1.702 * gate)).flatten(1)) < 1e-13
    assert torch.equal(out, same) and (gate_up.abs() > 7).any()


def test_a_recorded_call_follows_the_routes_in_memory():
    """One recording; every run reads ids, starts and sources anew."""
    weight, plain = expert_weights(12, 2, 64, "q8")
    x, router = torch.zeros(1, 64), routing(1, 64, 12, 3)[2]
    ids, places = (torch.zeros(1, 3, dtype=torch.int32) for _ in range(2))
    sources, starts = torch.zeros(3, dtype=torch.int32), torch.zeros(13, dtype=torch.int32)
    weights, parts, out = torch.zeros(1, 4), torch.zeros(3, 32), torch.zeros(1, 32)
    ops, seen = kernels(), set()

    def step():
        ops.route(x, router, Scoring(True), Routes(ids, places, sources, starts, weights))
        ops.expert_linear(x, Picks(sources, starts, 0), weight, "q8", parts)
        ops.combine(parts, parts, starts[12:], places, weights[:, :3], out)

    program = ops.record(step)
    for seed in range(6):
        x.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)))
        out.zero_()
        program.run()
        seen.add(tuple(ids[0].tolist()))
        expected = sum(weights[0, j].double() * (round_input(x, "q8") @ plain[ids[0, j]].T) for j in range(3))
        assert nmse(out, expected) < KERNEL_NMSE
    assert len(seen) > 3


@pytest.fixture(params=[0, 7, 30])
def picks_to_add(request):
    """Arguments of `combine`: 3 picks a row of 9 experts, those before a place near, the others far."""
    (_, places, _, _, weights), *_ = routing(10, 64, 9, 3)
    near, far, out = torch.randn(30, 70), torch.randn(30, 70), torch.randn(10, 70)
    return near, far, torch.tensor([request.param], dtype=torch.int32), places, weights[:, :3], out


def in_prescribed_order(near, far, border, places, weights, out):
    """`combine`, pick by pick in ascending order of experts, each step rounded once."""
    for row, pick in product(*map(range, places.shape)):
        place = int(places[row, pick])
        output = (near if place < border else far)[place]
        out[row] = ordered.fma(weights[row, pick].expand_as(output), output, out[row])


def test_combine_adds_near_and_far_picks_in_order(picks_to_add):
    *picks, out = picks_to_add
    expected = out.clone()
    in_prescribed_order(*picks, expected)
    kernels().combine(*picks, out)

    assert torch.equal(out, expected)


def test_picks_added_in_another_order_show(picks_to_add):
    """What the comparison above would say of a sum that begins with the last expert."""
    near, far, border, places, weights, out = picks_to_add
    expected = out.clone()
    in_prescribed_order(near, far, border, places, weights, expected)
    kernels().combine(near, far, border, places.flip(1).contiguous(), weights.flip(1), out)

    assert not torch.equal(out, expected) and nmse(out, expected) < 1e-13


def test_scale_rows():
    factors, out = torch.randn(5, 3)[:, 1:2], torch.randn(5, 41)
    expected = out * factors
    kernels().scale_rows(factors, out)

    assert torch.equal(out, expected)


@pytest.mark.parametrize("ops", [reference, gpu_routing, None], ids=["reference", "gpu", "kernels"])
def test_norm_heads_is_over_all_heads_together(ops):
    """3 groups of 2 query heads of 20; v and the padding behind it stay."""
    qkv, q_norm, k_norm = torch.randn(4, 3, 96), torch.randn(120), torch.randn(60)
    before, q, k = qkv.clone(), qkv[:, :, :40].double().flatten(1), qkv[:, :, 40:60].double().flatten(1)
    (ops or kernels()).norm_heads(qkv, q_norm, k_norm, 1e-5)

    for part, plain, weight in ((qkv[:, :, :40], q, q_norm), (qkv[:, :, 40:60], k, k_norm)):
        expected = plain / (plain.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        assert nmse(part.flatten(1), expected) < 1e-13
    assert torch.equal(qkv[:, :, 60:], before[:, :, 60:])


def situation():
    """What the calls below are made with: three rows that are routed, and experts."""
    (ids, places, sources, starts, weights), x, router = routing(3, 64, 8, 2)
    weight, _ = expert_weights(8, 1, 64, "q8")
    into, out = Routes(ids, places, sources, starts, weights), torch.zeros(6, 16)
    return SimpleNamespace(x=x, router=router, into=into, weight=weight, out=out)


# A call of each op with one argument that does not fit, by what the error names.
WRONG_CALLS = {
    "router": lambda ops, at: ops.route(at.x, at.router[:9], Scoring(True), at.into),
    "weights": lambda ops, at: ops.route(
        at.x, at.router, Scoring(True), at.into._replace(weights=at.into.weights[:, :2])
    ),
    "starts": lambda ops, at: ops.expert_linear(
        at.x, Picks(at.into.sources, at.into.starts, 1), at.weight, "q8", at.out
    ),
    "sources": lambda ops, at: ops.expert_linear(
        at.x, Picks(at.into.sources[:5], at.into.starts, 0), at.weight, "q8", at.out
    ),
    "weight": lambda ops, at: ops.expert_linear(
        at.x, Picks(at.into.sources, at.into.starts, 0), at.weight[:, :, :-1], "q8", at.out
    ),
    "far": lambda ops, at: ops.combine(
        at.out, at.out[:3], at.into.starts[8:], at.into.places, at.into.weights[:, :2], torch.zeros(3, 16)
    ),
}


@pytest.mark.parametrize("named", WRONG_CALLS)
def test_wrong_arguments_are_named(named):
    with pytest.raises(ValueError, match=named):
        WRONG_CALLS[named](kernels(), situation())
