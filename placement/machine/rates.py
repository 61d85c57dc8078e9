"""Measured rates as data: by weight format, by token rows, by cache dtype and head sharing, copy size, threads."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from cpu_kernels.formats import FORMATS, format_of, widest

DTYPES = ("fp32", "bf16", "q8", "q4")
# Bits of a cached value, its share of scales and minima included.
KV_BITS = {"fp32": 32.0, "bf16": 16.0, "q8": 8.25, "q4": 5.0}

# On every card int8 is faster up to here, where weights are read once; ANY_ROWS stands for no end.
FEWEST_INT8_ROWS, ANY_ROWS = 64, 1 << 16


@dataclass(frozen=True, slots=True)
class DtypeRates:
    """One rate per weight format, by its name: of the four that `pack` makes, and of any `others` that were measured.

    A format that has no rate here is not refused: it has that of a neighbour, which `stands_for` names.
    """

    fp32: float
    bf16: float
    q8: float
    q4: float
    others: tuple[tuple[str, float], ...] = field(default=(), kw_only=True)

    @classmethod
    def of_formats(cls, rates: Mapping[str, float]) -> "DtypeRates":
        """Rates by the names of their formats, the four that `pack` makes among them; the others by name."""
        others = tuple(sorted((name, rate) for name, rate in rates.items() if name not in DTYPES))
        return cls(*(rates[dtype] for dtype in DTYPES), others=others)

    @property
    def by_format(self) -> dict[str, float]:
        """Every rate that was measured, by the name of its format."""
        return {dtype: getattr(self, dtype) for dtype in DTYPES} | dict(self.others)

    def stands_for(self, name: str) -> str:
        """The measured format whose rate is taken for a format, or for a mix of them: itself, or a neighbour.

        Of a mix it is that of the format with most bytes; a neighbour is what the format says it is like. Raises
        ValueError for a name that is no format.
        """
        if name in DTYPES or any(name == measured for measured, _ in self.others):
            return name
        try:
            item = widest(name)
        except ValueError as error:
            raise ValueError(f"no rate for weight format {name!r}; known: {', '.join(FORMATS)}") from error
        return item.like if item.name == name else self.stands_for(item.name)

    def borrowed(self, names: Iterable[str]) -> dict[str, str]:
        """Of these formats those that were not measured, and by whose rates each is planned."""
        stand_ins = {name: self.stands_for(name) for name in names}
        return {name: measured for name, measured in stand_ins.items() if measured != name}

    def of(self, name: str) -> float:
        """The rate of a weight format or a mix, its neighbour's where it was not measured; ValueError as above."""
        measured = self.stands_for(name)
        return getattr(self, measured) if measured in DTYPES else dict(self.others)[measured]

    def scaled(self, factor: float) -> "DtypeRates":
        """Every rate multiplied by `factor`."""
        return self.mapped(lambda _, rate: rate * factor)

    def mapped(self, change: Callable[[str, float], float]) -> "DtypeRates":
        """The rates that change(format name, rate) makes of these."""
        others = tuple((name, change(name, rate)) for name, rate in self.others)
        return DtypeRates(*(change(dtype, getattr(self, dtype)) for dtype in DTYPES), others=others)


def weight_bytes_of(name: str) -> float:
    """Bytes of one weight of a format, its share of scales and minima included."""
    return format_of(name).bits_per_weight() / 8


