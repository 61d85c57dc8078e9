"""The registry of formats, and every coded format against gguf's dequantiser and float64, on every instruction set."""

import subprocess
import sys

import pytest
import torch

from cpu_kernels.formats import FORMATS, GGUF_TYPES, format_of, mix_name, segments, unit_blocks, unit_bytes, widest
from gpu_kernels import reference
from tests.support.kernels.cpu_oracles import ISAS, guarded, kernels, nmse, only_inside_written, round_input
from tests.support.models.gguf_data import CODED, dequantised, random_rows, repacked
from tests.support.suite.covering import covering

KERNEL_NMSE = 1e-11
by_type = pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)


def test_formats_need_no_compiler_and_no_torch():
    code = "import sys, cpu_kernels.formats; print([n for n in ('torch', 'numba', 'llvmlite') if n in sys.modules])"

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == "[]\n"


def test_a_packed_weight_is_at_most_three_hundredths_larger_than_the_file():
    for kind in GGUF_TYPES.values():
        if kind.format:
            assert format_of(kind.format).bits_per_weight() <= 1.03 * 8 * kind.block_bytes / kind.items, kind


def test_unknown_formats_are_named_with_those_there_are():
    with pytest.raises(ValueError, match="'q9' is unknown; known: fp32, bf16"):
        format_of("q9")


def test_a_mix_is_its_segments_one_after_the_other():
    name = mix_name([("q4_k", 12), ("q6_k", 4)])
    first, second = segments(name, 512)

    assert name == "q4_k*12+q6_k*4" and unit_blocks(name) == 16 and widest(name).name == "q4_k"
    assert (first.first_byte, second.first_byte) == (0, 12 * FORMATS["q4_k"].block_bytes(512))
    assert unit_bytes(name, 512) == second.first_byte + 4 * FORMATS["q6_k"].block_bytes(512)


@by_type
@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_repacked_values_are_those_of_the_file_to_the_bit(kind, blocks):
    in_features = blocks * kind.items
    rows = random_rows(kind, 37, in_features)
    expected, weight = dequantised(kind, rows), repacked(kernels(), kind, rows)
    ids, values = torch.tensor([36, 0, 5, 5]), torch.empty(4, in_features)

    kernels().unpack_rows(weight, kind.format, ids, values)

    assert torch.equal(values, expected[ids])
    assert torch.equal(reference.unpack(weight, kind.format, in_features)[:37], expected)


@by_type
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_rows_at_odd_addresses_are_read_and_nothing_behind_them(kind, blocks):
    """Rows are read 16 bytes at a time: what lies between them, and behind the last, is none of the weight's."""
    rows = random_rows(kind, 32, blocks * kind.items)
    apart = torch.full((32, rows.shape[1] + 29), 255, dtype=torch.uint8)
    apart[:, 13:-16] = rows
    weight = repacked(kernels(), kind, rows)
    out = torch.full_like(weight, 170)

    kernels().repack(apart[:, 13:-16], kind.name, out)

    assert torch.equal(out, weight)


@by_type
def test_blocks_are_written_between_those_of_another_weight(kind):
    """Gate and up have a block each in every unit: their rows were brought together first, only to be taken apart."""
    rows = random_rows(kind, 48, 2 * kind.items)
    weight = repacked(kernels(), kind, rows)
    units = torch.full((3, 2, weight.shape[1]), 170, dtype=torch.uint8)

    kernels().repack(rows, kind.name, units[:, 1])

    assert torch.equal(units[:, 1], weight)
    assert (units[:, 0] == 170).all()


