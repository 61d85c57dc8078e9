"""Which dot products the CPU has: chosen once at run time, the only place where instruction sets differ.

  dot4(acc, unsigned, signed)   I32x16: acc[i] += sum of 4 products of unsigned by signed bytes, exact in int32
  dot2(acc, a, b)               I32x16: acc[i] += a[2i]*b[2i] + a[2i+1]*b[2i+1] of int16 pairs, exact in int32
  dot_bf16(acc, a, b)           F32x16: acc[i] += a[2i]*b[2i] + a[2i+1]*b[2i+1] of bf16 pairs, float32 accumulation

avx512      vpdpbusd (VNNI) and, where present, dpbf16ps and tables of 128 bytes (VBMI)
avx512vnni  avx512 without dpbf16ps, as on CPUs that have VNNI alone: bf16 by shifts and FMA
avxvnni     vpdpbusd on 256-bit registers; bf16 by shifts and FMA
avx2        bytes split into even and odd int16, multiplied and added in pairs (vpmaddwd, which cannot saturate here)
neon        sdot on arm64, of signed bytes: Neoverse N1 and later, Apple M1 and later
portable    the same arithmetic in plain LLVM vectors: any CPU
"""

import platform
from dataclasses import dataclass, replace

import llvmlite.binding

NAMES = ("avx512", "avx512vnni", "avxvnni", "avx2", "neon", "portable")


@dataclass(frozen=True, slots=True)
class Isa:
    """A chosen path: `name`, whether dpbf16ps and vpermi2b are used, and how large a register tile is.

    row_tile: rows of one tile of the q8 and q4 linear. dot_features, dot_rows: of one tile of the fp32 and bf16 linear
    at many rows; its sums, one line of weights and one input must fit in the registers. asks_ahead: whether one row
    asks for the lines of its weights before it needs them, as the CPU's own streams come too late. has_free_subnormals:
    whether, on 256 bits, an FMA of a subnormal number takes no longer, as on AMD's; Intel's take some 150 cycles.
    """

    name: str
    has_bf16: bool
    row_tile: int
    dot_features: int
    dot_rows: int
    has_byte_tables: bool = False
    asks_ahead: bool = False
    has_free_subnormals: bool = False

    @property
    def has_avx512(self) -> bool:
        """Whether a register holds 16 lanes and there are 32 of them."""
        return self.name in ("avx512", "avx512vnni")

    @property
    def has_avx2(self) -> bool:
        """Whether a register holds 8 lanes and there are 16 of them, with or without dot products of bytes."""
        return self.name in ("avxvnni", "avx2")

    @property
    def lanes(self) -> int:
        """float32 of a register, where a kernel must know; 8 also where a register holds four."""
        return 16 if self.has_avx512 else 8

    def __str__(self) -> str:
        return self.name


def host_features() -> frozenset[str]:
    """Feature names of this CPU as LLVM spells them; empty where LLVM cannot tell."""
    try:
        return frozenset(name for name, on in llvmlite.binding.get_host_cpu_features().items() if on)
    except RuntimeError:
        return frozenset()


def available(features: frozenset[str]) -> tuple[str, ...]:
    """Paths that this CPU can run, best first."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return ("neon", "portable") if machine in ("aarch64", "arm64") and "dotprod" in features else ("portable",)
    vnni512 = {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features
    found = {
        "avx512": vnni512,
        "avx512vnni": vnni512,
        "avxvnni": vnni512 or {"avx2", "avxvnni"} <= features,
        "avx2": {"avx2", "fma", "f16c"} <= features,
        "neon": False,
        "portable": True,
    }
    return tuple(name for name in NAMES if found[name])


def choose(name: str | None = None) -> Isa:
    """The best path of this CPU, or the named one; raises ValueError if this CPU cannot run it."""
    features = host_features()
    possible = available(features)
    if name is None:
        name = possible[0]
    if name not in possible:
        raise ValueError(f"isa is {name!r}; this CPU runs {', '.join(possible)}")
    is_whole = name == "avx512"
    chosen = named(name, is_whole and "avx512bf16" in features, is_whole and "avx512vbmi" in features)
    return replace(
        chosen,
        asks_ahead=chosen.asks_ahead and "avx512f" not in features,
        has_free_subnormals=chosen.has_avx2 and llvmlite.binding.get_host_cpu_name().startswith("znver"),
    )


def named(name: str, has_bf16: bool = False, has_byte_tables: bool = False) -> Isa:
    """The path of this name, whatever the CPU."""
    if name in ("avx512", "avx512vnni"):
        return Isa(name, has_bf16, row_tile=8, dot_features=4, dot_rows=6, has_byte_tables=has_byte_tables)
    if name in ("avxvnni", "avx2"):
        # 12 of 16 registers are sums: two features share what is read of six rows, so that products bind, not loads.
        # A CPU that has AVX2 alone is older: a Zen 3 reads q5_k at 94 % of a sweep where one row asks for it ahead and
        # at 68 % where not; a Zen 4 at 35 % and at 66 %.
        return Isa(name, has_bf16=False, row_tile=4, dot_features=2, dot_rows=6, asks_ahead=name == "avx2")
    # Elsewhere a vector takes two or four registers, of 16 or 32.
    return Isa(name, has_bf16=False, row_tile=4, dot_features=2, dot_rows=3)
