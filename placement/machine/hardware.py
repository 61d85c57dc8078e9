"""How fast one machine is: the rates that the cost model needs, measured by the profiler or read from the catalogue.

A profile holds numbers only. Rates are effective ones (what a good kernel reaches), in bytes or operations per second;
an operation is one multiplication or one addition. A rate of 0 for `h2d_bytes_per_s` means that there is no GPU.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from placement.machine.ranges import check_ranges
from placement.machine.rates import (
    NO_RATES,
    AttentionRate,
    CopyRate,
    DtypeRates,
    RowRate,
    ThreadRate,
    beside_memory,
    int8_rows_by_rates,
    number,
    parse,
    weight_bytes_of,
)
from placement.plan.workload import STAGING_PIECE_BYTES

# Fewer rows than this wait for weights, more compute.
FEW_ROWS = 4
MOST_ENTRIES = 1000  # of a table
CATALOGUE = Path(__file__).parent / "catalogue"
TABLES = {
    "cpu_rows": RowRate,
    "gpu_rows": RowRate,
    "cpu_attention": AttentionRate,
    "copies": CopyRate,
    "thread_sweep": ThreadRate,
}


# Of the CPUs, what others may use while a machine is measured before its rates are in doubt: on two cores a fifth of
# one.
MOST_BUSY_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """Rates of one machine.

    source: "measured" or where the public figures come from. cores: threads that the CPU lane uses.
    cpu_linear_bytes_per_s, cpu_ops_per_s: weight bytes and operations of a linear on all cores.
    cpu_cached_bytes_per_s: weight bytes when all that a step reads stays in a cache of cpu_cache_bytes; 0 is unknown.
    cpu_slowdown_while_copying, cpu_attention_slowdown_while_copying: CPU rate while PCIe copies run, as a share of the
    rate alone (1 = not slowed). copy_slowdown_while_computing: the other way round, copies while the CPU lane reads
    DRAM.
    handover_s: activations to the CPU, wake-up and result back, without their bytes. launch_overhead_s: one GPU kernel;
    cpu_activation_s: a linear's own time per activation, in or out, of a row;
    cpu_call_s: one call of the CPU kernel team; cpu_recorded_call_s: the same in a recorded step, 0 is as a call;
    cpu_small_bytes_per_s: activations through norms and such, 0 is the DRAM rate; step_overhead_s: Python once per
    step,
    cached_step_overhead_s: the same when a step's weights leave it in the cache;
    layer_overhead_s: Python around a layer of a step that is not recorded; gpu_layer_overhead_s: Python queueing a
    layer of a prompt on a GPU, four products and all around them, beside the GPU's own work; gpu_product_overhead_s:
    each product more, of a large linear or of a streamed piece, 0 is a quarter of the layer's;
    logits_s_per_token: choosing a token, per entry of the vocabulary.
    gpu_int8_ops_per_s: products of many rows over q8 and q4 weights in int8, 0 is unknown; without gpu_rows, gpu_flops
    has those in bf16.
    gpu_q8_int8_rows, gpu_q4_int8_rows: the most rows for which int8 was measured to be faster, 0 is not measured.
    overlap, prompt_overlap: share of what GPU, CPU and bus can do side by side that they do, in decode and in a prompt;
    overlap_source: on which machine that was seen.
    gpu_context_bytes: GPU memory that the driver takes for itself. unified_memory: GPU and CPU share one DRAM.
    streams_in_decode: whether streaming weights was seen to bring a step of one row more than it takes from the CPU
    lane, which reads the same memory. Prompts stream in any case.
    cpu_rows, gpu_rows: linears by token rows, ascending; they replace the two-rate estimate where there are any.
    cpu_attention: by cache dtype and head sharing, likewise. h2d_pageable_bytes_per_s, d2h_pageable_bytes_per_s,
    copies,
    thread_sweep: measured for people, not used by the cost model.
    staging_piece_bytes: of the weights that are streamed at a time.
    busy_share: of the CPUs, what other programs used while this was measured.
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
    copy_slowdown_while_computing: float = 1.0
    launch_overhead_s: float = 0.0
    cpu_call_s: float = 5e-6
    step_overhead_s: float = 0.0
    gpu_context_bytes: int = 0
    overlap: float = 1.0
    prompt_overlap: float = 1.0
    overlap_source: str = ""
    unified_memory: bool = False
    streams_in_decode: bool = True
    cpu_cache_bytes: int = 0
    cpu_cached_bytes_per_s: DtypeRates = NO_RATES
    cpu_attention_slowdown_while_copying: float = 1.0
    cpu_activation_s: DtypeRates = NO_RATES
    cpu_recorded_call_s: float = 0.0
    cpu_small_bytes_per_s: float = 0.0
    layer_overhead_s: float = 0.0
    gpu_layer_overhead_s: float = 0.0
    gpu_product_overhead_s: float = 0.0
    gpu_int8_ops_per_s: float = 0.0
    gpu_q8_int8_rows: int = 0
    gpu_q4_int8_rows: int = 0
    cached_step_overhead_s: float = 0.0
    logits_s_per_token: float = 0.0
    h2d_pageable_bytes_per_s: float = 0.0
    d2h_pageable_bytes_per_s: float = 0.0
    cpu_rows: tuple[RowRate, ...] = ()
    gpu_rows: tuple[RowRate, ...] = ()
    cpu_attention: tuple[AttentionRate, ...] = ()
    copies: tuple[CopyRate, ...] = ()
    thread_sweep: tuple[ThreadRate, ...] = ()
    staging_piece_bytes: int = STAGING_PIECE_BYTES
    busy_share: float = 0.0
    fingerprint: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.has_gpu and not (
            self.gpu_bytes_per_s > 0 and self.d2h_bytes_per_s > 0 and self.gpu_attention_ops_per_s > 0
        ):
            raise ValueError(
                f"hardware profile {self.name}: a GPU (h2d_bytes_per_s > 0) needs positive d2h_bytes_per_s, "
                "gpu_bytes_per_s and gpu_attention_ops_per_s"
            )
        check_ranges(self)
        for name in ("cpu_rows", "gpu_rows"):
            rows = [rate.rows for rate in getattr(self, name)]
            if rows != sorted(set(rows)) or (rows and rows[0] < 1):
                raise ValueError(f"hardware profile {self.name}: {name} must have ascending row counts, got {rows}")

    @property
    def has_gpu(self) -> bool:
        """Whether the profile describes a GPU lane."""
        return self.h2d_bytes_per_s > 0

    @property
    def int8_rows(self) -> dict[str, int]:
        """The most rows that the GPU is to multiply in int8, by weight format: measured, else from the rates."""
        measured = {"q8": self.gpu_q8_int8_rows, "q4": self.gpu_q4_int8_rows}
        rates = self.gpu_int8_ops_per_s, self.gpu_flops.bf16, self.gpu_bytes_per_s
        return {name: rows or int8_rows_by_rates(name, *rates) for name, rows in measured.items()}

    def gpu_ops_per_s(self, dtype: str, rows: int) -> float:
        """Operations a second of a linear of many rows, in int8 or in bf16 as `int8_rows` says."""
        if self.gpu_int8_ops_per_s and rows <= self.int8_rows.get(dtype, 0):
            return self.gpu_int8_ops_per_s
        return self.gpu_flops.of(dtype)

    @property
    def is_of_a_busy_machine(self) -> bool:
        """Whether others used so much of the CPUs meanwhile that the rates may be too low."""
        return self.busy_share > MOST_BUSY_SHARE

    def overlap_of(self, q_len: int) -> float:
        """The overlap of lanes in a pass of so many rows a sequence."""
        return self.overlap if q_len == 1 else self.prompt_overlap

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

    @property
    def sweep_bytes_per_s(self) -> float:
        """What a plain read of memory reaches with the threads in use; some kernels read a little faster."""
        sweeps = [rate.sweep_bytes_per_s for rate in self.thread_sweep if rate.threads == self.cores]
        return sweeps[0] if sweeps else self.dram_bytes_per_s

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
            return lambda name: min(2 * rate.rows * cached.of(name) / weight_bytes_of(name), self._most_ops(name))

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

    def _most_ops(self, dtype: str) -> float:
        return max((rate.ops_per_s.of(dtype) for rate in self.cpu_rows), default=self.cpu_ops_per_s.of(dtype))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)} | {
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
        known = {f.name: f for f in fields(cls)}
        _check_keys(values, known, where)
        parsed = dict(values)
        for name in known:
            if name in parsed and known[name].type is DtypeRates:
                parsed[name] = parse(DtypeRates, parsed[name], f"{where}: {name}")
            elif name in parsed and known[name].type in (int, float):
                parsed[name] = number(parsed[name], known[name].type, f"{where}: {name}")
        for name, kind in TABLES.items():
            rows = _expected(values, name, (), (list, tuple), where)
            parsed[name] = tuple(parse(kind, entry, f"{where}: {name}[{i}]") for i, entry in enumerate(rows))
        fingerprint = _expected(values, "fingerprint", {}, dict, where)
        parsed["fingerprint"] = tuple(sorted((str(key), str(value)) for key, value in fingerprint.items()))
        return cls(**parsed)

    @classmethod
    def from_json(cls, text: str, where: str = "hardware profile") -> "HardwareProfile":
        """Read what `to_json` wrote; ValueError for anything else."""
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError(f"{where}: nested too deeply for a profile") from None
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(values).__name__}")
        return cls.from_dict(values, where)

    @classmethod
    def from_file(cls, path: Path) -> "HardwareProfile":
        """Read a profile from a file in JSON or YAML, such as `profile --save` writes and the catalogue has.

        A file without a name has that of the file. Raises ValueError for one that is no text, no mapping or no profile.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: neither JSON nor YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of rates by name, found {type(values).__name__}")
        return cls.from_dict({"name": path.stem} | values, str(path))

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


def _plain(value: Any) -> Any:
    """A field as JSON has it: rates keyed by the names of their formats."""
    if isinstance(value, DtypeRates):
        return value.by_format
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    return value


def _expected(values: dict[str, Any], name: str, default: Any, kind: Any, where: str) -> Any:
    value = values.get(name, default)
    if not isinstance(value, kind) or len(value) > MOST_ENTRIES:
        raise ValueError(f"{where}: {name} has an impossible type or size, got {value!r:.80}")
    return value


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
