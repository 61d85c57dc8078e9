"""The unknowns of a placement program, with the memory that each takes and the rules that tie them to each other.

Per class of n equal layers and linear, as totals over the class: units at home on the GPU (one number for all row
tiers) and, per row tier, units streamed, units computed by the CPU and the number k <= n of layers in which the CPU has
a share. KV heads likewise. A paired block's two linears have the same fractions, and in a row tier all layers of
a class stream them whole or not at all, and the CPU has its shares of both in the same layers. Bytes are scaled to the
order of 10000, far above the solver's tolerances.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from placement.cost.terms import WeightedCall, cpu_linear_s_per_unit
from placement.plan.memory import LinearPlacement, expert_slot_bytes, kv_spilled_tokens, staging_piece_units
from placement.plan.workload import NUM_ROW_TIERS, row_tier
from placement.program.program import Program, add
from placement.solve.classes import MANY_UNITS, KvClass, LinearClass
from placement.solve.decisions import Budgets, Homes, gpu_tokens_of
from placement.solve.pairing import pairs
from placement.solve.problem import Problem

# Class totals up to this many units are integers in the program; above it a unit is too small to matter.
MAX_INTEGER_UNITS = 64
# Up to this many equal layers the number of those with a hand-over is an integer.
MAX_INTEGER_LAYERS = 8


@dataclass(slots=True)
class LinearVariables:
    """Indices of one linear's variables in the program; `stream`, `cpu` and `cpu_layers` by row tier."""

    gpu: int
    stream: dict[int, int] = field(default_factory=dict)
    cpu: dict[int, int] = field(default_factory=dict)
    cpu_layers: dict[int, int] = field(default_factory=dict)