NO_RATES = DtypeRates(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class RowRate:
    """Operations a second of a linear with this many token rows, its weight read from memory."""

    rows: int
    ops_per_s: DtypeRates


def seconds_per_operation_of_a_row(rates: Sequence[RowRate], rows: float, dtype: str) -> float:
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
        then, now = (_of_both(rate, own_bytes_per_s) for rate in (sweep_bytes_per_s, now_bytes_per_s))
        return bytes_per_s * now / then
    share = bytes_per_s / sweep_bytes_per_s
    if share >= 1:
        return share * now_bytes_per_s
    return (now_bytes_per_s**-4 + bytes_per_s**-4 - sweep_bytes_per_s**-4) ** -0.25


def _of_both(sweep_bytes_per_s: float, own_bytes_per_s: float) -> float:
    """What a kernel reads a second that waits for memory and computes at once; see `beside_memory`."""
    return (sweep_bytes_per_s**-4 + own_bytes_per_s**-4) ** -0.25


def nearest_attention(
    rates: Sequence[AttentionRate], bits: float, heads_per_group: float, head_dim: int
) -> AttentionRate:
    """The rate measured for the most similar cache: its dtype first, then head sharing and head size, by ratio."""

    def distance(rate: AttentionRate) -> tuple[float, float]:
        shape = abs(math.log2(rate.heads_per_group / heads_per_group)) + abs(math.log2(rate.head_dim / head_dim))
        return abs(math.log2(rate.bits / bits)), shape

    return min(rates, key=distance)


def attention_of_few_heads(
    rates: Sequence[AttentionRate], near: AttentionRate, heads: float, dram_bytes_per_s: float
) -> AttentionRate:
    """The nearest rate, for at most half as many query heads per KV head as it was measured with.

    Keys are read and unpacked once and multiplied for each head, so what a byte takes runs straight over heads: through
    the rate and the next one of more heads, from the cache; at least as much a head as with those, at most as much a
    byte. Memory takes its part as it does of the nearest, and nothing is faster. Without a second rate it is the
    nearest.
    """
    alike = (near.bits, near.head_dim)
    more = [r for r in rates if (r.bits, r.head_dim) == alike and r.heads_per_group > near.heads_per_group]
    next_one = min(more, key=lambda rate: rate.heads_per_group, default=near)
    are_known = next_one is not near and min(near.cached_bytes_per_s, next_one.cached_bytes_per_s) > 0
    if 2 * heads > near.heads_per_group or not are_known:
        return near
    near_s, next_s = 1 / near.cached_bytes_per_s, 1 / next_one.cached_bytes_per_s
    a_head_s = (next_s - near_s) / (next_one.heads_per_group - near.heads_per_group)
    straight_s = near_s - a_head_s * (near.heads_per_group - heads)
    own = 1 / min(near_s, max(straight_s, near_s * heads / near.heads_per_group))
    share = _of_both(dram_bytes_per_s, own) / _of_both(dram_bytes_per_s, near.cached_bytes_per_s)
    most = max(dram_bytes_per_s, near.bytes_per_s)
    return replace(near, bytes_per_s=min(most, near.bytes_per_s * share), cached_bytes_per_s=own)


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
    if kind is DtypeRates:
        return _parse_by_format(value, where)
    hints = get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"{where} needs one value for each of {', '.join(names)}, got {value!r:.80}")
    nested = {name: f"{where}.{name}" for name in names}
    return kind(
        **{
            name: _parse_by_format(value[name], nested[name])
            if hints[name] is DtypeRates
            else number(value[name], hints[name], nested[name])
            for name in names
        }
    )


def _parse_by_format(value: Any, where: str) -> DtypeRates:
    """Rates keyed by format name: those that `pack` makes must be there, others may."""
    if not isinstance(value, dict) or not set(DTYPES) <= set(value):
        raise ValueError(f"{where} needs one value for each of {', '.join(DTYPES)}, got {value!r:.80}")
    read = {name: number(rate, float, f"{where}.{name}") for name, rate in value.items()}
    if unknown := [name for name in read if name not in FORMATS]:
        near = difflib.get_close_matches(str(unknown[0]), FORMATS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: {unknown[0]!r:.40} is no weight format{hint} (known: {', '.join(FORMATS)})")
    return DtypeRates.of_formats(read)


def number(value: Any, kind: Any, where: str) -> int | float:
    """A finite number >= 0 of a type (int | float); YAML 1.1 reads "1e9" as text, so text that is a number counts."""
    try:
        read = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, got {value!r:.80}") from None
    except OverflowError:
        read = math.inf
    if isinstance(value, bool) or not 0 <= read < math.inf:
        raise ValueError(f"{where} must be a finite number >= 0, got {value!r:.80}")
    if kind is int and not read.is_integer():
        raise ValueError(f"{where} must be a whole number, got {value!r:.80}")
    return kind(read)


def int8_rows_by_rates(dtype: str, int8_ops_per_s: float, bf16_ops_per_s: float, gpu_bytes_per_s: float) -> int:
    """The most rows that a GPU multiplies faster in int8 than in bf16 after it has unpacked the weight, q8 or q4, to
    bf16: that writes and reads two bytes of every number more, once for all rows."""
    if not int8_ops_per_s:
        return FEWEST_INT8_ROWS
    saved_s = 2 / int8_ops_per_s - 2 / bf16_ops_per_s  # of a row and number, by bf16
    if saved_s <= 0:
        return ANY_ROWS
    unpacking_s = (weight_bytes_of(dtype) + 4) / gpu_bytes_per_s
    return round(min(ANY_ROWS, max(FEWEST_INT8_ROWS, unpacking_s / saved_s)))
