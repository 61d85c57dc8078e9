"""FP8, int8, NF4 and NVFP4 with float32 scales: packed and unpacked to the bit, and multiplied, on every instruction
set."""

from dataclasses import replace

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import Picks
from cpu_kernels.formats import E2M1_TYPE, NF4_VALUES, SCALED_TYPES, format_of
from cpu_kernels.linear.forms.number_planes import digit_planes, fits_planes
from cpu_kernels.vectors.isa import named
from gpu_kernels import reference
from tests.support.kernels.cpu_oracles import ISAS, guarded, kernels, nmse, only_inside_written, round_input
from tests.support.quantised.scaled_data import KINDS, packed, random_blocks

KERNEL_NMSE = 1e-11
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.format)


@by_kind
@pytest.mark.parametrize("count", [1, 3, 8])
def test_values_are_code_times_scale_to_the_bit(kind, count):
    blocks, expected = random_blocks(kind, 37, count)
    weight, in_features = packed(kernels(), kind, blocks), count * kind.items
    ids, values = torch.tensor([36, 0, 5, 5]), torch.empty(4, in_features)

    kernels().unpack_rows(weight, kind.format, ids, values)

    assert torch.equal(values, expected[ids])
    assert torch.equal(reference.unpack(weight, kind.format, in_features)[:37], expected)


def test_every_fp8_number_is_read():
    kind = next(item for item in KINDS if item.format == "fp8")
    codes = torch.tensor([code for code in range(256) if code & 127 != 127] + [0, 0], dtype=torch.uint8).view(2, 128)
    blocks = torch.cat((torch.ones(2, 1).view(torch.uint8), codes), 1).flatten()[None]
    values = torch.empty(1, 256)

    kernels().unpack_rows(packed(kernels(), kind, blocks), "fp8", torch.tensor([0]), values)

    assert torch.equal(values.view(2, 128), codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("isa", ISAS)
def test_one_row_multiplies_every_fp8_number_exactly(isa):
    """A single input of 127, which int8 holds, at every place in turn; numbers below the normal ones are among them."""
    kind = next(item for item in KINDS if item.format == "fp8")
    codes = torch.tensor([code for code in range(256) if code & 127 != 127] + [0, 0], dtype=torch.uint8)
    rows = torch.stack([codes.roll(feature) for feature in range(16)]).view(16, 2, 128)
    blocks = torch.cat((torch.ones(16, 2, 1).view(torch.uint8), rows), 2).flatten(1)
    weight, out = packed(kernels(), kind, blocks), torch.empty(1, 16)

    for place, numbers in enumerate(rows.flatten(1).view(torch.float8_e4m3fn).float().T):
        x = torch.zeros(1, 256)
        x[0, place] = 127.0
        kernels(isa).linear(x, weight, "fp8", None, out)
        assert torch.equal(out[0], 127 * numbers), place


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.format in ("fp8", "fp8_g32")])
def test_one_row_of_fp8_has_the_same_bits_by_subnormal_numbers(kind, monkeypatch, tmp_path):
    """What an AMD and an Intel CPU compute on 256 bits; a third of the codes are subnormal, of either sign."""
    if "avx2" not in ISAS:
        pytest.skip(f"this CPU runs {', '.join(ISAS)}")
    blocks, values = random_blocks(kind, 48, 720 // kind.items)
    codes = blocks.view(48, -1, kind.block_bytes)[..., 4:]
    codes[..., ::3] &= 0x87
    weight, x, outs = packed(kernels(), kind, blocks), torch.randn(1, values.shape[1]), []

    for is_free in (False, True):
        isa = replace(named("avx2"), has_free_subnormals=is_free)
        monkeypatch.setattr("cpu_kernels.kernels.choose", lambda name, isa=isa: isa)
        with CpuKernels(num_threads=1, cache_dir=tmp_path / str(is_free)) as ops:
            ops.linear(x, weight, kind.format, None, out := torch.empty(1, 48))
        outs.append(out)

    assert torch.equal(*outs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.format in ("fp8", "fp8_g32")])
