"""The formats there are, and the mixes of them that the parts of one linear may have."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from cpu_kernels.formats.base import WeightFormat

# The 16 values of IQ4_NL and IQ4_XS with 128 added, and twice those of E2M1 with 12 added.
_IQ4 = (1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241)
_E2M1 = (12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)
# Quantiles of the normal distribution, as bitsandbytes has them: QLoRA, arXiv 2305.14314, appendix E.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _row_major(name: str, plane: str, rounds_x_to: str, like: str) -> WeightFormat:
    return WeightFormat(name=name, plane=plane, rounds_x_to=rounds_x_to, like=like)


# Header lines, and inputs of a superblock.
_HEADERS = {
    "S32": (1, 64),
    "SM32": (2, 64),
    "SM64": (1, 64),
    "K2M32": (5, 256),
    "K2S16": (5, 256),
    "K2S32": (3, 256),
    "SZ32": (6, 256),
    "SZ64": (3, 256),
    "SZ128": (1, 128),
    "SI32": (6, 256),
    "SI64": (3, 256),
    "SI128": (1, 128),
    "E32": (1, 128),
    "T16": (5, 256),
    "F32": (2, 64),
    "F64": (1, 64),
    "F128": (1, 128),
}


def _coded(
    name: str,
    plane: str,
    header: str,
    offset: int = 0,
    table: tuple[int, ...] = (),
    values: tuple[float, ...] = (),
) -> WeightFormat:
    lines, inputs = _HEADERS[header]
    like = "fp32" if plane in ("f8", "v4") else "q8" if plane in ("i8", "u6", "u5") else "q4"
    return WeightFormat(
        name=name,
        plane=plane,
        rounds_x_to="int8",
        like=like,
        header=header,
        header_lines=lines,
        group_inputs=inputs,
        offset=offset,
        table=table,
        values=values,
    )


FORMATS = {
    item.name: item
    for item in (
        _row_major("fp32", "f32", "fp32", "fp32"),
        _row_major("bf16", "bf16", "bf16", "bf16"),
        _coded("q8", "i8", "S32", offset=128),
        _coded("q4", "u4", "SM64"),
        _row_major("fp16", "f16", "fp32", "bf16"),
        _coded("q4_0", "u4", "S32", offset=8),
        _coded("q4_1", "u4", "SM32"),
        _coded("q5_0", "u5", "S32", offset=16),
        _coded("q5_1", "u5", "SM32"),
        _coded("q4_k", "u4", "K2M32"),
        _coded("q5_k", "u5", "K2M32"),
        _coded("q6_k", "u6", "K2S16", offset=32),
        _coded("iq4_nl", "t4", "S32", offset=128, table=_IQ4),
        _coded("iq4_xs", "t4", "K2S32", offset=128, table=_IQ4),
        _coded("int4_g32", "u4", "SZ32"),
        _coded("int4_g64", "u4", "SZ64"),
        _coded("int4_g128", "u4", "SZ128"),
        _coded("uint8_g32", "i8", "SI32", offset=128),
        _coded("uint8_g64", "i8", "SI64", offset=128),
        _coded("uint8_g128", "i8", "SI128", offset=128),
        _coded("mxfp4", "t4", "E32", offset=12, table=_E2M1),
        _coded("nvfp4", "t4", "T16", offset=12, table=_E2M1),
        _coded("nf4", "v4", "F64", values=NF4_VALUES),
        _coded("int8", "i8", "F128", offset=128),
        _coded("fp8", "f8", "F128"),
        _coded("fp8_g64", "f8", "F64"),
        _coded("fp8_g32", "f8", "F32"),
    )
}


class Segment(NamedTuple):
    """Part of a unit in one format: its blocks, where it begins in the unit, in bytes and blocks, and the bytes of one
    of its blocks."""

    format: WeightFormat
    blocks: int
    first_byte: int
    first_block: int
    block_bytes: int


def format_of(name: str) -> WeightFormat:
    """The format of this name; ValueError names those there are."""
    if name not in FORMATS:
        raise ValueError(f"weight format {name!r} is unknown; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def mix_name(parts: Sequence[tuple[str, int]]) -> str:
    """The name of a mix: in every unit `count` blocks of each format, in this order: "q4_k*12+q6_k*4"."""
    return "+".join(f"{name}*{count}" for name, count in parts)


@cache
def _parts(name: str) -> tuple[tuple[WeightFormat, int], ...]:
    pairs = (part.partition("*") for part in name.split("+"))
    return tuple((format_of(part), int(count or 1)) for part, _, count in pairs)


@cache
def segments(name: str, in_features: int) -> tuple[Segment, ...]:
    """The segments of a unit of a format, one block, or of a mix, whose packed weight is uint8 [units, unit_bytes]."""
    found, at, block = [], 0, 0
    for item, count in _parts(name):
        block_bytes = item.block_bytes(in_features)
        found.append(Segment(item, count, at, block, block_bytes))
        at, block = at + count * block_bytes, block + count
    return tuple(found)


@cache
def unit_bytes(name: str, in_features: int) -> int:
    """Bytes of a block of a format, or of a unit of a mix."""
    return sum(count * item.block_bytes(in_features) for item, count in _parts(name))


@cache
def unit_blocks(name: str) -> int:
    """Blocks of output features in `unit_bytes`: 1 of a format."""
    return sum(count for _, count in _parts(name))


@cache
def widest(name: str) -> WeightFormat:
    """The format with the most bytes in a unit: whose rates stand for those of a mix."""
    return max(_parts(name), key=lambda part: part[1] * part[0].bits_per_weight())[0]
