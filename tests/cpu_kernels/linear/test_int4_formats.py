"""Groups of 4 and 8 bits with zero points: packed and unpacked to the bit, and multiplied, on every instruction set."""

import pytest
import torch

from cpu_kernels.formats import format_of
from gpu_kernels import reference
from tests.support.kernels.cpu_oracles import ISAS, guarded, kernels, nmse, only_inside_written, round_input
from tests.support.quantised.int4_data import BITS_AND_GROUPS, TYPES, blocks, packed, random_groups
from tests.support.suite.covering import covering

KERNEL_NMSE = 1e-11
by_group = pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUPS)


@by_group
def test_a_packed_weight_is_little_larger_than_codes_scales_and_zero_points(bits, group):
    name = TYPES[bits][group].format

    assert format_of(name).bits_per_weight() <= 1.03 * (bits + (16 + bits) / group)


@by_group
@pytest.mark.parametrize("count", [1, 3, 8])
def test_values_are_those_of_the_groups_to_the_bit(bits, group, count):
    in_features = group * count
    groups = random_groups(37, in_features, group, bits=bits)
    name, weight = packed(kernels(), groups)
    ids, values = torch.tensor([36, 0, 5, 5]), torch.empty(4, in_features)

    kernels().unpack_rows(weight, name, ids, values)

    assert torch.equal(values, groups.values[ids])
    assert torch.equal(reference.unpack(weight, name, in_features)[:37], groups.values)


@by_group
@pytest.mark.parametrize(("rows", "count"), [(1, 5), (2, 1), (7, 3), (17, 40)])
def test_linear_agrees_with_float64(bits, group, rows, count):
    torch.manual_seed(rows)
    groups, x = random_groups(48, group * count, group, bits=bits), torch.randn(rows, group * count)
    name, weight = packed(kernels(), groups)
    bias, (out, memory) = torch.randn(48), guarded(rows, 48)

    kernels().linear(x, weight, name, bias, out)

    assert only_inside_written(memory)
    assert nmse(out, round_input(x, "q8") @ groups.values.double().T + bias) < KERNEL_NMSE


# The sizes of a group differ in where their zero points lie; each is tried on some of the instruction sets.
EVERY_ISA = covering(ISAS, BITS_AND_GROUPS, lambda kind: {kind[0]}, lambda kind: f"{kind[0]}-{kind[1]}")


def test_an_ordinary_run_tries_every_isa():
    tried = {(isa, bits) for isa, (bits, _) in (param.values for param in EVERY_ISA if not param.marks)}

    assert tried == {(isa, bits) for isa in ISAS for bits, _ in BITS_AND_GROUPS}


@pytest.mark.parametrize(("isa", "kind"), EVERY_ISA)
def test_every_isa_agrees_with_float64(isa, kind):
    bits, group = kind
    groups, x, out = random_groups(48, 512, group, bits=bits), torch.randn(5, 512), torch.empty(5, 48)
    name, weight = packed(kernels(), groups)

    kernels(isa).linear(x, weight, name, None, out)

    assert nmse(out, round_input(x, "q8") @ groups.values.double().T) < KERNEL_NMSE


@by_group
def test_a_scale_that_is_not_finite_is_refused(bits, group):
    groups = random_groups(16, 4 * group, group, bits=bits)
    groups.scales[3, 2] = torch.inf
    shape = (1, format_of(TYPES[bits][group].format).block_bytes(4 * group))

    with pytest.raises(ValueError, match="not finite"):
        kernels().repack(blocks(groups), TYPES[bits][group].name, torch.empty(shape, dtype=torch.uint8))
