"""Is every value of a hardware profile one that a machine can have? A profile may come from a file that anybody wrote.

Planning divides by rates and starts as many threads as there are cores, so a rate of 0 or a million cores must not get
that far.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from placement.machine.rates import DtypeRates

MOST_CORES = 4096
MOST_SECONDS = 60.0  # of any single overhead
MOST = 1e18  # bytes, operations, or either a second
SHARES = (
    "cpu_slowdown_while_copying",
    "cpu_attention_slowdown_while_copying",
    "copy_slowdown_while_computing",
    "overlap",
    "prompt_overlap",
)
SHARES_OR_NONE = ("busy_share",)
POSITIVE = (
    "dram_bytes_per_s",
    "cpu_attention_bytes_per_s",
    "cpu_attention_ops_per_s",
    "cpu_linear_bytes_per_s",
    "cpu_ops_per_s",
    "cpu_rows",
    "cpu_attention",
)
POSITIVE_WITH_GPU = ("gpu_flops", "gpu_rows")
MAY_BE_ZERO = ("extra_keys", "cached_bytes_per_s")  # of a table's entry: none, and unknown


def check_ranges(profile: Any) -> None:
    """Raise ValueError naming the first field of a HardwareProfile whose value no machine has."""
    positive = POSITIVE + (POSITIVE_WITH_GPU if profile.has_gpu else ())
    for entry in fields(profile):
        for place, value in _numbers(entry.name, getattr(profile, entry.name)):
            needs_more = entry.name in positive and place.rpartition(".")[2] not in MAY_BE_ZERO
            _check(profile.name, place, value, needs_more)
    if not isinstance(profile.cores, int) or not 1 <= profile.cores <= MOST_CORES:
        raise ValueError(f"hardware profile {profile.name}: cores must be in 1..{MOST_CORES}, got {profile.cores}")


def _numbers(place: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a field, with its place."""
    if isinstance(value, DtypeRates):
        yield from ((f"{place}.{name}", rate) for name, rate in value.by_format.items())
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _numbers(f"{place}.{entry.name}", getattr(value, entry.name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _numbers(f"{place}[{index}]", item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield place, value


def _check(profile: str, place: str, value: float, is_positive: bool) -> None:
    name = place.partition("[")[0].partition(".")[0]
    if name in SHARES:
        if not 0 < value <= 1:
            raise ValueError(f"hardware profile {profile}: {name} must be in (0, 1], got {value}")
    elif name in SHARES_OR_NONE and value > 1:
        raise ValueError(f"hardware profile {profile}: {name} must be in [0, 1], got {value}")
    elif is_positive and not value > 0:
        raise ValueError(f"hardware profile {profile}: {place} must be positive, got {value}")
    most = MOST_SECONDS if name.endswith("_s") and not name.endswith("per_s") else MOST
    if not 0 <= value <= most:
        raise ValueError(f"hardware profile {profile}: {place} must be from 0 to {most:g}, got {value}")