class Unknowns:
    """What a program decides. gpu_tokens: KV slots that a GPU-owned KV head keeps in GPU memory; None leaves that to
    the program too, where the bounds fix who owns the KV heads.

    homes: fixed decisions when only the row tiers of `calls` are still open; None when everything is. `linears` are by
    (class, index in it), `kv_heads` and `attending` by class; `memory` and `memory_constant` are bytes over
    `bytes_scale` by place (gpu, pinned, host).
    """

    def __init__(
        self,
        problem: Problem,
        calls: Sequence[WeightedCall],
        gpu_tokens: int | None,
        budgets: Budgets,
        homes: Homes | None = None,
    ) -> None:
        workload, classes = problem.workload, problem.classes
        self.workload, self.hardware, self.classes, self.calls = workload, problem.hardware, classes, calls
        self.gpu_tokens, self.budgets, self.homes, self.costs = gpu_tokens, budgets, homes, problem.costs
        self.staging_slots = problem.staging_slots if homes is None or homes.staging_slot_bytes else 0
        self.program = Program()
        self.time_scale = 100.0 / max(self._cpu_only_s(), 1e-9)
        cached = sum(kv.kv_heads * kv.bytes_per_token for kv in workload.kv) * workload.full_tokens
        self.bytes_scale = max(1.0, (workload.weight_bytes + cached) / 10_000)
        self.memory: dict[str, dict[int, float]] = {"gpu": {}, "pinned": {}, "host": {}}
        self.memory_constant = {"gpu": 0.0, "pinned": 0.0, "host": 0.0}
        self.staging_slot = self._staging_slot()
        self._whole_windows = problem.whole_windows
        self.tokens = self._tokens()
        self.linears: dict[tuple[int, int], LinearVariables] = {}
        for c, cls in enumerate(classes):
            firsts = {second: first for first, second in pairs(cls)}
            for i, linear in enumerate(cls.linears):
                beside = self.linears[c, firsts[i]].cpu_layers if i in firsts else {}
                self.linears[c, i] = self._linear(c, i, cls.count, linear, beside)
            for first, second in pairs(cls):
                self._pair(c, cls.count, first, second)
        self.kv_heads = {c: self._kv(c, cls.count, cls.kv) for c, cls in enumerate(classes) if cls.kv is not None}
        self.attending: dict[int, list[int]] = {c: [] for c in self.kv_heads}

    def tier(self, linear: LinearClass, weighted: WeightedCall) -> int | None:
        """Row tier that a call uses of a linear; None when it does not run it."""
        if not linear.shard.is_head:
            return weighted.call.tier
        return row_tier(weighted.call.logits_rows) if weighted.with_head else None

    def layers(self, count: int) -> int:
        """A new variable for a number of `count` equal layers."""
        return self.program.variable(0, count, integer=count <= MAX_INTEGER_LAYERS)

    def _cpu_only_s(self) -> float:
        """Seconds of one row on the CPU alone: the yardstick of the program's times."""
        return sum(
            c.count
            * linear.shard.units
            * cpu_linear_s_per_unit(linear.shard, 1, self.workload.format_of(linear.shard), self.hardware)
            for c in self.classes
            for linear in c.linears
        )

    def _staging_slot(self) -> int:
        fixed = None if self.homes is None else self.homes.staging_slot_bytes / self.bytes_scale
        staging_slot = self.program.variable(0 if fixed is None else fixed, inf if fixed is None else fixed)
        self.memory["gpu"][staging_slot] = float(self.staging_slots)
        return staging_slot

    def kept_tokens(self, kv: KvClass) -> int | None:
        """KV slots that a GPU-owned KV head of a class keeps; None where the program decides them."""
        if self.gpu_tokens is None and not kv.bounds.gpu_tokens and not kv.shard.window:
            return None
        return gpu_tokens_of(self.workload, kv.shard, kv.bounds, self.gpu_tokens or self.workload.full_tokens)

    def _tokens(self) -> int | None:
        if self.gpu_tokens is not None:
            return None
        least = max(self.workload.min_gpu_tokens, self._whole_windows)
        return self.program.variable(least, self.workload.full_tokens)

    def _linear(self, c: int, i: int, count: int, linear: LinearClass, beside: dict[int, int]) -> LinearVariables:
        """The unknowns of a linear. beside: layers with a CPU share of the linear that it is paired with, which are its
        own too, by row tier."""
        program, shard, bounds = self.program, linear.shard, linear.bounds
        total = count * shard.units
        integer = total <= MAX_INTEGER_UNITS
        fixed = self.homes.gpu_units[c, i] if self.homes else None if bounds.gpu is None else count * bounds.gpu
        variables = LinearVariables(self._whole(fixed, total, integer))
        tiers = {self.tier(linear, weighted) for weighted in self.calls} - {None}
        tiers |= {tier for tier in range(NUM_ROW_TIERS) if (bounds.stream[tier], bounds.cpu[tier]) != (None, None)}
        for tier in sorted(tiers):
            stream, cpu = (
                None if value is None else count * value for value in (bounds.stream[tier], bounds.cpu[tier])
            )
            is_free = (stream, cpu) == (None, None)
            if self.staging_slots == 0 or (self.homes and (c, i) not in self.homes.streaming):
                stream = 0
            elif is_free and tier == 0 and not self.hardware.streams_in_decode:
                stream = 0
            variables.stream[tier] = self._whole(stream, total, integer)
            variables.cpu[tier] = self._whole(cpu, total, integer)
            variables.cpu_layers[tier] = beside[tier] if tier in beside else self.layers(count)
            program.equal({variables.gpu: 1, variables.stream[tier]: 1, variables.cpu[tier]: 1}, total)
            program.at_most({variables.cpu[tier]: 1, variables.cpu_layers[tier]: -shard.units}, 0)
            program.at_most({variables.cpu_layers[tier]: 1, variables.cpu[tier]: -1}, 0)  # a unit in each at least
        add(self.memory["gpu"], variables.gpu, shard.unit_bytes / self.bytes_scale)
        if not self.workload.elastic:
            add(self.memory["host"], variables.gpu, -shard.unit_bytes / self.bytes_scale)
        self.memory_constant["host"] += (total * shard.unit_bytes + _most_left(count, linear)) / self.bytes_scale
        if bounds.expert_slots:
            placement = LinearPlacement(shard.name, 0, (0,) * NUM_ROW_TIERS, shard.units, bounds.expert_slots)
            self.memory_constant["gpu"] += count * expert_slot_bytes(shard, placement) / self.bytes_scale
        self._staging(count, linear, variables)
        return variables

    def _pair(self, c: int, count: int, first: int, second: int) -> None:
        """Equal fractions of both linears in every lane, and what is in DRAM streams as a whole or not at all."""
        program = self.program
        (ours, units), (theirs, others) = (
            (self.linears[c, i], self.classes[c].linears[i].shard.units) for i in (first, second)
        )
        program.equal({ours.gpu: 1.0, theirs.gpu: -units / others}, 0)
        for tier, stream in theirs.stream.items():
            streams = program.binary()
            program.at_most({stream: 1, streams: -count * others}, 0)
            program.at_most({theirs.cpu[tier]: 1, streams: count * others}, count * others)
            if tier in ours.stream:
                program.equal({ours.stream[tier]: 1.0, stream: -units / others}, 0)

    def _whole(self, fixed: int | None, total: int, integer: bool) -> int:
        low, high = (0, total) if fixed is None else (fixed, fixed)
        return self.program.variable(low, high, integer=integer)

    def _staging(self, count: int, linear: LinearClass, variables: LinearVariables) -> None:
        """A slot holds a piece of every linear that streams, and what streams is pinned."""
        program, shard, streams = self.program, linear.shard, self.program.binary()
        unit = shard.unit_bytes / self.bytes_scale
        for stream in variables.stream.values():
            program.at_most({stream: 1, streams: -count * shard.units}, 0)
        program.at_least({self.staging_slot: 1, streams: -unit * staging_piece_units(shard, self.workload)}, 0)
        if self.budgets.pinned is not None:
            held, total = program.variable(), count * shard.units * unit
            most = total + _most_left(count, linear) / self.bytes_scale
            if self.workload.elastic:
                program.at_least({held: 1}, total)
            elif linear.bounds.expert_slots:
                program.at_least({held: 1, variables.gpu: unit}, most)
            else:
                program.at_least({held: 1, variables.gpu: unit, streams: -most}, 0)
            add(self.memory["pinned"], held, 1.0)

    def _kv(self, c: int, count: int, kv: KvClass) -> int:
        total, shard = count * kv.shard.kv_heads, kv.shard
        fixed = self.homes.gpu_kv_heads[c] if self.homes else None
        if fixed is None and kv.bounds.gpu_kv_heads is not None:
            fixed = count * kv.bounds.gpu_kv_heads
        kv_heads = self._whole(fixed, total, total <= MAX_INTEGER_UNITS)
        tokens, full = self.kept_tokens(kv), self.workload.layer_tokens(shard)
        token = shard.bytes_per_token / self.bytes_scale
        self.memory_constant["host"] += total * full * token
        if tokens is None:
            self._free_tokens(fixed * token, full)
            return kv_heads
        spilled = kv_spilled_tokens(self.workload, shard, tokens)
        for place, per_kv_head in (("gpu", tokens), ("pinned", spilled), ("host", spilled - full)):
            add(self.memory[place], kv_heads, per_kv_head * token)
        return kv_heads

    def _free_tokens(self, token_bytes: float, full: int) -> None:
        """Memory of KV heads that the GPU owns for certain, with as many slots as the program decides: some in DRAM
        unless
        that is all. token_bytes: of one slot in all of them."""
        add(self.memory["gpu"], self.tokens, token_bytes)
        beyond = self.program.variable(1, 1) if self.workload.elastic else self.program.binary()
        self.program.at_least({self.tokens: 1.0, beyond: full}, full)
        add(self.memory["pinned"], beyond, full * token_bytes)
        add(self.memory["host"], beyond, full * token_bytes)
        self.memory_constant["host"] -= full * token_bytes


def _most_left(count: int, linear: LinearClass) -> int:
    """Most bytes that rounding its homes in GPU memory down to whole units, equal over layers, may leave to host
    memory."""
    shard = linear.shard
    if linear.bounds.gpu is not None or shard.units < MANY_UNITS and count * shard.units <= MAX_INTEGER_UNITS:
        return 0
    return shard.unit_bytes * (count if shard.units >= MANY_UNITS else 1)