@pytest.mark.parametrize("is_of_experts", [False, True])
def test_a_thread_that_flushes_subnormal_numbers_computes_the_same(kind, is_of_experts, monkeypatch, tmp_path):
    """Most weights near zero are subnormal in FP8; afterwards the thread flushes as before."""
    if "avx2" not in ISAS or not torch.set_flush_denormal(False):
        pytest.skip(f"this CPU runs {', '.join(ISAS)}; on others no subnormal numbers are multiplied")
    blocks, values = random_blocks(kind, 48, 720 // kind.items)
    blocks.view(48, -1, kind.block_bytes)[..., 4:] &= 0x87
    weight, x, outs = packed(kernels(), kind, blocks), torch.randn(1, values.shape[1]), []
    isa = replace(named("avx2"), has_free_subnormals=True)
    monkeypatch.setattr("cpu_kernels.kernels.choose", lambda name: isa)
    picks = Picks(torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), 0)

    with CpuKernels(num_threads=1, cache_dir=tmp_path) as ops:
        for flushes in (False, True):
            outs.append(torch.zeros(1, 48))
            torch.set_flush_denormal(flushes)
            try:
                if is_of_experts:
                    ops.expert_linear(x, picks, weight[None], kind.format, outs[-1])
                else:
                    ops.linear(x, weight, kind.format, None, outs[-1])
                still_flushes = (torch.full((1,), 1e-38) * 0.1).item() == 0.0
            finally:
                torch.set_flush_denormal(False)
            assert still_flushes == flushes

    assert outs[0].count_nonzero() and torch.equal(*outs)


@by_kind
@pytest.mark.parametrize(("rows", "count"), [(1, 5), (2, 1), (7, 3), (17, 40)])
def test_linear_agrees_with_float64(kind, rows, count):
    torch.manual_seed(rows)
    (blocks, values), x = random_blocks(kind, 48, count), torch.randn(rows, kind.items * count)
    bias, (out, memory) = torch.randn(48), guarded(rows, 48)

    kernels().linear(x, packed(kernels(), kind, blocks), kind.format, bias, out)

    assert only_inside_written(memory)
    assert nmse(out, round_input(x, "q8") @ values.double().T + bias) < KERNEL_NMSE


@by_kind
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_agrees_with_float64(kind, isa):
    (blocks, values), out = random_blocks(kind, 48, 512 // kind.items), torch.empty(5, 48)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))

    kernels(isa).linear(x, packed(kernels(), kind, blocks), kind.format, None, out)

    assert nmse(out, round_input(x, "q8") @ values.double().T) < KERNEL_NMSE


@by_kind
def test_rows_that_end_inside_a_superblock_are_padded(kind):
    """576 inputs are no whole superblocks of 128: the last group's codes are given, and zero."""
    count = -(-576 // kind.items)
    blocks, values = random_blocks(kind, 16, count)
    x, out = torch.randn(3, 576), torch.empty(3, 16)
    padded = torch.nn.functional.pad(x, (0, count * kind.items - 576))

    kernels().linear(x, packed(kernels(), kind, blocks), kind.format, None, out)

    assert format_of(kind.format).block_bytes(576) == format_of(kind.format).block_bytes(padded.shape[1])
    assert nmse(out, round_input(padded, "q8") @ values.double().T) < KERNEL_NMSE


@pytest.mark.parametrize(("kind", "block"), [*((kind, 1) for kind in SCALED_TYPES.values()), (E2M1_TYPE, 0)])
def test_a_scale_that_is_not_finite_is_refused(kind, block):
    """Of NVFP4 the number of the tensor, which every first block of a superblock gives."""
    blocks, _ = random_blocks(kind, 16, 2)
    at = block * kind.block_bytes
    blocks[3, at : at + 4] = torch.tensor([torch.inf]).view(torch.uint8)

    with pytest.raises(ValueError, match="not finite"):
        packed(kernels(), kind, blocks)


def test_a_scale_of_nvfp4_that_is_no_number_is_refused():
    blocks, _ = random_blocks(E2M1_TYPE, 16, 2)
    blocks[3, E2M1_TYPE.block_bytes + 4] = 127

    with pytest.raises(ValueError, match="not finite"):
        packed(kernels(), E2M1_TYPE, blocks)


def test_the_digits_of_a_table_are_its_numbers_and_pairs_of_products_fit_in_16_bits():
    """What one row of NF4 is multiplied by where registers have 256 bits or more."""
    planes = digit_planes(NF4_VALUES)
    whole = [sum(digit << 7 * plane for plane, digit in enumerate(digits)) for digits in zip(*planes)]

    assert [number / 2**27 - 1 for number in whole] == list(NF4_VALUES)
    assert 2 * max(max(plane) for plane in planes) * 127 < 2**15
    assert not fits_planes((0.1,)) and not fits_planes((2.0,)) and not fits_planes(())