def test_blocks_that_overlap_are_refused():
    kind = CODED[0]
    rows = random_rows(kind, 32, 32)
    weight = repacked(kernels(), kind, rows)

    with pytest.raises(ValueError, match="do not overlap"):
        kernels().repack(rows, kind.name, weight.as_strided(weight.shape, (weight.shape[1] // 2, 1)))


@by_type
def test_a_scale_that_is_not_finite_is_refused(kind):
    rows = random_rows(kind, 16, 2 * kind.items)
    at = kind.block_bytes + (208 if kind.name == "Q6_K" else 0)
    rows[3, at : at + 2] = torch.tensor([0, 0x7C] if kind.name != "MXFP4" else [255, 0], dtype=torch.uint8)

    with pytest.raises(ValueError, match="not finite"):
        repacked(kernels(), kind, rows)


def test_an_id_outside_the_weight_is_refused():
    kind = CODED[0]
    weight, out = repacked(kernels(), kind, random_rows(kind, 16, 32)), torch.empty(1, 32)

    with pytest.raises(ValueError, match="not in 0..15"):
        kernels().unpack_rows(weight, kind.format, torch.tensor([16]), out)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("in_features", [1, 15, 16, 100])
def test_rows_of_plain_numbers_are_widened_as_they_are(name, in_features):
    """Infinities and subnormal numbers too, and no byte before or behind a row of `out` is written."""
    torch.manual_seed(in_features)
    weight = (torch.randn(37, in_features) * 1e-4).to(reference.PLAIN_DTYPES[name])
    weight[36, 0], weight[5, -1] = float("inf"), 6e-8
    ids = torch.tensor([36, 0, 5, 5])
    out, memory = guarded(4, in_features)

    kernels().unpack_rows(weight, name, ids, out)
    expected = torch.empty_like(out)
    reference.unpack_rows(weight, name, ids, expected)

    assert torch.equal(out, weight[ids].float()) and torch.equal(expected, out)
    assert only_inside_written(memory)


def test_plain_numbers_of_another_kind_or_row_are_refused():
    weight, out = torch.zeros(5, 8), torch.empty(1, 8)

    with pytest.raises(ValueError, match="must be torch.bfloat16"):
        kernels().unpack_rows(weight, "bf16", torch.tensor([0]), out)
    with pytest.raises(ValueError, match=r"not in 0\.\.4"):
        kernels().unpack_rows(weight, "fp32", torch.tensor([5]), out)


def make(kind, rows: int, in_features: int):
    """(x, packed weight, float64 result of the file's values times the input as quantised)."""
    torch.manual_seed(rows)
    raw, x = random_rows(kind, 48, in_features), torch.randn(rows, in_features)
    expected = round_input(x, "q8") @ dequantised(kind, raw).double().T
    return x, repacked(kernels(), kind, raw), expected


@by_type
@pytest.mark.parametrize(("rows", "blocks"), [(1, 5), (2, 1), (7, 3), (15, 2)])
def test_linear_agrees_with_float64(kind, rows, blocks):
    x, weight, expected = make(kind, rows, blocks * kind.items)
    out, memory = guarded(rows, 48)

    kernels().linear(x, weight, kind.format, None, out)

    assert only_inside_written(memory)
    assert nmse(out, expected) < KERNEL_NMSE


def parts_of(kind) -> set:
    """What a kernel of the type is put together of."""
    return {format_of(kind.format).plane, format_of(kind.format).header}


def test_an_ordinary_run_tries_every_plane_and_header_on_every_isa():
    for pairs in (EVERY_ISA, covering(["one", "two"], CODED, parts_of, lambda kind: kind.name)):
        tried = [param.values for param in pairs if not param.marks]
        for isa in {isa for isa, _ in tried}:
            parts = set().union(*(parts_of(kind) for each, kind in tried if each == isa))
            assert parts == set().union(*map(parts_of, CODED))


EVERY_ISA = covering(ISAS, CODED, parts_of, lambda kind: kind.name)


@pytest.mark.parametrize(("isa", "kind"), EVERY_ISA)
def test_every_isa_agrees_with_float64(isa, kind):
    x, weight, expected = make(kind, 5, 512)
    out = torch.empty(5, 48)

    kernels(isa).linear(x, weight, kind.format, None, out)

    assert nmse(out, expected) < KERNEL_NMSE


@by_type
def test_long_inputs_are_summed_in_pieces(kind):
    x, weight, expected = make(kind, 17, 4352)
    bias, out = torch.randn(48), torch.ones(17, 48)

    kernels().linear(x, weight, kind.format, bias, out, accumulate=True)

    assert nmse(out, expected + bias + 1) < KERNEL_NMSE


@pytest.mark.parametrize(("rows", "in_features"), [(1, 100), (3, 64), (33, 4200)])
def test_fp16_weights_meet_unrounded_inputs(rows, in_features):
    dense, x = torch.randn(48, in_features).half(), torch.randn(rows, in_features)
    out, memory = guarded(rows, 48)

    kernels().linear(x, dense.view(torch.uint8).reshape(3, -1), "fp16", None, out)

    assert only_inside_written(memory)
    assert nmse(out, x.double() @ dense.double().T) < KERNEL_NMSE


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_mix_of_formats_is_one_weight(rows):
    """Units of 4 blocks q4_k, 2 blocks bf16 and 1 block q6_k, interleaved in the output as in the unit."""
    in_features, units = 512, 3
    weights, dense = [], []
    for name, count in (("Q4_K", 4), ("BF16", 2), ("Q6_K", 1)):
        features = 16 * count * units
        if name == "BF16":
            values = torch.randn(features, in_features).bfloat16()
            weights.append(values.view(torch.uint8).reshape(units, -1))
        else:
            kind = next(item for item in CODED if item.name == name)
            raw = random_rows(kind, features, in_features)
            weights.append(repacked(kernels(), kind, raw).view(units, -1))
            values = dequantised(kind, raw)
        dense.append((name, values.view(units, 16 * count, in_features).double()))
    weight, mix = torch.cat(weights, 1).contiguous(), "q4_k*4+bf16*2+q6_k*1"
    x, bias, before = torch.randn(rows, in_features), torch.randn(336), torch.randn(rows, 336)
    parts = [
        torch.einsum("ri,ufi->ruf", round_input(x, "bf16" if name == "BF16" else "q8"), values)
        for name, values in dense
    ]
    expected = torch.cat(parts, -1).reshape(rows, 336) + bias + before

    for linear in (kernels().linear, reference.linear):
        out = before.clone()
        linear(x, weight, mix, bias, out, accumulate=True)
        assert nmse(out, expected) < 1e-10
