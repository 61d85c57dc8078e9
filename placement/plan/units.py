"""Sizes and counts as people write them: `6GiB`, `1.5 GB`, `8192`; and bytes as people read them."""

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|[kmgtKMGT])?")
_FACTORS = (
    {"": 1, "B": 1}
    | {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
    | {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
    | {p: 1024 ** (i + 1) for i, p in enumerate("KMGT")}
)


def parse_bytes(value: int | str) -> int:
    """Bytes of an integer or of text such as `6GiB`, `512 MiB`, `1.5GB` (KiB 1024, KB 1000, a bare K is KiB).

    Raises ValueError for anything else, negative numbers and zero included.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is not a size; write bytes or text such as 6GiB")
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size; write bytes or text such as 6GiB or 512MiB")
    unit = match[2] or ""
    size = (
        int(float(match[1]) * _FACTORS[unit.upper() if len(unit) == 1 else unit])
        if "." in match[1]
        else int(match[1]) * _FACTORS[unit.upper() if len(unit) == 1 else unit]
    )
    if size <= 0:
        raise ValueError(f"{value!r} is not a size, it is less than a byte; write bytes or text such as 6GiB")
    return size


def format_bytes(count: int) -> str:
    """Bytes with a binary unit and at most two decimals: `6.25 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def digits(speed: float) -> str:
    """Tokens/s with a decimal, or with three digits where a decimal would be too few to tell two plans apart."""
    return f"{speed:.1f}" if speed >= 10 else f"{speed:.3g}"


def rounded_speed(speed: float) -> str:
    """Tokens/s in three digits, written out: 0.912, 1,560, 18,900."""
    return f"{float(f'{speed:.3g}'):,.0f}" if speed >= 100 else f"{speed:.3g}"
