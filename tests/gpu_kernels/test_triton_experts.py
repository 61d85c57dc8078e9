"""expert_linear in Triton: for whole-number formats the reference's very bits, for others its numbers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from cpu_kernels.contract import Picks
from cpu_kernels.formats import GGUF_TYPES
from gpu_kernels import reference
from gpu_kernels.experts import routing
from gpu_kernels.experts.ordered import WHOLE_FORMS
from tests.support.kernels.cpu_oracles import kernels
from tests.support.kernels.kernel_checks import Guarded
from tests.support.kernels.kernel_data import packed_weight
from tests.support.models.gguf_data import random_rows, repacked
from tests.support.models.moe import routed
from tests.support.quantised.int4_data import packed as packed_groups
from tests.support.quantised.int4_data import random_groups
from tests.support.quantised.scaled_data import KINDS, random_blocks
from tests.support.quantised.scaled_data import packed as packed_blocks

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels import elementwise
from gpu_kernels.experts import whole_kernel
from gpu_kernels.experts.expert_linear import expert_linear
from gpu_kernels.small import clamped
from tests.support.gpu.watched_loads import watched_loads

EXPERTS, BLOCKS = 6, 3
OTHERS = {"fp32": 1e-11, "fp16": 1e-11, "bf16": 1e-11}
OTHERS |= dict.fromkeys(("nf4", "fp8", "fp8_g64", "fp8_g32"), 2e-5)  # rounded to bf16


def weight_of(name: str, in_features: int, experts: int = EXPERTS, blocks: int = BLOCKS) -> torch.Tensor:
    """uint8 [experts, blocks, block_bytes] of any codes and scales that a format may hold."""
    rows = experts * blocks * 16
    kinds, scaled = ({kind.format: kind for kind in types} for types in (GGUF_TYPES.values(), KINDS))
    if "*" in name:
        counts = reference.mix_of(name)
        parts = [weight_of(part, in_features, experts * blocks, count).flatten(1) for part, count in counts]
        weight = torch.cat(parts, 1)
    elif name in ("fp32", "bf16", "q8", "q4"):
        weight = packed_weight(name, experts * blocks, in_features, seed=5)
    elif name == "fp16":
        weight = torch.randn(rows, in_features).half().view(torch.uint8).reshape(experts * blocks, -1)
    elif name.startswith(("int4_g", "uint8_g")):
        bits, group = (4, int(name[6:])) if name.startswith("int4") else (8, int(name[7:]))
        weight = packed_groups(kernels(), random_groups(rows, in_features, group, bits=bits))[1]
    elif name in scaled:
        kind = scaled[name]
        weight = packed_blocks(kernels(), kind, random_blocks(kind, rows, in_features // kind.items)[0])
    else:
        weight = repacked(kernels(), kinds[name], random_rows(kinds[name], rows, in_features))
    return weight.view(experts, blocks, -1)


def both(device, name, rows, in_features, weight, first=1, last=5, by_place=False):
    """(what the kernel gives, what the reference gives) for the experts [first, last); other picks stay 7.

    Interpreted, nothing is read behind the tensors: the last tile has fewer picks than rows, and none for the others.
    """
    sources, starts = routed(rows, EXPERTS, 2)
    picks, features = 2 * rows, 16 * sum(count for _, count in reference.mix_of(name)) * weight.shape[1]
    x = torch.randn(picks if by_place else rows, in_features, generator=torch.Generator().manual_seed(rows))
    expected = torch.full((picks, features), 7.0)
    given = None if by_place else sources
    reference.expert_linear(x, Picks(given, starts, first), weight[first:last], name, expected)
    out = Guarded(device, picks, features, fill=torch.full((picks, features), 7.0))
    picks = Picks(None if given is None else given.to(device), starts.to(device), first)
    with watched_loads() if device == "cpu" else nullcontext():
        expert_linear(x.to(device), picks, weight.to(device)[first:last], name, out.view)
    return out.result(), expected


@pytest.mark.table
@pytest.mark.parametrize("name", WHOLE_FORMS)
@pytest.mark.parametrize("rows", [1, 11])
def test_whole_number_formats_give_the_references_bits(device, name, rows):
    """One row: a pick a program; eleven: tiles. Some picks belong to experts that are elsewhere."""
    actual, expected = both(device, name, rows, 256, weight_of(name, 256), first=0 if rows == 1 else 1)

    assert torch.equal(actual, expected)


@pytest.mark.table
@pytest.mark.parametrize("name", ["q4", "q8"])
@pytest.mark.parametrize("rows,in_features", [(1, 100), (1, 704), (9, 100), (20, 64)])
def test_any_inputs_and_rows_by_place(device, name, rows, in_features):
    actual, expected = both(device, name, rows, in_features, weight_of(name, in_features), by_place=True)

    assert torch.equal(actual, expected)


@pytest.mark.parametrize("rows", [40, 200])
def test_several_tiles_of_one_expert_give_the_same_bits(device, rows):
    """Some experts have more picks than a small tile, or than a large one."""
    actual, expected = both(device, "q4", rows, 64, weight_of("q4", 64))

    assert torch.equal(actual, expected)


@pytest.mark.table
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("rows", [1, 9])
def test_formats_of_numbers_agree_with_the_reference(device, name, rows):
    actual, expected = both(device, name, rows, 256, weight_of(name, 256))
    error = (actual.double() - expected).square().sum() / (expected.double() - 7).square().sum()

    assert error <= OTHERS[name]


@pytest.mark.parametrize("rows", [1, 9])
def test_a_mix_computes_every_format_in_its_columns(device, rows):
    mix = "q4*1+q8*2"
    actual, expected = both(device, mix, rows, 128, weight_of(mix, 128))

    assert torch.equal(actual, expected)


def test_experts_may_lie_apart(device):
    """As gate_up and down of one expert do: another expert's bytes are a whole expert away."""
    weight = weight_of("q8", 128)
    memory = torch.full((EXPERTS, weight[0].numel() + 192), 255, dtype=torch.uint8)
    memory[:, 192:] = weight.flatten(1)
    actual, expected = both(device, "q8", 5, 128, memory[:, 192:].unflatten(1, (BLOCKS, -1)))

    assert torch.equal(actual, expected)


