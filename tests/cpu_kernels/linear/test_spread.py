"""Codes that are spread to bytes for many rows give the bits of few rows, which multiply them as they lie."""

import pytest
import torch

from cpu_kernels.contract import Picks
from cpu_kernels.formats import FORMATS, unit_bytes
from cpu_kernels.linear.forms.spread import spread_format
from cpu_kernels.linear.sizes import SPREAD_BYTES, SPREAD_NIBBLE_ROWS, SPREAD_ROWS, spread_rows
from cpu_kernels.vectors.isa import named
from tests.support.kernels.cpu_oracles import ISAS, guarded, kernels, only_inside_written, routing
from tests.support.suite.covering import covering

PATHS = [name for name in ISAS if named(name).has_avx2]


def spread_formats(isa: str) -> list:
    """The formats whose codes many rows have spread."""
    return [item for item in FORMATS.values() if spread_rows(named(isa), item) in (SPREAD_ROWS, SPREAD_NIBBLE_ROWS)]


SPREAD = {isa: spread_formats(isa) for isa in PATHS}


def of_paths() -> list:
    """Parameters (isa, item): what `covering` chooses of the formats that any path spreads, where the path does."""
    every = covering(PATHS, SPREAD["avx2"], lambda item: {item.plane, item.header}, lambda item: item.name)
    return [pair for pair in every if pair.values[1] in SPREAD[pair.values[0]]]


by_format = pytest.mark.parametrize(("isa", "item"), of_paths())


def any_weight(item, shape, in_features):
    """Bytes of any value but the large exponents of scales."""
    draw = torch.Generator().manual_seed(len(item.name))
    size = unit_bytes(item.name, in_features)
    return torch.randint(0, 60, (*shape, size), generator=draw, dtype=torch.uint8)


def test_every_plane_of_several_bits_is_spread_somewhere():
    assert {item.plane for item in SPREAD["avxvnni"]} == {"u4", "u5", "u6", "t4"}
    assert {item.plane for item in SPREAD["avx2"]} == {"u4", "u5", "u6", "t4", "i8"}
    assert not any(spread_rows(named("avx512"), item) for item in SPREAD["avx2"])
    assert not any(spread_rows(named("neon"), item) for item in FORMATS.values())


@by_format
@pytest.mark.parametrize("more_rows", [0, 3])
def test_many_rows_have_the_bits_of_few(isa, item, more_rows):
    """A last superblock that is cut off, more blocks than are spread at once, rows that fill no panel, and a bias."""
    rows, in_features, blocks = spread_rows(named(isa), item) + more_rows, 704, 48
    weight, x, bias = any_weight(item, (blocks,), in_features), torch.randn(rows, in_features), torch.randn(16 * blocks)
    out, memory = guarded(rows, 16 * blocks)
    few = torch.empty(rows, 16 * blocks)
    assert 19 * spread_format(named(isa), item).block_bytes(in_features) > SPREAD_BYTES, "a range is spread at once"

    kernels(isa).linear(x, weight, item.name, bias, out)
    for start in range(0, rows, 16):
        kernels(isa).linear(x[start : start + 16], weight, item.name, bias, few[start : start + 16])

    assert only_inside_written(memory)
    assert few.isfinite().all() and torch.equal(out, few)


@by_format
def test_experts_with_many_picks_have_the_bits_of_single_rows(isa, item):
    """In two pieces of the inputs, one expert with fewer picks than are spread for."""
    least_rows, in_features = spread_rows(named(isa), item), 4352
    rows = 3 * least_rows // 2
    (_, _, sources, starts, _), *_ = routing(rows, 64, 3, 2)
    starts = torch.tensor([0, least_rows + 5, 2 * least_rows + 10, 2 * rows], dtype=torch.int32)
    weight, x = any_weight(item, (3, 2), in_features), torch.randn(rows, in_features)
    out, single = torch.zeros(2 * rows, 32), torch.zeros(1, 32)
    kernels(isa).expert_linear(x, Picks(sources, starts, 0), weight, item.name, out)

    for place in (0, least_rows + 4, least_rows + 5, 2 * least_rows + 9, 2 * rows - 1):
        expert = int((starts[1:] <= place).sum())
        kernels(isa).linear(x[sources[place]][None], weight[expert], item.name, None, single)

        assert torch.equal(single[0], out[place]), place
