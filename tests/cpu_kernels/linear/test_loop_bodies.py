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
# Instructions for 64 weights and one row, on AVX-512 and on AVX2: as compiled, or what the arithmetic of a form takes
# written out alone where that is less.
ONE_ROW = {
    "q4": (3.7, 10.4),
    "q8": (2.6, 13.7),
    "q4_0": (3.6, 10.4),
    "int4_g64": (3.7, 10.4),
    "q4_k": (4.2, 11),
    "q5_k": (6.2, 17.5),
    "q6_k": (6.2, 18.2),
    "iq4_nl": (4.6, 17.7),
    "iq4_xs": (4.7, 17.9),
    "mxfp4": (5.1, 15.2),
    "nvfp4": (5.8, 16.6),
    "fp8": (20, 39.7),
}
# The same for 8 and for 4 rows together, as compiled: 8 are dot products, the others what codes, scales and sums cost.
MANY_ROWS = {
    "q4": (13.2, 29.3),
    "q8": (12.7, 45.7),
    "q4_0": (13.7, 31.2),
    "int4_g64": (13.8, 30.5),
    "q4_k": (13.4, 31.4),
    "q5_k": (18.5, 42.2),
    "q6_k": (19.4, 44.9),
    "iq4_nl": (14.7, 51.2),
    "iq4_xs": (15.2, 52.5),
    "mxfp4": (16.3, 36.2),
    "nvfp4": (19.9, 42.9),
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
