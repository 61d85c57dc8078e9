"""Types of single policy values: how each is read from YAML, written back, and described to editors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from cpu_kernels.formats.weights import WEIGHT_DTYPES
from placement.machine.ranges import MOST_CORES
from placement.plan.units import parse_bytes
from placement.plan.workload import KV_DTYPES
from placement.policy.problems import nearest

SPECULATIONS = ("off", "ngram", "auto")  # who drafts tokens, where no model does


@dataclass(frozen=True, slots=True)
class Share:
    """Part of a linear: a fraction of its units, a number of units or a number of output features."""

    kind: Literal["fraction", "units", "features"]
    value: float

    def __str__(self) -> str:
        if self.kind == "fraction":
            return repr(self.value)
        return f"{int(self.value)} {self.kind}"


def parse_share(value: Any) -> Share | None:
    """Read `0.25`, `25%`, `12 units`, `512 features` or `auto` (None); ValueError says what is allowed."""
    if value is None or value == "auto" or isinstance(value, Share):
        return None if value == "auto" else value
    if isinstance(value, str):
        number, _, unit = value.strip().partition(" ")
        if unit in ("units", "unit", "features", "feature") and number.isdigit():
            return Share("units" if unit.startswith("unit") else "features", int(number))
        if value.endswith("%"):
            value = _percent(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return Share("fraction", float(value))
    raise ValueError("must be a fraction from 0 to 1, a percentage, '12 units', '512 features' or auto")


def _percent(text: str) -> float:
    try:
        return float(text[:-1]) / 100
    except ValueError:
        return -1.0


def _parse_count(value: Any) -> int | Literal["all"] | None:
    if value is None or value == "auto":
        return None
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("must be a whole number >= 0, all or auto")


def _parse_size(value: Any) -> int | None:
    return None if value is None or value == "auto" else parse_bytes(value)


def _parse_positive(value: Any) -> int | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("must be a whole number >= 1 or auto")


def _parse_threads(value: Any) -> int | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_CORES:
        return value
    raise ValueError(f"must be a whole number from 1 to {MOST_CORES}, or auto")


def _parse_kv_dtype(value: Any) -> str | None:
    if value is None or value == "auto":
        return None
    if value in KV_DTYPES:
        return value
    raise ValueError(f"must be one of {', '.join(KV_DTYPES)} or auto")


def _parse_dtype(value: Any) -> str | None:
    if value is None or value == "auto":
        return None
    if value in WEIGHT_DTYPES:
        return value
    raise ValueError(f"must be one of {', '.join(WEIGHT_DTYPES)} or auto")


def _parse_staging_slots(value: Any) -> int | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and (value == 0 or value >= 2):
        return value
    raise ValueError("must be 0 (nothing may stream), a whole number >= 2, or auto")


def names_model(value: str) -> bool:
    """Whether text looks like a model's directory, file or hub id, rather than like one of a few words."""
    try:
        return value != "" and ("/" in value or Path(value).exists())
    except (OSError, ValueError):  # a name that no file can have
        return False


def _parse_speculate(value: Any) -> str:
    if value is None:
        return "off"
    if isinstance(value, str | Path) and (str(value) in SPECULATIONS or names_model(str(value))):
        return str(value)
    near = nearest(value, SPECULATIONS)
    raise ValueError(f"must be one of {', '.join(SPECULATIONS)}, or the directory, file or hub id of a model{near}")


def _parse_inserts(value: Any) -> int | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("must be a whole number >= 0 or auto")


def _auto_or(*schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*schemas, {"const": "auto"}]})


ShareField = Annotated[
    Any,
    BeforeValidator(parse_share),
    PlainSerializer(lambda share: None if share is None else str(share)),
    _auto_or(
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^(\d+(\.\d+)?%|\d+ (units?|features?))$"},
    ),
]
CountField = Annotated[
    Any, BeforeValidator(_parse_count), _auto_or({"type": "integer", "minimum": 0}, {"const": "all"})
]
SizeField = Annotated[
    int | None,
    BeforeValidator(_parse_size),
    _auto_or({"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\d+(\.\d+)? ?([KMGT]i?B?|B)?$"}),
]
StagingSlotsField = Annotated[
    int | None, BeforeValidator(_parse_staging_slots), _auto_or({"const": 0}, {"type": "integer", "minimum": 2})
]
InsertsField = Annotated[int | None, BeforeValidator(_parse_inserts), _auto_or({"type": "integer", "minimum": 0})]
KvDtypeField = Annotated[str | None, BeforeValidator(_parse_kv_dtype), _auto_or({"enum": list(KV_DTYPES)})]
DtypeField = Annotated[str | None, BeforeValidator(_parse_dtype), _auto_or({"enum": list(WEIGHT_DTYPES)})]
SpeculateField = Annotated[
    str,
    BeforeValidator(_parse_speculate),
    WithJsonSchema({"anyOf": [{"enum": list(SPECULATIONS)}, {"type": "string"}]}),
]
ThreadsField = Annotated[
    int | None, BeforeValidator(_parse_threads), _auto_or({"type": "integer", "minimum": 1, "maximum": MOST_CORES})
]
PositiveField = Annotated[int | None, BeforeValidator(_parse_positive), _auto_or({"type": "integer", "minimum": 1})]
