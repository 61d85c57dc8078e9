"""The seconds of one pass over the unknowns of a placement program: the equations of placement.cost, term by term.

In k <= n of a class's n layers the CPU has a share of a stage. Those k pay a hand-over and overlap both lanes, the
others run on the GPU alone:

    stages >= C * cpu_s + (n - k) * units * gpu_s,    stages >= (G + S) * gpu_s,    C <= k * units

so the program itself weighs concentrating CPU work in few layers against spreading it. A paired block is one such stage
of the sums of its parts.
"""

from dataclasses import dataclass, field
from functools import partial

from placement.cost.attention import AttentionCost, attention_cost, attention_key
from placement.cost.terms import (
    LINEARS_PER_LAYER,
    LinearCost,
    WeightedCall,
    copy_passes,
    cost_key,
    interference,
    least_products,
    product_queueing_s,
    small_ops_s,
    stage_cost,
)
from placement.plan.shards import KvShard, LinearShard
from placement.plan.workload import round_up
from placement.program.program import add
from placement.solve.classes import LayerClass, LinearClass
from placement.solve.pairing import pairs
from placement.solve.unknowns import Unknowns

# Shares of a copy's time charged for what costs nothing by itself, to choose between equals.
TIE_BREAK = 1e-4

Terms = dict[int, float]


@dataclass(slots=True)
class _Stage:
    """Busy times of both lanes in a stage, time of the GPU alone, and which counts of layers have CPU work in it.

    beyond: in a paired block, layers of that count beyond those of its linears; empty is the same.
    """

    cpu: Terms = field(default_factory=dict)
    gpu: Terms = field(default_factory=dict)
    cpu_layers: Terms = field(default_factory=dict)
    whole: float = 0.0
    beyond: Terms = field(default_factory=dict)

    def join(self, part: "_Stage") -> None:
        """Add a part of a paired block."""
        layers = part.beyond or part.cpu_layers
        for mine, more in ((self.cpu, part.cpu), (self.gpu, part.gpu), (self.cpu_layers, layers)):
            for variable, value in more.items():
                add(mine, variable, value)
        self.whole += part.whole


