"""A plan: where every unit of a linear and every KV head lives and is computed. Frozen data, printed three ways.

The runtime reads placements and sizes from here and allocates by the functions of placement.plan.memory, so that the
counted bytes are the allocated ones. `to_yaml` writes the plan as a policy that gives the same plan again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpu_kernels.formats.weights import WEIGHT_DTYPES
from placement.plan.memory import (
    PLACES,
    KvPlacement,
    LinearPlacement,
    MemoryReport,
    is_all_on_gpu,
    memory_report,
    staging_slot_bytes,
)
from placement.plan.phase import Prediction
from placement.plan.placed import kv_bytes_at
from placement.plan.rows import PlanRow, plan_rows
from placement.plan.units import format_bytes
from placement.plan.workload import (
    ROW_TIER_NAMES,
    Workload,
)

DEVICES = ("cpu", "cuda", "emulated")
CURVE_CONTEXTS = (128, 512, 2048, 8192, 32768, 131072)


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """One valid placement of a workload. linears and kv are in workload order.

    device: cpu | cuda | emulated. gpu_memory_bytes: the whole budget, that of a drafter in it, None without a GPU lane;
    pinned_memory_bytes, host_memory_bytes: likewise, None without one. num_threads: CPU lane threads.
    """

    workload: Workload
    device: str
    gpu_memory_bytes: int | None
    linears: tuple[LinearPlacement, ...]
    kv: tuple[KvPlacement, ...]
    staging_slots: int
    num_threads: int
    memory: MemoryReport
    objective: str = "latency"
    predicted: Prediction | None = None
    pinned_memory_bytes: int | None = None
    host_memory_bytes: int | None = None

    def __repr__(self) -> str:
        """A line, where every field of every shard would be pages."""
        memory = self.memory
        gpu, dram = format_bytes(memory.gpu_bytes), format_bytes(memory.pinned_bytes + memory.host_bytes)
        return f"Plan({self.workload.model!r}, {self.workload.weight_dtype} on {self.device}: {gpu} GPU, {dram} DRAM)"

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        for shards, placements in ((self.workload.linears, self.linears), (self.workload.kv, self.kv)):
            names, placed = [shard.name for shard in shards], [placement.name for placement in placements]
            if names != placed:
                raise ValueError(f"a plan places every shard once and in order: expected {names}, got {placed}")
        for shard, placement in zip(self.workload.linears, self.linears, strict=True):
            if shard.row_cut and not set(placement.stream_units) <= {0, placement.dram_units}:
                raise ValueError(
                    f"{shard.name}: its {placement.dram_units} dram-home units are cut by rows, so they stream "
                    f"together or not at all, got stream_units {placement.stream_units}"
                )

    @property
    def shape(self) -> str:
        """`paired` where some linear is cut by rows, else `column`."""
        return "paired" if any(shard.row_cut for shard in self.workload.linears) else "column"

    @property
    def is_all_on_gpu(self) -> bool:
        """Whether no lane but the GPU's has anything to do."""
        return is_all_on_gpu(self.workload, self.linears, self.kv)

    @property
    def own_gpu_bytes(self) -> int | None:
        """The budget without what CUDA and a drafter have of it, None without a budget."""
        return None if self.gpu_memory_bytes is None else self.gpu_memory_bytes - self.memory.others_gpu_bytes

    @property
    def model(self) -> str:
        """Name of the planned model."""
        return self.workload.model

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence."""
        return self.workload.max_context

    @property
    def max_batch(self) -> int:
        """Most sequences decoded together."""
        return self.workload.max_batch

    @property
    def page_size(self) -> int:
        """Tokens of one KV page."""
        return self.workload.page_size

    @property
    def prefill_chunk(self) -> int:
        """Most prompt rows of one call."""
        return self.workload.prefill_chunk

    @property
    def staging_slot_bytes(self) -> int:
        """Bytes of one staging slot in GPU memory."""
        return staging_slot_bytes(self.workload, self.linears)

    def kv_by_context(self) -> list[tuple[int, int, int]]:
        """What one sequence takes of the cache as it grows: (context, bytes in GPU memory, bytes in DRAM)."""
        contexts = sorted({context for context in CURVE_CONTEXTS if context < self.max_context} | {self.max_context})
        return [(context, *kv_bytes_at(self.workload, self.kv, context)) for context in contexts]

    def linear(self, name: str) -> LinearPlacement:
        """Placement of the linear called `name`; KeyError if there is none."""
        return _named(self.linears, name)

    def kv_placement(self, name: str) -> KvPlacement:
        """Placement of the KV shard called `name` (`layers.N.kv`); KeyError if there is none."""
        return _named(self.kv, name)

    def table(self, width: int = 120) -> str:
        """Plain text: what of each linear and of the KV cache is where, bytes by place and kind, predicted speed."""
        from placement.plan.table import plan_table

        return plan_table(self, width)  # type: ignore[arg-type]  # a protocol's fields could be written, a plan's not

    def to_yaml(self) -> str:
        """A policy that gives this plan again: given to make_plan with the same workload and hardware, or to `LLM`
        where somebody drafts, whom it names."""
        lines = [
            f"# The plan of {self.model} on {self.device}, written as a policy.",
            "version: 1",
            f"objective: {self.objective}",
        ]
        for place in PLACES:
            budget = getattr(self, f"{place}_memory_bytes")
            lines += [] if budget is None else [f"{place}_memory: {budget}"]
        lines += [
            f"context: {self.max_context}",
            f"batch: {self.max_batch}",
            f"threads: {self.num_threads}",
            f"prefill_chunk: {self.prefill_chunk}",
            f"kv_dtype: {self.workload.kv_dtype}",
        ]
        if self.device != "cpu":
            lines.append(f"staging_slots: {self.staging_slots}")
        if self.workload.kv_tokens is not None:
            lines.append(f"kv_tokens: {self.workload.kv_tokens}")
        if any(placement.expert_slots for placement in self.linears):
            lines.append(f"inserts: {self.workload.inserts}")
        if self.workload.elastic:
            lines.append("elastic: true")
        elif self.device != "cpu":
            lines.append(f"shape: {self.shape}")
        drafting = self.workload.drafting
        if drafting is not None and drafting.speculate != "off":
            lines.append(f"speculate: {json.dumps(drafting.speculate)}")
        lines.append("rules:")
        for row in plan_rows(self.workload.linears, self.linears):
            lines += _linear_rule(row) + _dtype_lines(row, self.workload)
        for row in plan_rows(self.workload.kv, self.kv):
            lines += _kv_rule(row)
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every placement, sizes, memory and prediction."""
        return {
            "model": self.model,
            "device": self.device,
            "shape": self.shape,
            **{f"{place}_memory_bytes": getattr(self, f"{place}_memory_bytes") for place in PLACES},
            "objective": self.objective,
            "max_context": self.max_context,
            "max_batch": self.max_batch,
            "prefill_chunk": self.prefill_chunk,
            "page_size": self.page_size,
            "num_threads": self.num_threads,
            "staging_slots": self.staging_slots,
            "staging_slot_bytes": self.staging_slot_bytes,
            "kv_tokens": self.workload.full_tokens,
            "elastic": self.workload.elastic,
            "linears": [
                {
                    "name": p.name,
                    "units": p.units,
                    "gpu_units": p.gpu_units,
                    "stream_units": dict(zip(ROW_TIER_NAMES, p.stream_units, strict=True)),
                    "expert_slots": p.expert_slots,
                    "row_cut": s.row_cut,
                    "weight_format": self.workload.format_of(s),
                }
                for s, p in zip(self.workload.linears, self.linears, strict=True)
            ],
            "kv": [
                {"name": p.name, "groups": p.kv_heads, "gpu_groups": p.gpu_kv_heads, "gpu_tokens": p.gpu_tokens}
                for p in self.kv
            ],
            "memory": self.memory.to_dict(),
            "kv_by_context": [
                {"context": context, "gpu_bytes": gpu, "dram_bytes": dram}
                for context, gpu, dram in self.kv_by_context()
            ],
            "predicted": self.predicted.to_dict() if self.predicted else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a plan may use of a machine.

    gpu_memory_bytes: the GPU budget, None for no GPU or no limit; pinned_memory_bytes, host_memory_bytes: those of host
    memory, None for no limit. staging_slots: of the ring through which weights stream. num_threads: of the CPU lane.
    context_bytes: what the driver takes of GPU memory for itself.
    """

    device: str
    gpu_memory_bytes: int | None = None
    staging_slots: int = 2
    num_threads: int = 1
    context_bytes: int = 0
    pinned_memory_bytes: int | None = None
    host_memory_bytes: int | None = None


def build_plan(
    workload: Workload,
    linears: Sequence[LinearPlacement],
    kv: Sequence[KvPlacement],
    means: Means,
    objective: str = "latency",
) -> Plan:
    """Put placements together into a plan, counting its memory. Nothing has slots of the ring where nothing streams."""
    staging_slots = means.staging_slots if any(placement.streams for placement in linears) else 0
    memory = memory_report(
        workload, linears, kv, device=means.device, staging_slots=staging_slots, context_bytes=means.context_bytes
    )
    return Plan(
        workload,
        means.device,
        means.gpu_memory_bytes,
        tuple(linears),
        tuple(kv),
        staging_slots,
        means.num_threads,
        memory,
        objective,
        pinned_memory_bytes=means.pinned_memory_bytes,
        host_memory_bytes=means.host_memory_bytes,
    )


def _linear_rule(row: PlanRow) -> list[str]:
    placement: LinearPlacement = row.placement
    lines = [f"  - match: {row.label}", f"    gpu: {placement.gpu_units} units"]
    if placement.expert_slots:
        lines.append(f"    expert_slots: {placement.expert_slots}")
    if len(set(placement.stream_units)) == 1:
        return [*lines, f"    stream: {placement.stream_units[0]} units"]
    lines.append("    tiers:")
    return lines + [
        f'      "{tier}": {{stream: {stream} units}}'
        for tier, stream in zip(ROW_TIER_NAMES, placement.stream_units, strict=True)
    ]


def _dtype_lines(row: PlanRow, workload: Workload) -> list[str]:
    """The weight format of a row where linears differ in it and a rule can ask for it; one of a file is found there."""
    name, down = workload.format_of(row.shards[0]), row.shards[0].down_format
    return [f"    dtype: {name}"] if workload.is_mixed and name in WEIGHT_DTYPES and not down else []


def _kv_rule(row: PlanRow) -> list[str]:
    placement: KvPlacement = row.placement
    return [
        f"  - match: {row.label}",
        f"    kv: {{gpu_heads: {placement.gpu_kv_heads}, gpu_tokens: {placement.gpu_tokens}}}",
    ]


def _named(placements: Sequence[Any], name: str) -> Any:
    for placement in placements:
        if placement.name == name:
            return placement
    raise KeyError(f"no shard named {name!r} in the plan; shards: {', '.join(p.name for p in placements)}")
