"""Measured rates as data: by weight dtype, by token rows, by cache dtype and head sharing, by copy size, by threads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from cpu_kernels.formats import widest

DTYPES = ("fp32", "bf16", "q8", "q4")
# Bits of a cached value, its share of scales and minima included.
KV_BITS = {"fp32": 32.0, "bf16": 16.0, "q8": 8.25, "q4": 5.0}


@dataclass(frozen=True, slots=True)
class DtypeRates:
    """One rate per weight dtype."""

    fp32: float
    bf16: float
    q8: float
    q4: float

    def of(self, dtype: str) -> float:
        """The rate of a weight dtype, of another format that of its neighbour; ValueError names the known ones."""
        if dtype not in DTYPES:
            dtype = _measured_like(dtype)
        return getattr(self, dtype)

    def scaled(self, factor: float) -> "DtypeRates":
        """Every rate multiplied by `factor`."""
        return DtypeRates(*(getattr(self, dtype) * factor for dtype in DTYPES))


def _measured_like(name: str) -> str:
    """The weight dtype whose rates stand for those of a format, or of the widest in a mix."""
    try:
        return widest(name).like
    except ValueError as error:
        raise ValueError(f"no rate for weight dtype {name!r}; known: {', '.join(DTYPES)}") from error


NO_RATES = DtypeRates(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class RowRate:
    """Operations a second of a linear with this many token rows, its weight read from memory."""

    rows: int
    ops_per_s: DtypeRates


def seconds_per_operation_of_a_row(rates: Sequence[RowRate], rows: int, dtype: str) -> float:
    """Seconds of one operation for each of `rows` rows: time runs straight between measured row counts.

    rates: ascending in rows. Below the first row count the time is its own, above the last it grows with the rows.
    """
    times = [(rate.rows, rate.rows / rate.ops_per_s.of(dtype)) for rate in rates]
    if rows <= times[0][0]:
        return times[0][1]
    if rows >= times[-1][0]:
        return times[-1][1] * rows / times[-1][0]
    right = next(i for i, (known, _) in enumerate(times) if known >= rows)
    (low, before), (high, after) = times[right - 1], times[right]
    return before + (after - before) * (rows - low) / (high - low)


@dataclass(frozen=True, slots=True)
class AttentionRate:
    """CPU attention over a cache in DRAM: bytes of K and V a second with one row a sequence, operations with many.

    bits: of one cached value. heads_per_group: query heads that share a KV head. extra_keys: keys that a row of a chunk
    costs beyond those it sees, for tiles along the diagonal are computed whole. cached_bytes_per_s: with one row, when
    K and V are in the cache; 0 is unknown.
    """

    bits: float
    heads_per_group: int
    head_dim: int
    bytes_per_s: float
    ops_per_s: float
    extra_keys: float = 0.0
    cached_bytes_per_s: float = 0.0


def beside_memory(
    bytes_per_s: float, sweep_bytes_per_s: float, now_bytes_per_s: float, own_bytes_per_s: float = 0.0
) -> float:
    """What a kernel reads a second when a plain read of memory reaches `now_bytes_per_s`, if it read `bytes_per_s`
    while a plain read reached `sweep_bytes_per_s`.

    A kernel waits for memory and computes at once, so the slower decides: rate^-4 = sweep^-4 + own^-4, where own is its
    rate if memory were no limit, and the power takes a sixth off where both are alike. own_bytes_per_s is that rate
    where it was measured, from the cache; the rest by which the kernel missed the formula is then taken as it was.
    Where it was not, it is what the formula makes of both rates, and a kernel that kept up with the plain read follows
    it.
    """
    if own_bytes_per_s:
        then, now = ((rate**-4 + own_bytes_per_s**-4) ** -0.25 for rate in (sweep_bytes_per_s, now_bytes_per_s))
        return bytes_per_s * now / then
    share = bytes_per_s / sweep_bytes_per_s
    if share >= 1:
        return share * now_bytes_per_s
    return (now_bytes_per_s**-4 + bytes_per_s**-4 - sweep_bytes_per_s**-4) ** -0.25


def nearest_attention(
    rates: Sequence[AttentionRate], bits: float, heads_per_group: float, head_dim: int
) -> AttentionRate:
    """The rate measured for the most similar cache: its dtype first, then head sharing and head size, by ratio."""

    def distance(rate: AttentionRate) -> tuple[float, float]:
        shape = abs(math.log2(rate.heads_per_group / heads_per_group)) + abs(math.log2(rate.head_dim / head_dim))
        return abs(math.log2(rate.bits / bits)), shape

    return min(rates, key=distance)


@dataclass(frozen=True, slots=True)
class CopyRate:
    """Bytes a second of copies of one size over the bus: to the GPU and back, from pinned and from pageable memory."""

    size_bytes: int
    h2d_pinned: float
    d2h_pinned: float
    h2d_pageable: float
    d2h_pageable: float


@dataclass(frozen=True, slots=True)
class ThreadRate:
    """Bytes a second of a one-row q4 linear and of a plain sweep, by thread count."""

    threads: int
    linear_bytes_per_s: float
    sweep_bytes_per_s: float


def parse(kind: type, value: Any, where: str) -> Any:
    """Build one of these classes from plain values; ValueError names the field that is missing, unknown or no
    number."""
    hints = get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"{where} needs one value for each of {', '.join(names)}, got {value!r:.80}")
    nested = {name: f"{where}.{name}" for name in names}
    return kind(
        **{
            name: parse(DtypeRates, value[name], nested[name])
            if hints[name] is DtypeRates
            else number(value[name], hints[name], nested[name])
            for name in names
        }
    )


def number(value: Any, kind: Any, where: str) -> int | float:
    """A finite number >= 0 of a type (int | float); YAML 1.1 reads "1e9" as text, so text that is a number counts."""
    try:
        read = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, got {value!r:.80}") from None
    except OverflowError:
        read = float("inf")
    if isinstance(value, bool) or not 0 <= read < float("inf"):
        raise ValueError(f"{where} must be a finite number >= 0, got {value!r:.80}")
    return kind(read)