class PassTime:
    """A call's seconds among the program's costs: at least the stages in order, the slowed CPU lane, the copies, and
    the DRAM traffic."""

    def __init__(self, unknowns: Unknowns, weighted: WeightedCall) -> None:
        self._unknowns, self._program, self._weighted = unknowns, unknowns.program, weighted
        self._hardware, self._scale = unknowns.hardware, unknowns.time_scale
        self._known = unknowns.costs.of(unknowns.workload, weighted.call, True)
        self._lost = 1 - self._hardware.overlap_of(weighted.call.q_len)
        self._time = self._program.variable(cost=weighted.weight)
        self._lost_time = self._program.variable(cost=weighted.weight) if self._lost else None
        self._after_another: Terms = {}
        self._reads: Terms = {}
        self._head_reads: Terms = {}
        self._head_copies: Terms = {}
        self._products: Terms = {}
        self._stages, self._cpu, self._copies, self._dram, self._tail = ({self._time: -1.0} for _ in range(5))
        self._constant = self._scale * small_ops_s(unknowns.workload, weighted.call, self._hardware, True)
        self._head_launch_s = 0.0

    def add(self) -> None:
        """Add the variables and rows of the pass to the program."""
        for c, cls in enumerate(self._unknowns.classes):
            self._class(c, cls)
        self._charge_lost_overlap()
        self._wait_for_python()
        self._slow_each_other()
        self._program.at_most(self._stages, -self._constant)
        self._program.at_most(self._tail, -self._head_launch_s)
        for lane in (self._cpu, self._copies, self._dram, self._head_copies):
            self._program.at_most(lane, 0.0)

    def _slow_each_other(self) -> None:
        """Copies and the CPU lane share the DRAM: see placement.cost.model."""
        per_copy, per_read = interference(self._hardware)
        for variable, seconds in self._copies.items():
            if variable != self._time and per_copy:
                add(self._cpu, variable, per_copy * seconds)
        slowed = [(self._reads, self._copies), (self._reads, self._tail), (self._head_reads, self._copies)]
        for reads, lane in [*slowed, (self._head_reads, self._head_copies)]:
            for variable, seconds in reads.items():
                if per_read:
                    add(lane, variable, per_read * seconds)

    def _charge_lost_overlap(self) -> None:
        """The share of what everything one after another takes longer than the pass: see placement.cost.model. Where
        the DRAM's rate decides it may take less, and nothing is lost."""
        if self._lost_time is None:
            return
        for lane in (self._cpu, self._copies):
            for variable, seconds in lane.items():
                if variable != self._time:
                    add(self._after_another, variable, seconds)
        longer = {variable: self._lost * seconds for variable, seconds in self._after_another.items()}
        add(longer, self._time, -self._lost)
        add(longer, self._lost_time, -1.0)
        self._program.at_most(longer, -self._lost * self._constant)

    def _wait_for_python(self) -> None:
        """A prompt takes no less than Python needs to queue its layers: what is hidden behind that costs nothing."""
        workload, hardware, program = self._unknowns.workload, self._hardware, self._program
        layers_s = self._scale * hardware.gpu_layer_overhead_s * workload.num_layers
        if self._weighted.call.q_len == 1 or not layers_s:
            return
        product_s = self._scale * product_queueing_s(hardware)
        waiting = program.variable(cost=self._weighted.weight)
        covered = {waiting: 1.0, self._time: 1.0} | ({} if self._lost_time is None else {self._lost_time: 1.0})
        program.at_least(dict(covered), layers_s)
        for variable, products in self._products.items():
            add(covered, variable, -product_s * products)
        fewest = LINEARS_PER_LAYER * workload.num_layers * product_s
        program.at_least(covered, layers_s - fewest)

    def _class(self, c: int, cls: LayerClass) -> None:
        blocks = {cls.linears[i].shard.block: _Stage() for _, i in pairs(cls)}
        for i, linear in enumerate(cls.linears):
            tier = self._unknowns.tier(linear, self._weighted)
            if tier is not None:
                self._linear(c, i, cls.count, linear, tier, blocks)
        if cls.kv is not None:
            self._attention(c, cls, blocks)
        for block in blocks.values():
            add(self._stages, self._stage(cls.count, block), 1.0)

    def _linear(self, c: int, i: int, count: int, linear: LinearClass, tier: int, blocks: dict[str, _Stage]) -> None:
        shard, call, scale = linear.shard, self._weighted.call, self._scale
        is_head, block = shard.is_head, blocks.get(shard.block)
        rows = call.logits_rows if is_head else call.rows
        cost = self._stage_cost(shard, rows, block is not None)
        variables = self._unknowns.linears[c, i]
        on_cpu, streamed, layers = variables.cpu[tier], variables.stream[tier], variables.cpu_layers[tier]
        cpu_s, gpu_s, handover_s = (scale * s for s in (cost.cpu_s_per_unit, cost.gpu_s_per_unit, cost.handover_s))
        part = _Stage({on_cpu: cpu_s}, {variables.gpu: gpu_s, streamed: gpu_s}, {layers: 1.0}, shard.units * gpu_s)
        if block is None:
            stage = self._stage(count, part)
            add(self._stages, stage, 1.0)
        else:
            block.join(part)
        for parts in (self._stages, self._after_another):
            add(parts, layers, handover_s)
        for variable, seconds in part.gpu.items():
            add(self._after_another, variable, seconds)
        add(self._cpu, on_cpu, cpu_s)
        add(self._head_reads if is_head else self._reads, on_cpu, scale * cost.read_s_per_unit)
        copy = scale * shard.unit_bytes / self._hardware.h2d_bytes_per_s
        add(self._copies, streamed, copy)
        if is_head:
            self._head_copies = {stage: -1.0, streamed: copy}
            self._tail |= {stage: 1.0, layers: handover_s}
            self._head_launch_s += scale * cost.launch_s * count
        else:
            add(self._tail, streamed, copy)
            compute = partial(least_products, shard, rows, self._unknowns.workload, self._hardware)
            at_home, piece = self._known.once(("products", shard.shape, rows), compute)
            add(self._products, variables.gpu, at_home)
            add(self._products, streamed, piece)
        # Where another resource decides, the least streaming among equals: less noise on the bus, fewer staging waits.
        self._program.costs[streamed] += TIE_BREAK * self._weighted.weight * copy
        read_s = scale * shard.unit_bytes / self._hardware.dram_bytes_per_s
        add(self._dram, streamed, copy_passes(self._hardware) * read_s)
        for variable in [on_cpu] + ([variables.gpu, streamed] if self._hardware.unified_memory else []):
            add(self._dram, variable, shard.touched(rows, call.together) * read_s)
        self._constant += scale * cost.launch_s * count

    def _attention(self, c: int, cls: LayerClass, blocks: dict[str, _Stage]) -> None:
        tokens = self._unknowns.kept_tokens(cls.kv)
        if tokens is None:
            part = self._attention_over_free_tokens(c, cls)
        else:
            part = self._attention_over(c, cls, tokens)
        block = next((blocks.get(item.shard.block) for item in cls.linears if item.shard.per_kv_head), None)
        if block is not None:
            block.join(part)
        else:
            add(self._stages, self._stage(cls.count, part), 1.0)
        for variable, coefficient in part.cpu.items():
            add(self._cpu, variable, coefficient)
        for variable, coefficient in part.gpu.items():
            add(self._after_another, variable, coefficient)

    def _stage_cost(self, shard: LinearShard, rows: int, paired: bool) -> LinearCost:
        call, weight_format = self._weighted.call, self._unknowns.workload.format_of(shard)
        compute = partial(stage_cost, shard, rows, weight_format, self._hardware, paired, call.together)
        return self._known.once(cost_key(shard, rows, call, paired), compute)

    def _attention_cost(self, shard: KvShard, gpu_tokens: int) -> AttentionCost:
        asked = shard, self._weighted.call, gpu_tokens, self._unknowns.workload, self._hardware, True
        return self._known.once(attention_key(shard, gpu_tokens), partial(attention_cost, *asked))

    def _attention_over(self, c: int, cls: LayerClass, tokens: int) -> _Stage:
        """Attention where a GPU-owned KV head keeps `tokens` slots in GPU memory."""
        unknowns, scale, shard = self._unknowns, self._scale, cls.kv.shard
        cost = self._attention_cost(shard, tokens)
        kv_heads, spills = unknowns.kv_heads[c], cost.spilled_s_per_kv_head > 0
        owned, layers = self._program.variable(), unknowns.layers(cls.count)
        unknowns.attending[c].append(layers)
        self._program.equal({owned: 1, kv_heads: 1}, cls.count * shard.kv_heads)
        self._program.at_most({owned: 1, layers: -shard.kv_heads}, 0)
        self._program.at_most({layers: 1, owned: -1}, 0)  # a KV head in each at least
        bandwidth = self._hardware.dram_bytes_per_s
        add(self._dram, owned, scale * cost.dram_bytes_per_kv_head / bandwidth)
        add(self._dram, kv_heads, scale * cost.spilled_bytes_per_kv_head / bandwidth)
        add(self._reads, owned, scale * cost.read_s_per_kv_head)
        add(self._reads, kv_heads, scale * cost.spilled_s_per_kv_head)
        for lane in (self._copies, self._tail):
            add(lane, kv_heads, scale * cost.streamed_bytes_per_kv_head / self._hardware.h2d_bytes_per_s)
        handovers = self._attention_handovers(c, cls, owned, layers, spills)
        for parts in (self._stages, self._after_another):
            add(parts, handovers, scale * cost.handover_s)
        self._constant += scale * cost.launch_s * cls.count
        busy = {owned: scale * cost.cpu_s_per_kv_head, kv_heads: scale * cost.spilled_s_per_kv_head}
        whole = 0.0 if spills else scale * shard.kv_heads * cost.gpu_s_per_kv_head
        return _Stage(busy, {kv_heads: scale * cost.gpu_s_per_kv_head}, {layers: 1.0}, whole, {handovers: 1.0})

    def _attention_over_free_tokens(self, c: int, cls: LayerClass) -> _Stage:
        """Attention of KV heads that the GPU owns all, where the program decides how many slots they keep: a share
        `far` of what the call sees is in DRAM."""
        unknowns, program, scale = self._unknowns, self._program, self._scale
        shard, call = cls.kv.shard, self._weighted.call
        every, total = unknowns.workload.full_tokens, cls.count * shard.kv_heads
        away, near = (self._attention_cost(shard, n) for n in (0, every))
        kv_heads, far, spills = unknowns.kv_heads[c], program.variable(0, 1), program.binary()
        layers = program.variable()
        unknowns.attending[c].append(layers)
        seen = shard.visible_tokens(call.stored)
        program.at_least({far: seen, unknowns.tokens: 1 / call.sequences}, seen)
        program.at_most({far: 1.0, spills: -1.0}, 0)
        whole_pages = round_up(seen * call.sequences, unknowns.workload.page_size)
        program.at_least({unknowns.tokens: 1.0, spills: every}, min(every, whole_pages))
        in_place = cls.count if away.spilled_s_per_kv_head > 0 else 0
        program.equal({layers: 1.0, spills: -in_place}, 0)
        add(self._dram, far, scale * total * away.spilled_bytes_per_kv_head / self._hardware.dram_bytes_per_s)
        add(self._reads, far, scale * total * away.spilled_s_per_kv_head)
        for lane in (self._copies, self._tail):
            add(lane, far, scale * total * away.streamed_bytes_per_kv_head / self._hardware.h2d_bytes_per_s)
        for parts in (self._stages, self._after_another):
            add(parts, layers, scale * near.handover_s)
        self._constant += scale * near.launch_s * cls.count
        gpu_s = scale * near.gpu_s_per_kv_head
        gpu = {kv_heads: gpu_s, far: scale * total * (away.gpu_s_per_kv_head - near.gpu_s_per_kv_head)}
        return _Stage({far: scale * total * away.spilled_s_per_kv_head}, gpu, {layers: 1.0}, shard.kv_heads * gpu_s)

    def _stage(self, count: int, stage: _Stage) -> int:
        """A variable for the seconds of a stage in all layers of a class: at least the time of either lane."""
        program = self._program
        seconds = program.variable()
        if len(stage.cpu_layers) == 1:
            (layers,) = stage.cpu_layers
        else:
            layers = self._unknowns.layers(count)
            program.at_most({layers: 1.0} | dict.fromkeys(stage.cpu_layers, -1.0), 0.0)
        program.at_least(
            {seconds: 1.0, layers: stage.whole} | {v: -s for v, s in stage.cpu.items()}, count * stage.whole
        )
        program.at_least({seconds: 1.0} | {v: -s for v, s in stage.gpu.items()}, 0)
        return seconds

    def _attention_handovers(self, c: int, cls: LayerClass, owned: int, layers: int, spills: bool) -> int:
        """Layers counted as `attention_handovers` counts them: more KV heads attended than computed by the CPU,
        or any spilled."""
        program, unknowns, tier = self._program, self._unknowns, self._weighted.call.tier
        handovers, kv_heads = unknowns.layers(cls.count), unknowns.kv_heads[c]
        heads_in_layer = -float(cls.kv.shard.kv_heads)
        uncomputed, alone = {owned: 1.0, handovers: heads_in_layer}, {layers: 1.0, handovers: -1.0}
        for i, linear in enumerate(cls.linears):
            if linear.shard.per_kv_head:
                add(uncomputed, unknowns.linears[c, i].cpu[tier], -1.0)
                add(alone, unknowns.linears[c, i].cpu_layers[tier], -1.0)
        if spills:
            add(uncomputed, kv_heads, 1.0)
            program.at_most({kv_heads: 1.0, handovers: heads_in_layer}, 0.0)
        program.at_most(uncomputed, 0.0)
        program.at_most(alone, 0.0)
        if not spills:
            program.at_most({handovers: 1.0, layers: -1.0}, 0.0)
        return handovers
