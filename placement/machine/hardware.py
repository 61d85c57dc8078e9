"""How fast one machine is, measured by the profiler or read from the catalogue, and how fast it is under other
conditions: other threads, less DRAM, other users, a step that stays in the cache.

A profile holds numbers only; `figures` names them.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from placement.machine.figures import Figures
from placement.machine.profile_text import parsed, plain, values_of_file, values_of_json
from placement.machine.rates import DtypeRates, RowRate, ThreadRate, beside_memory, weight_bytes_of

# Fewer rows than this wait for weights, more compute.
FEW_ROWS = 4
CATALOGUE = Path(__file__).parent / "catalogue"


@dataclass(frozen=True, slots=True)
class HardwareProfile(Figures):
    """The figures of one machine, the same machine under other conditions, and both as text."""

    def with_less_dram(self, share: float) -> "HardwareProfile":
        """The profile with a share of the rate of its DRAM and of what the CPU lane reads of it."""
        return replace(
            self,
            dram_bytes_per_s=self.dram_bytes_per_s * share,
            cpu_linear_bytes_per_s=self.cpu_linear_bytes_per_s.scaled(share),
            cpu_attention_bytes_per_s=self.cpu_attention_bytes_per_s * share,
        )

    def with_threads(self, threads: int) -> "HardwareProfile":
        """The profile with another thread count.

        CPU operations scale with threads; CPU bandwidth does too until it meets the DRAM rate.
        """
        factor = threads / self.cores
        linear = self.cpu_linear_bytes_per_s.mapped(
            lambda _, rate: min(rate * factor, max(self.dram_bytes_per_s, rate))
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
            cpu_cached_bytes_per_s=self.cpu_cached_bytes_per_s.scaled(factor),
            cpu_activation_s=self.cpu_activation_s.scaled(1 / factor),
            cpu_rows=tuple(self._rows_with(rate, factor) for rate in self.cpu_rows),
            cpu_attention=tuple(
                replace(
                    rate,
                    bytes_per_s=min(rate.bytes_per_s * factor, max(rate.bytes_per_s, self.dram_bytes_per_s)),
                    ops_per_s=rate.ops_per_s * factor,
                )
                for rate in self.cpu_attention
            ),
        )

    def _rows_with(self, rate: RowRate, factor: float) -> RowRate:
        """A measured row count at another thread count: never past what the DRAM gives at that many rows."""

        def at_most_memory(name: str, ops_per_s: float) -> float:
            ceiling = 2 * rate.rows * self.dram_bytes_per_s / weight_bytes_of(name)
            return min(ops_per_s * factor, max(ops_per_s, ceiling))

        return replace(rate, ops_per_s=rate.ops_per_s.mapped(at_most_memory))

    def as_now(self, sweep_bytes_per_s: float, arithmetic: float = 1.0) -> "HardwareProfile":
        """The profile as other users of the machine and its clock leave it now.

        sweep_bytes_per_s: what a plain read of memory reaches; what reads memory scales with it, attention with one row
        only as far as memory is its limit. arithmetic: factor of what computes.
        """
        then = self.sweep_bytes_per_s
        factor = sweep_bytes_per_s / then
        return replace(
            self,
            dram_bytes_per_s=self.dram_bytes_per_s * factor,
            cpu_linear_bytes_per_s=self.cpu_linear_bytes_per_s.scaled(factor),
            cpu_ops_per_s=self.cpu_ops_per_s.scaled(arithmetic),
            cpu_attention_bytes_per_s=beside_memory(self.cpu_attention_bytes_per_s, then, sweep_bytes_per_s),
            cpu_attention_ops_per_s=self.cpu_attention_ops_per_s * arithmetic,
            cpu_rows=tuple(
                replace(rate, ops_per_s=rate.ops_per_s.scaled(factor if rate.rows < FEW_ROWS else arithmetic))
                for rate in self.cpu_rows
            ),
            cpu_attention=tuple(
                replace(
                    rate,
                    bytes_per_s=beside_memory(rate.bytes_per_s, then, sweep_bytes_per_s, rate.cached_bytes_per_s),
                    ops_per_s=rate.ops_per_s * arithmetic,
                )
                for rate in self.cpu_attention
            ),
            thread_sweep=tuple(
                ThreadRate(rate.threads, rate.linear_bytes_per_s * factor, rate.sweep_bytes_per_s * factor)
                for rate in self.thread_sweep
            ),
        )

    def for_working_set(self, read_bytes: int) -> "HardwareProfile":
        """The profile for steps that read `read_bytes` in all: what fits in the cache is read faster than from DRAM.

        Three quarters of a cache stay, two caches drive each other out; in between a share stays.
        """
        if not self.cpu_cache_bytes or not self.cpu_cached_bytes_per_s.bf16:
            return self
        kept = min(1.0, max(0.0, (2 - read_bytes / self.cpu_cache_bytes) / 1.25))

        def blend(dram: float, cached: float) -> float:
            return 1 / (kept / max(dram, cached) + (1 - kept) / dram)

        def blended(rates: DtypeRates, cached: Callable[[str], float]) -> DtypeRates:
            return rates.mapped(lambda name, rate: blend(rate, cached(name)))

        def cached_ops(rate: RowRate) -> Callable[[str], float]:
            return lambda name: min(2 * rate.rows * cached.of(name) / weight_bytes_of(name), self.most_ops(name))

        cached = self.cpu_cached_bytes_per_s
        rows = tuple(replace(rate, ops_per_s=blended(rate.ops_per_s, cached_ops(rate))) for rate in self.cpu_rows)
        return replace(
            self,
            cpu_cache_bytes=0,
            dram_bytes_per_s=blend(self.dram_bytes_per_s, max(cached.by_format.values())),
            cpu_linear_bytes_per_s=blended(self.cpu_linear_bytes_per_s, cached.of),
            cpu_rows=rows,
            cpu_attention=tuple(
                replace(rate, bytes_per_s=blend(rate.bytes_per_s, rate.cached_bytes_per_s))
                for rate in self.cpu_attention
            ),
            step_overhead_s=kept * (self.cached_step_overhead_s or self.step_overhead_s)
            + (1 - kept) * self.step_overhead_s,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)} | {
            "fingerprint": dict(self.fingerprint)
        }

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal profile."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """YAML text that `from_file` reads back to an equal profile."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "hardware profile") -> "HardwareProfile":
        """Build a profile from plain values; ValueError names unknown, missing and non-numeric fields."""
        return cls(**parsed(values, where))

    @classmethod
    def from_json(cls, text: str, where: str = "hardware profile") -> "HardwareProfile":
        """Read what `to_json` wrote; ValueError for anything else."""
        return cls.from_dict(values_of_json(text, where), where)

    @classmethod
    def from_file(cls, path: str | Path) -> "HardwareProfile":
        """Read a profile from a file in JSON or YAML, such as `profile --save` writes and the catalogue has.

        A file without a name has that of the file. Raises ValueError for one that is no text, no mapping or no profile.
        """
        file = Path(path)
        return cls.from_dict({"name": file.stem} | values_of_file(file), str(file))

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
