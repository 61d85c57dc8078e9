"""A path that is forced on a better CPU is compiled to its own instructions: registers of 256 bits on AVX2."""

import llvmlite.binding as llvm
import pytest

from cpu_kernels.formats import FORMATS
from cpu_kernels.linear.forms.line_order import code_leader
from cpu_kernels.linear.q_kernel import ahead_bytes
from cpu_kernels.vectors.isa import choose, host_features, named
from cpu_kernels.vectors.target import Target, in_whole_lines, target_of
from tests.support.kernels.cpu_oracles import ISAS

SUM = """
define <16 x float> @kernel(ptr %x, ptr %y) {
  %a = load <16 x float>, ptr %x
  %b = load <16 x float>, ptr %y
  %c = fadd <16 x float> %a, %b
  ret <16 x float> %c
}
"""

KEPT = """
declare void @other()
define <16 x float> @kernel(ptr %x) {
  %a = load <16 x float>, ptr %x
  call void @other()
  ret <16 x float> %a
}
"""


@pytest.mark.parametrize("cpu", ["znver4", "znver3"])
def test_registers_are_laid_down_in_whole_lines_of_the_cache(cpu):
    """They lay across two lines each in about a quarter of all processes, which made prompts a third slower there."""
    target = Target("x86_64-unknown-linux-gnu", cpu, "")

    assembly = target.machine().emit_assembly(target.retargeted(llvm.parse_assembly(KEPT)))

    assert "andq\t$-64, %rsp" in assembly


@pytest.mark.skipif(not ISAS[0].startswith("avx"), reason="other CPUs lay down 16 bytes at a time")
def test_this_cpu_lays_registers_down_in_whole_lines_too():
    assert "alignstack(64)" in str(in_whole_lines(llvm.parse_assembly(KEPT)))


@pytest.mark.parametrize("isa", ["avxvnni", "avx2"])
def test_forced_paths_use_no_wider_registers(isa):
    if isa not in ISAS:
        pytest.skip(f"this CPU runs {', '.join(ISAS)}")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = target_of(named(isa))
    assert target is not None or "avx512f" not in host_features()
    if target is None:
        pytest.skip("this CPU has no wider registers, so nothing is taken away")

    assembly = target.machine().emit_assembly(target.retargeted(llvm.parse_assembly(SUM)))

    assert "ymm" in assembly and "zmm" not in assembly


def test_the_path_without_bf16_has_no_instruction_for_it():
    if "avx512bf16" not in host_features():
        pytest.skip("this CPU has no AVX-512 BF16")
    target = target_of(named("avx512vnni"))

    assert target is not None
    assert "+avx512vnni" in target.features and "-avx512bf16" in target.features


@pytest.mark.parametrize("has_tables", [True, False])
def test_tables_of_128_bytes_are_for_the_best_path_of_a_cpu_that_has_them(has_tables, monkeypatch):
    if "avx512" not in ISAS:
        pytest.skip(f"this CPU runs {', '.join(ISAS)}")
    features = (host_features() - {"avx512vbmi"}) | ({"avx512vbmi"} if has_tables else set())
    monkeypatch.setattr("cpu_kernels.vectors.isa.host_features", lambda: features)

    assert choose("avx512").has_byte_tables is has_tables
    assert not choose("avx512vnni").has_byte_tables and not named("avx512").has_byte_tables


@pytest.mark.parametrize("has_more", [True, False])
def test_one_row_asks_for_lines_ahead_on_a_cpu_that_has_avx2_alone(has_more, monkeypatch):
    features = {"avx2", "fma", "f16c"} | ({"avx512f", "avx512bw", "avx512vl", "avx512vnni"} if has_more else set())
    monkeypatch.setattr("cpu_kernels.vectors.isa.host_features", lambda: frozenset(features))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")

    q5_k = FORMATS["q5_k"]

    assert bool(ahead_bytes(choose("avx2"), q5_k, 1)) is not has_more
    assert ahead_bytes(choose("avx2"), q5_k, 4) == ahead_bytes(named("avx2"), q5_k, 4)


@pytest.mark.parametrize(
    ("isa", "form", "rows", "ahead", "wanted"),
    [
        ("avx2", "q6_k", 1, 0, [*range(0, 12 * 64, 64)]),
        ("avx512", "q5_k", 1, 0, [*range(0, 10 * 64, 64)]),
        ("avx2", "q5_k", 1, 1536, [("ahead", 1536 + 64 * line) for line in range(10)]),
        ("avx512", "q4_k", 4, 6144, [("ahead", 6144 + 64 * line) for line in range(8)]),
        ("avx2", "q4_k", 1, 0, []),
        ("avx2", "q6_k", 4, 0, []),
        ("neon", "q6_k", 1, 0, []),
    ],
)
def test_lines_of_split_planes_are_read_in_order_where_one_row_asks_for_none(
    isa, form, rows, ahead, wanted, monkeypatch
):
    met = []
    where = "cpu_kernels.linear.forms.line_order"
    monkeypatch.setattr(f"{where}.read_and_drop", lambda b, address, offset: met.append(offset))
    monkeypatch.setattr(f"{where}.prefetch_value", lambda b, address, offset: met.append(("ahead", offset)))

    code_leader(named(isa), FORMATS[form], rows, ahead)(None, None)

    assert met == wanted


@pytest.mark.parametrize(("cpu", "is_free"), [("znver3", True), ("znver5", True), ("raptorlake", False), ("", False)])
def test_subnormal_numbers_are_multiplied_on_256_bits_of_amd(cpu, is_free, monkeypatch):
    monkeypatch.setattr("cpu_kernels.vectors.isa.host_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: cpu)

    assert choose("avx2").has_free_subnormals is is_free
    assert not choose("portable").has_free_subnormals and not named("avx2").has_free_subnormals


def test_the_best_path_is_the_cpu_as_it_is():
    assert target_of(named("portable")) is None
