"""The table of what weights come from, how they are held, and what was measured of that, as the README has it.

    python examples/benchmarks/sources.py

It is made from the results that are committed beside this script; nothing is measured here.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cpu_kernels.formats import GGUF_BY_NAME, SOURCE_TYPES, format_of

RESULTS = Path(__file__).parent / "results"
ONE_ROW = ("kernels/kernels_cpu_forms_zen4_2threads", "kernels/kernels_cpu_zen3_1thread")
EXACTNESS = "quality/gguf_exactness_smollm2"
HEADINGS = (
    "weights of",
    "held as",
    "bits",
    "activations rounded: perplexity",
    "one row, of a sweep: AVX-512",
    "AVX2",
)


class Source(NamedTuple):
    """Weights as files have them. formats: what holds them. file: the type in the name of the file whose perplexity was
    measured, "" where none was."""

    label: str
    formats: tuple[str, ...]
    file: str = ""


def _gguf(name: str, file: str = "") -> Source:
    return Source(f"GGUF {name}", (GGUF_BY_NAME[name].format,), file or name)


SOURCES = (
    Source("BF16, safetensors or GGUF", ("bf16",), "BF16"),
    Source("F16", ("fp16",)),
    Source("F32", ("fp32",)),
    _gguf("Q8_0"),
    _gguf("Q6_K"),
    _gguf("Q5_K", "Q5_K_M"),
    _gguf("Q4_K", "Q4_K_M"),
    _gguf("IQ4_XS"),
    _gguf("IQ4_NL"),
    *(_gguf(name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")),
    Source("MXFP4: GGUF, gpt-oss, compressed-tensors", ("mxfp4",)),
    Source("GPTQ, AWQ, compressed-tensors, 4 bits", ("int4_g32", "int4_g64", "int4_g128")),
    Source("the same, 8 bits with zero points", ("uint8_g32", "uint8_g64", "uint8_g128")),
    Source("compressed-tensors W8A8, 8 bits", ("int8",)),
    Source("FP8 per tensor, row or block", ("fp8", "fp8_g64", "fp8_g32")),
    Source("NVFP4: compressed-tensors, ModelOpt", ("nvfp4",)),
    Source("bitsandbytes NF4", ("nf4",)),
)


def read(name: str) -> dict:
    """A committed result, by folder and name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table() -> str:
    """The whole table, Markdown."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, SOURCES)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cells(source: Source) -> tuple[str, ...]:
    """What is known of one source, "-" for what was not measured."""
    names, bits = source.formats, [f"{format_of(name).bits_per_weight():g}" for name in source.formats]
    return (
        source.label,
        ", ".join(f"`{name}`" for name in names),
        ", ".join(bits),
        _cost_of_rounding(source.file),
        *(_span(_share_of_sweep(file, name) for name in names) for file in ONE_ROW),
    )


def missing() -> set[str]:
    """Formats of files that no row of the table names."""
    named = {name for source in SOURCES for name in source.formats}
    return {item.format for item in SOURCE_TYPES.values()} - named


def _cost_of_rounding(file: str) -> str:
    for row in read(EXACTNESS)["rows"]:
        if file and row["file"] == f"smollm2.{file}.gguf":
            return f"{row['packed_perplexity'] / row['perplexity'] - 1:+.2%}"
    return "-"


def _share_of_sweep(file: str, name: str) -> float | None:
    for row in read(file)["results"]:
        if (row["op"], row.get("weight_dtype"), row.get("rows")) == ("linear", name, 1):
            return row["share_of_ceiling"]
    return None


def _span(shares: Iterable[float | None]) -> str:
    known = sorted(share for share in shares if share is not None)
    if not known:
        return "-"
    return " to ".join(dict.fromkeys(f"{share:.0%}" for share in (known[0], known[-1])))


if __name__ == "__main__":
    print(table(), end="")
