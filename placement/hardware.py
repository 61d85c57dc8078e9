"""How fast one machine is: the rates that the cost model needs, measured by the profiler or read from the catalogue.

A profile holds numbers only. Rates are effective ones (what a good kernel reaches), in bytes or operations per second;
an operation is one multiplication or one addition. A rate of 0 for `h2d_bytes_per_s` means that there is no GPU.
"""

import difflib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CATALOGUE = Path(__file__).parent / "catalogue"
DTYPES = ("fp32", "bf16", "q8", "q4")


@dataclass(frozen=True, slots=True)
class DtypeRates:
    """One rate per weight dtype."""

    fp32: float
    bf16: float
    q8: float
    q4: float

    def of(self, dtype: str) -> float:
        """The rate of a weight dtype; ValueError names the known ones."""
        if dtype not in DTYPES:
            raise ValueError(f"no rate for weight dtype {dtype!r}; known: {', '.join(DTYPES)}")
        return getattr(self, dtype)

    def scaled(self, factor: float) -> "DtypeRates":
        """Every rate multiplied by `factor`."""
        return DtypeRates(*(getattr(self, dtype) * factor for dtype in DTYPES))


NO_RATES = DtypeRates(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """Rates of one machine.

    source: "measured" or where the public figures come from. cores: threads that the CPU lane uses.
    cpu_linear_bytes_per_s, cpu_ops_per_s: weight bytes and operations of a linear on all cores.
    cpu_slowdown_while_copying: CPU rate while PCIe copies run, as a share of the rate alone (1 = not slowed).
    handover_s: activations to the CPU, wake-up and result back, without their bytes. launch_overhead_s: one GPU kernel;
    cpu_call_s: one call of the CPU kernel team; step_overhead_s: sampling and Python once per step.
    gpu_context_bytes: GPU memory that the driver takes for itself. unified_memory: GPU and CPU share one DRAM.
    fingerprint: (key, value) pairs by which a measured profile is recognised as stale or foreign.
    """

    name: str
    source: str
    cores: int
    dram_bytes: int
    dram_bytes_per_s: float
    cpu_linear_bytes_per_s: DtypeRates
    cpu_ops_per_s: DtypeRates
    cpu_attention_bytes_per_s: float
    cpu_attention_ops_per_s: float
    h2d_bytes_per_s: float = 0.0
    d2h_bytes_per_s: float = 0.0
    gpu_memory_bytes: int = 0
    gpu_bytes_per_s: float = 0.0
    gpu_flops: DtypeRates = NO_RATES
    gpu_attention_ops_per_s: float = 0.0
    handover_s: float = 0.0
    cpu_slowdown_while_copying: float = 1.0
    launch_overhead_s: float = 0.0
    cpu_call_s: float = 5e-6
    step_overhead_s: float = 0.0
    gpu_context_bytes: int = 0
    unified_memory: bool = False
    fingerprint: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("dram_bytes_per_s", "cpu_attention_bytes_per_s", "cpu_attention_ops_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"hardware profile {self.name}: {name} must be positive, got {getattr(self, name)}")
        if self.has_gpu and not (
            self.gpu_bytes_per_s > 0 and self.d2h_bytes_per_s > 0 and self.gpu_attention_ops_per_s > 0
        ):
            raise ValueError(
                f"hardware profile {self.name}: a GPU (h2d_bytes_per_s > 0) needs positive d2h_bytes_per_s, "
                "gpu_bytes_per_s and gpu_attention_ops_per_s"
            )
        if not 0 < self.cpu_slowdown_while_copying <= 1:
            raise ValueError(
                f"hardware profile {self.name}: cpu_slowdown_while_copying must be in (0, 1], got "
                f"{self.cpu_slowdown_while_copying}"
            )

    @property
    def has_gpu(self) -> bool:
        """Whether the profile describes a GPU lane."""
        return self.h2d_bytes_per_s > 0

    def with_threads(self, threads: int) -> "HardwareProfile":
        """The profile with another thread count.

        CPU operations scale with threads; CPU bandwidth does too until it meets the DRAM rate.
        """
        factor = threads / self.cores
        linear = DtypeRates(
            *(min(self.cpu_linear_bytes_per_s.of(dtype) * factor, self._cpu_ceiling(dtype)) for dtype in DTYPES)
        )
        attention = min(
            self.cpu_attention_bytes_per_s * factor, max(self.dram_bytes_per_s, self.cpu_attention_bytes_per_s)
        )
        return replace(
            self,
            cores=threads,
            cpu_linear_bytes_per_s=linear,
            cpu_ops_per_s=self.cpu_ops_per_s.scaled(factor),
            cpu_attention_bytes_per_s=attention,
            cpu_attention_ops_per_s=self.cpu_attention_ops_per_s * factor,
        )

    def _cpu_ceiling(self, dtype: str) -> float:
        return max(self.dram_bytes_per_s, self.cpu_linear_bytes_per_s.of(dtype))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return asdict(self) | {"fingerprint": dict(self.fingerprint)}

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal profile."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "hardware profile") -> "HardwareProfile":
        """Build a profile from plain values; ValueError names unknown, missing and non-numeric fields."""
        known = {f.name: f for f in fields(cls)}
        _check_keys(values, known, where)
        parsed = dict(values)
        for name in ("cpu_linear_bytes_per_s", "cpu_ops_per_s", "gpu_flops"):
            if name in parsed:
                parsed[name] = _rates(parsed[name], f"{where}: {name}")
        for name in known:
            if name in parsed and known[name].type in (int, float):
                parsed[name] = _number(parsed[name], known[name].type, f"{where}: {name}")
        parsed["fingerprint"] = tuple(sorted((str(k), str(v)) for k, v in dict(values.get("fingerprint", {})).items()))
        return cls(**parsed)

    @classmethod
    def from_json(cls, text: str, where: str = "hardware profile") -> "HardwareProfile":
        """Read what `to_json` wrote."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(values).__name__}")
        return cls.from_dict(values, where)

    @classmethod
    def named(cls, name: str) -> "HardwareProfile":
        """A machine of the catalogue; ValueError lists the nearest names."""
        return _catalogue_entry(name)


def catalogue_names() -> tuple[str, ...]:
    """Names of the machines in the catalogue."""
    return tuple(sorted(path.stem for path in CATALOGUE.glob("*.yaml")))


@cache
def _catalogue_entry(name: str) -> HardwareProfile:
    names = catalogue_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown hardware {name!r}{hint} (known: {', '.join(names)})")
    values = yaml.safe_load((CATALOGUE / f"{name}.yaml").read_text(encoding="utf-8"))
    return HardwareProfile.from_dict(values | {"name": name}, f"{name}.yaml")


def _check_keys(values: dict[str, Any], known: dict[str, Any], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{where}: unknown field {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    required = (
        "name",
        "source",
        "cores",
        "dram_bytes",
        "dram_bytes_per_s",
        "cpu_linear_bytes_per_s",
        "cpu_ops_per_s",
        "cpu_attention_bytes_per_s",
        "cpu_attention_ops_per_s",
    )
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")


def _rates(value: Any, where: str) -> DtypeRates:
    if not isinstance(value, dict) or set(value) != set(DTYPES):
        raise ValueError(f"{where} needs one rate for each of {', '.join(DTYPES)}, got {value!r}")
    return DtypeRates(**{dtype: _number(value[dtype], float, f"{where}.{dtype}") for dtype in DTYPES})


def _number(value: Any, kind: type, where: str) -> int | float:
    # YAML 1.1 reads "1e9" as text, so text that is a number is accepted.
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, got {value!r}") from None
    if isinstance(value, bool) or not 0 <= number < float("inf"):
        raise ValueError(f"{where} must be a finite number >= 0, got {value!r}")
    return kind(number)
