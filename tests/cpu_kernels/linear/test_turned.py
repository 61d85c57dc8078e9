"""Weights of bf16 that are turned for many rows where the CPU cannot multiply it: whole numbers, whose sums are exact,
give what they should."""

import pytest
import torch

from cpu_kernels.contract import Picks
from cpu_kernels.formats import FORMATS
from cpu_kernels.linear.panels.turned import GROUP, MOST_ROWS
from cpu_kernels.linear.sizes import TURNED_INPUTS, TURNED_ROWS, WIDE_TURNED_ROWS, spread_rows, turns_rows
from cpu_kernels.vectors.isa import choose, named
from tests.support.kernels.cpu_oracles import ISAS, guarded, kernels, nmse, only_inside_written, routing

PATHS = [name for name in ISAS if turns_rows(choose(name), "bf16")]
ROWS = [
    TURNED_ROWS - 1,
    TURNED_ROWS,
    *range(WIDE_TURNED_ROWS - 1, WIDE_TURNED_ROWS + 7),
    MOST_ROWS + 5,
    2 * MOST_ROWS + 9,
]
by_path = pytest.mark.parametrize("isa", PATHS)


def whole_numbers(*shape):
    """-3 to 3 as float32."""
    return torch.randint(-3, 4, shape).float()


def packed(weight):
    """bf16 weights [features, in_features] as blocks."""
    return weight.bfloat16().view(-1, 16, weight.shape[-1]).view(torch.uint8).flatten(1)


@pytest.mark.parametrize("isa", ["avx512", "avx512vnni", "avx2", "avxvnni", "neon", "portable"])
def test_only_bf16_of_x86_is_turned(isa):
    turned = [
        item.name for item in FORMATS.values() if spread_rows(named(isa), item) in (TURNED_ROWS, WIDE_TURNED_ROWS)
    ]

    assert turned == ([] if isa in ("neon", "portable") else ["bf16"])


def test_bf16_that_the_cpu_multiplies_is_not_turned():
    assert spread_rows(named("avx512", has_bf16=True), FORMATS["bf16"]) == 0


@by_path
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("in_features", [GROUP, 2 * TURNED_INPUTS + 3 * GROUP, TURNED_INPUTS + 8])
def test_many_rows_are_exact(isa, rows, in_features):
    """Rows that fill no tile, pieces that are no whole ones, and inputs that are multiplied as they lie; a bias."""
    weight, x, bias = whole_numbers(304, in_features), whole_numbers(rows, in_features), whole_numbers(304)
    out, memory = guarded(rows, 304)

    kernels(isa).linear(x, packed(weight), "bf16", bias, out)

    assert only_inside_written(memory)
    assert torch.equal(out, x @ weight.T + bias)


@by_path
def test_what_is_added_to_is_exact(isa):
    rows, in_features = WIDE_TURNED_ROWS + 3, 3 * TURNED_INPUTS
    weight, x, out = whole_numbers(48, in_features), whole_numbers(rows, in_features), whole_numbers(rows, 48)
    wanted = out + x @ weight.T

    kernels(isa).linear(x, packed(weight), "bf16", None, out, True)

    assert torch.equal(out, wanted)


@by_path
def test_inputs_are_rounded_to_bf16(isa):
    weight, x, out = (
        torch.randn(32, 4096).bfloat16(),
        torch.randn(WIDE_TURNED_ROWS, 4096),
        torch.empty(WIDE_TURNED_ROWS, 32),
    )

    kernels(isa).linear(x, packed(weight.float()), "bf16", None, out)

    assert nmse(out, x.bfloat16().double() @ weight.double().T) < 1e-12


@by_path
def test_experts_with_many_picks_are_exact(isa):
    """One of three has fewer picks than weights are turned for."""
    rows, in_features = 3 * WIDE_TURNED_ROWS // 2, TURNED_INPUTS + GROUP
    (_, _, sources, _, _), *_ = routing(rows, 64, 3, 2)
    starts = torch.tensor([0, WIDE_TURNED_ROWS + 5, 2 * WIDE_TURNED_ROWS + 10, 2 * rows], dtype=torch.int32)
    weight, x, out = whole_numbers(3, 32, in_features), whole_numbers(rows, in_features), torch.zeros(2 * rows, 32)
    wanted = [
        x[sources[first:last].long()] @ weight[e].T for e, (first, last) in enumerate(zip(starts[:-1], starts[1:]))
    ]

    kernels(isa).expert_linear(x, Picks(sources, starts, 0), packed(weight).view(3, 2, -1), "bf16", out)

    assert torch.equal(out, torch.cat(wanted))
