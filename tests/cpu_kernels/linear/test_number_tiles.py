"""Codes that are numbers and are made float32 once for many rows: the bits of a panel of four rows, which makes them
anew."""

import pytest
import torch

from cpu_kernels.contract import Picks
from cpu_kernels.formats import FORMATS, SCALED_TYPES, unit_bytes
from cpu_kernels.linear.forms.number_tiles import tile_rows
from cpu_kernels.linear.panels.numbers import MOST_ROWS
from cpu_kernels.linear.sizes import NUMBER_BLOCKS, NUMBER_ROWS, spread_rows
from cpu_kernels.vectors.isa import named
from tests.support.kernels.cpu_oracles import ISAS, guarded, kernels, nmse, only_inside_written, round_input, routing
from tests.support.quantised.scaled_data import packed, random_blocks
from tests.support.suite.covering import covering

PATHS = [name for name in ISAS if named(name).has_avx2 or named(name).has_avx512]
KINDS = [kind for kind in SCALED_TYPES.values() if FORMATS[kind.format].has_float_codes]
IN_FEATURES = 720  # the last group of 64 and the last superblock of 128 are cut off
by_kind = pytest.mark.parametrize(
    ("isa", "kind"),
    covering(
        PATHS, KINDS, lambda kind: {FORMATS[kind.format].plane, FORMATS[kind.format].header}, lambda kind: kind.format
    ),
)


def weight_of(kind, features, in_features):
    """(packed weight, its values) of random codes, in whole superblocks."""
    padded = FORMATS[kind.format].padded_inputs(in_features)
    blocks, values = random_blocks(kind, features, padded // kind.items)
    return packed(kernels(), kind, blocks), values[:, :in_features]


def by_fours(isa, x, weight, weight_dtype, bias, out, accumulate=False):
    """The linear of four rows, or of three, at a time; one or two that are left are done with those before them."""
    count = x.shape[0]
    for start in [*range(0, count - 2, 4), *([count - 4] if count % 4 in (1, 2) else [])]:
        rows = slice(start, start + 4)
        kernels(isa).linear(x[rows], weight, weight_dtype, bias, out[rows], accumulate)


@pytest.mark.parametrize("isa", ["avx2", "avxvnni", "avx512", "avx512vnni"])
def test_all_codes_that_are_numbers_are_made_float32(isa):
    wanted = {item.name for item in FORMATS.values() if spread_rows(named(isa), item) == NUMBER_ROWS}

    assert wanted == {kind.format for kind in KINDS} == {"nf4", "fp8", "fp8_g64", "fp8_g32"}
    assert not any(spread_rows(named("neon"), FORMATS[name]) for name in wanted)


@pytest.mark.parametrize("rows", range(1, 40))
def test_tiles_are_as_few_as_can_be_and_leave_few_rows_without_work(rows):
    left, tiles = rows, []
    while left > 0:
        tiles.append(tile_rows.py_func(left))
        left -= tiles[-1]

    assert len(tiles) == -(-rows // 6) and sum(tiles) - rows <= (3 if rows < 4 else 1)


@by_kind
@pytest.mark.parametrize("rows", [NUMBER_ROWS, 23, MOST_ROWS + 7])
def test_many_rows_have_the_bits_of_four(isa, kind, rows):
    """More blocks and rows than are done at once, rows that fill no tile, and a bias."""
    features = 16 * (2 * NUMBER_BLOCKS + 3)
    weight, _ = weight_of(kind, features, IN_FEATURES)
    x, bias, (out, memory) = torch.randn(rows, IN_FEATURES), torch.randn(features), guarded(rows, features)
    few = torch.empty(rows, features)

    kernels(isa).linear(x, weight, kind.format, bias, out)
    by_fours(isa, x, weight, kind.format, bias, few)

    assert only_inside_written(memory)
    assert few.isfinite().all() and torch.equal(out, few)


@by_kind
def test_what_is_added_to_has_the_bits_of_four(isa, kind):
    weight, _ = weight_of(kind, 48, IN_FEATURES)
    x, out = torch.randn(39, IN_FEATURES), torch.randn(39, 48)
    few = out.clone()

    kernels(isa).linear(x, weight, kind.format, None, out, True)
    by_fours(isa, x, weight, kind.format, None, few, True)

    assert torch.equal(out, few)


@pytest.mark.parametrize("isa", PATHS)
def test_parts_of_a_mix_have_the_bits_of_four(isa):
    mix = "nf4*2+fp8_g32*1"
    x, bias, out, few = torch.randn(28, 256), torch.randn(144), torch.empty(28, 144), torch.empty(28, 144)
    draw = torch.Generator().manual_seed(3)
    weight = torch.randint(0, 60, (3, unit_bytes(mix, 256)), generator=draw, dtype=torch.uint8)

    kernels(isa).linear(x, weight, mix, bias, out)
    by_fours(isa, x, weight, mix, bias, few)

    assert few.isfinite().all() and few.any() and torch.equal(out, few)


@by_kind
def test_pieces_of_the_inputs_are_added_up(isa, kind):
    weight, values = weight_of(kind, 32, 4352)
    x, bias, out = torch.randn(40, 4352), torch.randn(32), torch.empty(40, 32)

    kernels(isa).linear(x, weight, kind.format, bias, out)

    assert nmse(out, round_input(x, "q8") @ values.double().T + bias) < 1e-11


@by_kind
def test_experts_with_many_picks_have_the_bits_of_four_rows(isa, kind):
    """In two pieces of the inputs; one expert has fewer picks than numbers are made for."""
    rows, in_features = 32, 4352
    (_, _, sources, _, _), *_ = routing(rows, 64, 3, 2)
    few = NUMBER_ROWS - 1
    starts = torch.tensor([0, NUMBER_ROWS + 5, NUMBER_ROWS + 5 + few, 2 * rows], dtype=torch.int32)
    weight, values = weight_of(kind, 3 * 32, in_features)
    weight, values = weight.view(3, 2, -1), values.view(3, 32, -1)
    x, out, four = torch.randn(rows, in_features), torch.zeros(2 * rows, 32), torch.zeros(4, 32)
    kernels(isa).expert_linear(x, Picks(sources, starts, 0), weight, kind.format, out)

    for place in (0, NUMBER_ROWS + 4, NUMBER_ROWS + 6, NUMBER_ROWS + 5 + few, 2 * rows - 1):
        expert = int((starts[1:] <= place).sum())
        row = x[sources[place]].repeat(4, 1)
        kernels(isa).linear(row, weight[expert], kind.format, None, four)

        assert nmse(out[place], round_input(row[:1], "q8")[0] @ values[expert].double().T) < 1e-11
        if expert != 1:
            assert torch.equal(four[0], out[place]), place
