"""Inner loops of the coded linears on x86-64, as assembly for a CPU of each kind: how many instructions they take.

Counted are the vector instructions of one pass over 64 inputs of 16 features, spilled registers among them; what is asked
for ahead and the loop's counter are not.
"""

import pytest

from tests.support.kernels.cross_compile import Cpu, assembly_of
from tests.support.kernels.loop_bodies import busiest_block, linear_kernel

LINUX = "x86_64-unknown-linux-gnu"
CPUS = {"avx512": (LINUX, "znver4"), "avx2": (LINUX, "znver3")}
DOTS = {"avx512": "vpdpbusd", "avx2": "vpmaddubsw"}
MANY = {"avx512": 8, "avx2": 4}  # rows of a register tile
SIGNED = 4  # of AVX2, where sums of codes would not fit 16 bits: the size of w, and x with the sign of w
# Instructions for 64 weights and one row, on AVX-512 and on AVX2: what the arithmetic of a form takes written out alone;
# of FP8 on AVX2, where that is 36, what is there.
ONE_ROW = {
    "q4": (3.7, 14.8),
    "q8": (2.8, 10.2 + SIGNED),
    "q4_0": (3.9, 14.3),
    "int4_g64": (3.8, 15.0),
    "q4_k": (4.5, 15.9),
    "q5_k": (6.6, 22.3),
    "q6_k": (6.6, 21.7),
    "iq4_nl": (5.0, 16.4 + SIGNED),
    "iq4_xs": (5.1, 16.7 + SIGNED),
    "mxfp4": (5.1, 16.7),
    "nvfp4": (5.8, 16.6),
    "fp8": (20, 39.7),
}
# The same for 8 and for 4 rows together, as compiled: 8 are dot products, the others what codes, scales and sums cost.
MANY_ROWS = {
    "q4": (13.4, 29.6),
    "q8": (12.9, 45.9),
    "q4_0": (14.1, 32.4),
    "int4_g64": (14.3, 31.0),
    "q4_k": (16.8, 32.3),
    "q5_k": (18.9, 42.8),
    "q6_k": (19.8, 49.9),
    "iq4_nl": (15.1, 51.8),
    "iq4_xs": (15.6, 53.0),
    "mxfp4": (16.7, 40.2),
    "nvfp4": (20.3, 45.0),
}
MARGIN = 1.1
ORDINARY = ("q4", "q8", "q4_k", "q6_k")  # each takes seconds to compile; `make test-matrix` looks at the others


def forms(counts: dict) -> list:
    """The forms of a table as parameters."""
    return [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.matrix) for name in counts]


@pytest.fixture(scope="module")
def assembly(request) -> dict[tuple[tuple, Cpu], str]:
    """Of every kernel that is looked at in this run."""
    items = (item for item in request.session.items if item.function in LOOKED_AT)
    looks = [item.callspec.params for item in items if item.get_closest_marker("skip") is None]
    return {
        which: code
        for isa, cpu in CPUS.items()
        for which, code in assembly_of(
            isa,
            {linear_kernel(look["form"], look.get("rows", MANY[isa])): [cpu] for look in looks if look["isa"] == isa},
        ).items()
    }


def instructions(assembly, isa: str, form: str, rows: int) -> float:
    """Vector instructions for 64 weights of the loop that does most of a linear's products."""
    dots = "vfmadd" if form == "fp8" else DOTS[isa]
    loop = busiest_block(assembly[linear_kernel(form, rows), CPUS[isa]], dots)
    assert sum(count for name, count in loop.items() if name.startswith(dots)) >= 16 * rows
    return sum(count for name, count in loop.items() if name.startswith("v")) / 16


@pytest.mark.table
@pytest.mark.parametrize("isa", CPUS)
@pytest.mark.parametrize("form", forms(ONE_ROW))
@pytest.mark.parametrize("rows", [1])
def test_one_row_takes_what_its_arithmetic_takes(assembly, isa, form, rows):
    assert instructions(assembly, isa, form, rows) <= MARGIN * ONE_ROW[form][list(CPUS).index(isa)]


@pytest.mark.table
@pytest.mark.parametrize("isa", CPUS)
@pytest.mark.parametrize("form", forms(MANY_ROWS))
def test_many_rows_share_what_codes_and_scales_cost(assembly, isa, form):
    assert instructions(assembly, isa, form, MANY[isa]) <= MARGIN * MANY_ROWS[form][list(CPUS).index(isa)]


LOOKED_AT = test_one_row_takes_what_its_arithmetic_takes, test_many_rows_share_what_codes_and_scales_cost
