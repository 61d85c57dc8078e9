"""Placement as a mixed-integer program: the equations of placement.cost with placements as the unknowns.

Unknown per class of n equal layers and linear, as totals over the class: units at home on the GPU (one number for all
row tiers) and, per row tier, units streamed, units computed by the CPU and the number k <= n of layers in which the CPU
has a share. Those k steps pay a hand-over and overlap both lanes, the others run on the GPU alone:

    steps >= C * cpu_s + (n - k) * units * gpu_s,    steps >= (G + S) * gpu_s,    C <= k * units

so the program itself weighs concentrating CPU work in few layers against spreading it. KV-head groups likewise. A
paired block is one such step of the sums of its parts; both linears have the same fractions, and in a row tier all layers
of a class stream them whole or not at all. Large models are nearly pure linear programs. Seconds and bytes are scaled to
the order of 100 and 10000, far above the solver's tolerances.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from placement.decisions import Budgets, Homes, Totals, WeightedCall, gpu_tokens_of
from placement.hardware import HardwareProfile
from placement.layer_classes import KvClass, LayerClass, LinearClass
from placement.memory import kv_spilled_tokens, staging_piece_units
from placement.op_cost import BLOCKS, Call, attention_cost, cpu_linear_s_per_unit, small_ops_s, step_cost
from placement.pairing import pairs
from placement.program import INFINITY, Program, add
from placement.workload import NUM_ROW_TIERS, Workload, row_tier

# Class totals up to this many units are integers in the program; above it a unit is too small to matter.
MAX_INTEGER_UNITS = 64
# From this many units on, one unit a layer is small enough to give equal layers equal cuts.
MANY_UNITS = 64
# Up to this many equal layers the number of those with a hand-over is an integer.
MAX_INTEGER_LAYERS = 8
# Shares of a copy's time charged for what costs nothing by itself, to choose between equals.
TIE_BREAK = 1e-4


@dataclass(slots=True)
class _LinearVariables:
    gpu: int
    stream: dict[int, int] = field(default_factory=dict)
    cpu: dict[int, int] = field(default_factory=dict)
    cpu_layers: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Block:
    """The one step of a paired block: busy times of both lanes, time of the GPU alone, and which counts of layers have
    CPU work."""

    cpu: dict[int, float] = field(default_factory=dict)
    gpu: dict[int, float] = field(default_factory=dict)
    cpu_layers: dict[int, float] = field(default_factory=dict)
    whole: float = 0.0


class Formulation:
    """Builds and solves one program. classes: what is placed; gpu_tokens: KV slots that a GPU-owned group keeps in GPU
    memory.

    homes: fixed decisions when only the row tiers of `calls` are still open; None when everything is.
    """

    def __init__(
        self,
        workload: Workload,
        hardware: HardwareProfile,
        classes: Sequence[LayerClass],
        calls: Sequence[WeightedCall],
        gpu_tokens: int,
        slots: int,
        budgets: Budgets,
        homes: Homes | None = None,
    ) -> None:
        self.workload, self.hardware, self.classes, self.calls = workload, hardware, classes, calls
        self.gpu_tokens, self.slots, self.budgets, self.homes = gpu_tokens, slots, budgets, homes
        self.program = Program()
        cpu_only = sum(
            c.count * linear.shard.units * cpu_linear_s_per_unit(linear.shard, 1, workload.weight_dtype, hardware)
            for c in classes
            for linear in c.linears
        )
        self.time_scale = 100.0 / max(cpu_only, 1e-9)
        cached = sum(kv.groups * kv.bytes_per_token for kv in workload.kv) * workload.full_tokens
        self.bytes_scale = max(1.0, (workload.weight_bytes + cached) / 10_000)
        self.memory = {"gpu": {}, "pinned": {}, "host": {}}
        self.memory_constant = dict.fromkeys(self.memory, 0.0)
        self.slot = self._slot_variable()
        for place in ("pinned", "host"):
            self.memory_constant[place] = self._rounding_bytes() / self.bytes_scale
        self.linears = {
            (c, i): self._linear(c, i, cls.count, linear)
            for c, cls in enumerate(classes)
            for i, linear in enumerate(cls.linears)
        }
        for c, cls in enumerate(classes):
            for first, second in pairs(cls):
                self._pair(c, cls.count, first, second)
        self.groups = {c: self._kv(c, cls.count, cls.kv) for c, cls in enumerate(classes) if cls.kv is not None}
        self.attending: dict[int, list[int]] = {c: [] for c in self.groups}
        for weighted in calls:
            self._call(weighted)
        self._affinity()
        self._limits()

    def solve(self) -> Totals | None:
        """The best placement, or None when the budgets allow none."""
        values = self.program.solve()
        if values is None:
            return None

        def by_tier(name: str) -> dict[tuple[int, int, int], float]:
            return {
                (*key, tier): values[index]
                for key, variables in self.linears.items()
                for tier, index in getattr(variables, name).items()
            }

        return Totals(
            {key: values[v.gpu] for key, v in self.linears.items()},
            by_tier("stream"),
            by_tier("cpu_layers"),
            {c: values[index] for c, index in self.groups.items()},
            {c: max(values[index] for index in indices) for c, indices in self.attending.items()},
            values[self.slot] * self.bytes_scale,
        )

    def solve_for_least(self, place: str) -> float | None:
        """Fewest bytes at a place (gpu | pinned | host) that this program needs, with the other budgets kept."""
        program = self.program
        program.costs = [0.0] * len(program.costs)
        for variable, coefficient in self.memory[place].items():
            program.costs[variable] = coefficient
        program.rows = [row for row in program.rows if row[0] is not self.memory[place]]
        values = program.solve()
        if values is None:
            return None
        return self.bytes_scale * (
            self.memory_constant[place] + sum(values[v] * k for v, k in self.memory[place].items())
        )

    def _slot_variable(self) -> int:
        fixed = None if self.homes is None else self.homes.slot_bytes / self.bytes_scale
        slot = self.program.variable(0 if fixed is None else fixed, INFINITY if fixed is None else fixed)
        self.memory["gpu"][slot] = float(self.slots)
        return slot

    def _linear(self, c: int, i: int, count: int, linear: LinearClass) -> _LinearVariables:
        program, shard, bounds = self.program, linear.shard, linear.bounds
        total = count * shard.units
        integer = total <= MAX_INTEGER_UNITS
        fixed = self.homes.gpu_units[c, i] if self.homes else None if bounds.gpu is None else count * bounds.gpu
        variables = _LinearVariables(self._whole(fixed, total, integer))
        tiers = {self._tier(linear, weighted) for weighted in self.calls} - {None}
        tiers |= {tier for tier in range(NUM_ROW_TIERS) if (bounds.stream[tier], bounds.cpu[tier]) != (None, None)}
        for tier in sorted(tiers):
            stream, cpu = (
                None if value is None else count * value for value in (bounds.stream[tier], bounds.cpu[tier])
            )
            if self.slots == 0 or (self.homes and (c, i) not in self.homes.streaming):
                stream = 0
            variables.stream[tier] = self._whole(stream, total, integer)
            variables.cpu[tier] = self._whole(cpu, total, integer)
            variables.cpu_layers[tier] = self._layers(count)
            program.equal({variables.gpu: 1, variables.stream[tier]: 1, variables.cpu[tier]: 1}, total)
            program.at_most({variables.cpu[tier]: 1, variables.cpu_layers[tier]: -shard.units}, 0)
        add(self.memory["gpu"], variables.gpu, shard.unit_bytes / self.bytes_scale)
        if not self.workload.elastic:
            add(self.memory["host"], variables.gpu, -shard.unit_bytes / self.bytes_scale)
        self.memory_constant["host"] += total * shard.unit_bytes / self.bytes_scale
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

    def _layers(self, count: int) -> int:
        return self.program.variable(0, count, integer=count <= MAX_INTEGER_LAYERS)

    def _staging(self, count: int, linear: LinearClass, variables: _LinearVariables) -> None:
        """slot >= min(streamed units of one linear, piece) * unit_bytes, and what streams is pinned."""
        program, shard = self.program, linear.shard
        piece, unit = min(shard.units, staging_piece_units(shard)), shard.unit_bytes / self.bytes_scale
        most, streams = program.variable(0, shard.units), program.binary()
        for tier, stream in variables.stream.items():
            # Rounded to whole units, layers stream up to one more than their mean, and so does one whose home is
            # rounded down beside a fixed CPU width; elsewhere the layout caps what the slot cannot take.
            rounded_home = linear.bounds.cpu[tier] is not None and count * shard.units > MAX_INTEGER_UNITS
            uneven = 0 if self.homes or linear.bounds.stream[tier] is not None else count - 1 + rounded_home
            program.at_least({most: count, stream: -1, streams: -uneven}, 0)
            program.at_most({stream: 1, streams: -count * shard.units}, 0)
        if piece < shard.units:
            beyond = program.binary()
            program.at_most({most: 1, beyond: piece - shard.units}, piece)
            program.at_least({self.slot: 1, most: -unit, beyond: shard.units * unit}, 0)
            program.at_least({self.slot: 1, beyond: -piece * unit}, 0)
        else:
            program.at_least({self.slot: 1, most: -unit}, 0)
        if self.budgets.pinned is not None:
            held, total = program.variable(), count * shard.units * unit
            if self.workload.elastic:
                program.at_least({held: 1}, total)
            else:
                program.at_least({held: 1, variables.gpu: unit, streams: -total}, 0)
            add(self.memory["pinned"], held, 1.0)

    def _kv(self, c: int, count: int, kv: KvClass) -> int:
        total, shard = count * kv.shard.groups, kv.shard
        fixed = self.homes.gpu_groups[c] if self.homes else None
        if fixed is None and kv.bounds.gpu_groups is not None:
            fixed = count * kv.bounds.gpu_groups
        groups = self._whole(fixed, total, total <= MAX_INTEGER_UNITS)
        tokens = gpu_tokens_of(self.workload, kv.shard, kv.bounds, self.gpu_tokens)
        full = self.workload.layer_tokens(shard)
        spilled = kv_spilled_tokens(self.workload, shard, tokens)
        token = shard.bytes_per_token / self.bytes_scale
        for place, per_group in (("gpu", tokens), ("pinned", spilled), ("host", spilled - full)):
            add(self.memory[place], groups, per_group * token)
        self.memory_constant["host"] += total * full * token
        return groups

    def _tier(self, linear: LinearClass, weighted: WeightedCall) -> int | None:
        """Row tier that a call uses of a linear; None when it does not run it."""
        if linear.shard.kind != "head":
            return weighted.call.tier
        return row_tier(weighted.call.sequences) if weighted.with_head else None

    def _call(self, weighted: WeightedCall) -> None:
        """Time of one pass: at least the steps in order, the slowed CPU lane, the copies, and the DRAM traffic."""
        program, hardware, scale = self.program, self.hardware, self.time_scale
        time = program.variable(cost=weighted.weight)
        steps, cpu, copies, dram, tail = ({time: -1.0} for _ in range(5))
        constant = scale * small_ops_s(self.workload, weighted.call, hardware, True)
        for c, cls in enumerate(self.classes):
            blocks = {BLOCKS[cls.linears[i].shard.kind]: _Block() for _, i in pairs(cls)}
            for i, linear in enumerate(cls.linears):
                constant += self._linear_step(c, i, cls.count, linear, weighted, steps, cpu, copies, dram, tail, blocks)
            if cls.kv is not None:
                constant += self._attention_step(c, cls, weighted.call, steps, cpu, copies, dram, tail, blocks)
            for block in blocks.values():
                add(steps, self._block_step(cls.count, block), 1.0)
        slowed = 1 - hardware.cpu_slowdown_while_copying
        for variable, coefficient in copies.items():
            if variable != time and slowed:
                add(cpu, variable, slowed * coefficient)
        program.at_most(steps, -constant)
        for lane in (cpu, copies, dram, tail):
            program.at_most(lane, 0.0)

    def _linear_step(
        self,
        c: int,
        i: int,
        count: int,
        linear: LinearClass,
        weighted: WeightedCall,
        steps: dict[int, float],
        cpu: dict[int, float],
        copies: dict[int, float],
        dram: dict[int, float],
        tail: dict[int, float],
        blocks: dict[str, _Block],
    ) -> float:
        tier = self._tier(linear, weighted)
        if tier is None:
            return 0.0
        shard, hardware, scale = linear.shard, self.hardware, self.time_scale
        rows = weighted.call.sequences if shard.kind == "head" else weighted.call.rows
        block = blocks.get(BLOCKS[shard.kind])
        cost = step_cost(shard, rows, self.workload.weight_dtype, hardware, block is not None)
        variables = self.linears[c, i]
        on_cpu, streamed = variables.cpu[tier], variables.stream[tier]
        layers, gpu_s = variables.cpu_layers[tier], scale * cost.gpu_s_per_unit
        part = _Block(
            {on_cpu: scale * cost.cpu_s_per_unit},
            {variables.gpu: gpu_s, streamed: gpu_s},
            {layers: 1.0},
            shard.units * gpu_s,
        )
        if block is None:
            step = self._block_step(count, part)
            add(steps, step, 1.0)
        else:
            _join(block, part)
        add(steps, layers, scale * cost.handover_s)
        add(cpu, on_cpu, scale * cost.cpu_s_per_unit)
        copy = scale * shard.unit_bytes / hardware.h2d_bytes_per_s
        add(copies, streamed, copy)
        if shard.kind == "head":
            add(tail, step, 1.0)
            add(tail, layers, scale * cost.handover_s)
        else:
            add(tail, streamed, copy)
        # Where another resource decides, the least streaming among equals: less noise on the bus, fewer staging waits.
        self.program.costs[streamed] += TIE_BREAK * weighted.weight * copy
        touched = [on_cpu, streamed] + ([variables.gpu] if hardware.unified_memory else [])
        for variable in touched:
            add(dram, variable, scale * shard.unit_bytes / hardware.dram_bytes_per_s)
        return scale * cost.launch_s * count

    def _attention_step(
        self,
        c: int,
        cls: LayerClass,
        call: Call,
        steps: dict[int, float],
        cpu: dict[int, float],
        copies: dict[int, float],
        dram: dict[int, float],
        tail: dict[int, float],
        blocks: dict[str, _Block],
    ) -> float:
        program, scale, shard = self.program, self.time_scale, cls.kv.shard
        tokens = gpu_tokens_of(self.workload, shard, cls.kv.bounds, self.gpu_tokens)
        cost = attention_cost(shard, call, tokens, self.workload, self.hardware, True)
        total, groups, spills = cls.count * shard.groups, self.groups[c], cost.spilled_s_per_group > 0
        owned, layers = program.variable(), self._layers(cls.count)
        self.attending[c].append(layers)
        program.equal({owned: 1, groups: 1}, total)
        program.at_most({owned: 1, layers: -shard.groups}, 0)
        busy = {owned: scale * cost.cpu_s_per_group, groups: scale * cost.spilled_s_per_group}
        whole = 0.0 if spills else scale * shard.groups * cost.gpu_s_per_group
        part = _Block(dict(busy), {groups: scale * cost.gpu_s_per_group}, {layers: 1.0}, whole)
        if BLOCKS["qkv"] in blocks:
            _join(blocks[BLOCKS["qkv"]], part)
        else:
            add(steps, self._block_step(cls.count, part), 1.0)
        for variable, coefficient in busy.items():
            add(cpu, variable, coefficient)
        bandwidth = self.hardware.dram_bytes_per_s
        add(dram, owned, scale * cost.dram_bytes_per_group / bandwidth)
        add(dram, groups, scale * cost.spilled_bytes_per_group / bandwidth)
        for lane in (copies, tail):
            add(lane, groups, scale * cost.streamed_bytes_per_group / self.hardware.h2d_bytes_per_s)
        add(steps, self._attention_handovers(c, cls, call, owned, layers, spills), scale * cost.handover_s)
        return scale * cost.launch_s * cls.count

    def _block_step(self, count: int, block: _Block) -> int:
        """A variable for the seconds of a step in all layers of a class: at least the time of either lane."""
        program = self.program
        step = program.variable()
        if len(block.cpu_layers) == 1:
            (layers,) = block.cpu_layers
        else:
            layers = self._layers(count)
            program.at_most({layers: 1.0} | {index: -1.0 for index in block.cpu_layers}, 0.0)
        program.at_least({step: 1.0, layers: block.whole} | {v: -s for v, s in block.cpu.items()}, count * block.whole)
        program.at_least({step: 1.0} | {v: -s for v, s in block.gpu.items()}, 0)
        return step

    def _attention_handovers(self, c: int, cls: LayerClass, call: Call, owned: int, layers: int, spills: bool) -> int:
        """Layers counted by placement.op_cost.attention_handovers: more groups attended than computed by the CPU, or any
        spilled."""
        program, handovers, groups = self.program, self._layers(cls.count), self.groups[c]
        groups_in_layer = -float(cls.kv.shard.groups)
        uncomputed, alone = {owned: 1.0, handovers: groups_in_layer}, {layers: 1.0, handovers: -1.0}
        for i, linear in enumerate(cls.linears):
            if linear.shard.kind == "qkv":
                add(uncomputed, self.linears[c, i].cpu[call.tier], -1.0)
                add(alone, self.linears[c, i].cpu_layers[call.tier], -1.0)
        if spills:
            add(uncomputed, groups, 1.0)
            program.at_most({groups: 1.0, handovers: groups_in_layer}, 0.0)
        program.at_most(uncomputed, 0.0)
        program.at_most(alone, 0.0)
        return handovers

    def _affinity(self) -> None:
        """Prefer that the GPU owns the cache of no more groups than it computes q, k and v for, in the first call."""
        weighted = self.calls[0]
        for c, groups in self.groups.items():
            for i, linear in enumerate(self.classes[c].linears):
                if linear.shard.kind == "qkv":
                    variables, tier = self.linears[c, i], weighted.call.tier
                    copy = self.time_scale * linear.shard.unit_bytes / self.hardware.h2d_bytes_per_s
                    stray = self.program.variable(cost=2 * TIE_BREAK * weighted.weight * copy)
                    self.program.at_least({stray: 1, variables.gpu: 1, variables.stream[tier]: 1, groups: -1}, 0)

    def _limits(self) -> None:
        for place in self.memory:
            budget = getattr(self.budgets, place)
            if budget is not None:
                self.program.at_most(self.memory[place], budget / self.bytes_scale - self.memory_constant[place])

    def _rounding_bytes(self) -> float:
        """Most bytes that rounding GPU homes down to whole units, equal over layers, may leave to host memory."""
        total = 0
        for cls in self.classes:
            for shard in (linear.shard for linear in cls.linears):
                whole = cls.count * shard.units <= MAX_INTEGER_UNITS
                total += shard.unit_bytes * (cls.count if shard.units >= MANY_UNITS else 0 if whole else 1)
        return total


def _join(block: _Block, part: _Block) -> None:
    """Add a part of a paired block to it."""
    for name in ("cpu", "gpu", "cpu_layers"):
        for variable, value in getattr(part, name).items():
            add(getattr(block, name), variable, value)
    block.whole += part.whole