def test_nothing_to_do_is_accepted(device):
    sources, starts = (tensor.to(device) for tensor in routed(2, EXPERTS, 2))
    x, out = torch.zeros(2, 64, device=device), torch.full((4, 48), 7.0, device=device)
    weight = weight_of("q8", 64).to(device)
    expert_linear(x, Picks(sources, starts, 3), weight[3:3], "q8", out)
    expert_linear(x[:0], Picks(sources[:0], torch.zeros_like(starts), 0), weight, "q8", out[:0])
    expert_linear(x, Picks(sources, torch.zeros_like(starts), 0), weight, "q8", out)  # no pick at all

    assert (out == 7).all()


def test_a_wrong_call_is_refused(device):
    sources, starts = (tensor.to(device) for tensor in routed(2, EXPERTS, 2))
    x, out, weight = torch.zeros(2, 64, device=device), torch.zeros(4, 48, device=device), weight_of("q8", 64)
    wrong_picks = Picks(sources, starts, 1), Picks(sources[:3], starts, 0)
    for change in (*({"picks": wrong} for wrong in wrong_picks), {"weight": weight[:, :2]}, {"weight_dtype": "q4"}):
        call = {"x": x, "picks": Picks(sources, starts, 0), "weight": weight.to(device)}
        with pytest.raises(AssertionError):
            expert_linear(**call | {"weight_dtype": "q8", "out": out} | change)


def test_silu_is_the_references_to_the_bit(device):
    gate_up = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 20
    gate_up[0, :7] = torch.tensor([0.0, -0.0, 1e30, -1e30, 88.8, -88.8, 1e-40])
    expected, out = torch.empty(40, 48), torch.empty(40, 48, device=device)
    reference.silu_mul(gate_up, expected)
    elementwise.silu_mul(gate_up.to(device), out)

    assert torch.equal(out.cpu(), expected)


def test_the_clamped_activation_is_the_references_to_the_bit(device):
    gate_up = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 20
    gate_up[0, :7] = torch.tensor([0.0, -0.0, 1e30, -1e30, 51.8, -51.8, 1e-40])
    expected, out = torch.empty(40, 48), torch.empty(40, 48, device=device)
    reference.clamped_silu_mul(gate_up, 1.702, 7.0, expected)
    clamped.clamped_silu_mul(gate_up.to(device), 1.702, 7.0, out)

    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("rows,top_k,border", [(1, 4, 2), (7, 3, 9), (5, 2, 0)])
def test_the_sum_over_experts_is_one_order(device, rows, top_k, border):
    generator = torch.Generator().manual_seed(rows)
    places = torch.randperm(rows * top_k, generator=generator).view(rows, top_k).int()
    near, far, before = (torch.randn(size, 40, generator=generator) for size in (rows * top_k, rows * top_k, rows))
    weights, limit = torch.rand(rows, top_k, generator=generator), torch.tensor([border], dtype=torch.int32)
    expected, out = before.double(), before.to(device)
    for pick in range(top_k):
        for row in range(rows):
            place = int(places[row, pick])
            expected[row] += weights[row, pick].double() * (near if place < border else far)[place].double()
    routing.combine(*(tensor.to(device) for tensor in (near, far, limit, places, weights)), out)
    routing.scale_rows(weights[:, :1].to(device), out)
    expected *= weights[:, :1].double()

    assert (out.cpu().double() - expected).square().sum() <= 1e-13 * expected.square().sum()


@pytest.mark.parametrize("shared", [0, 63, 64])
def test_tiles_are_never_fewer_than_needed(shared):
    """However the picks fall: all at one expert, or one at each."""
    for rows in (1, 16, 64):
        counts = [shared, *[1] * 9, 0, 17]
        needed = sum(-(-count // rows) for count in counts)

        assert whole_kernel.most_tiles(sum(counts), len(counts), rows) >= needed
