"""The seconds of a pass while they are added up, layer by layer."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import fsum
from typing import Any

from placement.cost.sums import Sums
from placement.cost.terms import Call
from placement.machine.hardware import HardwareProfile
from placement.plan.phase import RESOURCES, TERMS
from placement.plan.placed import LayerBytes, PlacedLayer, layer_bytes
from placement.plan.warm import step_period
from placement.plan.workload import Workload


@dataclass(slots=True)
class KnownPass:
    """What was computed of a pass for other placements: costs of linears and attention, and what layers add up to."""

    parts: dict[Hashable, Any] = field(default_factory=dict)
    layers: "dict[Hashable, Tally]" = field(default_factory=dict)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives for the first of equal parts; the others have it from here."""
        if key not in self.parts:
            self.parts[key] = compute()
        return self.parts[key]


class KnownCosts:
    """What was computed for other placements on one machine, by workload and pass."""

    def __init__(self) -> None:
        self._passes: dict[tuple[int, Call, bool], tuple[Workload, KnownPass]] = {}
        self._sizes: dict[int, tuple[Workload, dict[Hashable, LayerBytes]]] = {}
        self._with_inserts: dict[tuple[int, int], tuple[Workload, Workload]] = {}

    def with_inserts(self, workload: Workload, inserts: int) -> Workload:
        """This very workload with so many copies of a layer's experts behind a step at most: the same one every time,
        of which costs are known."""
        if inserts == workload.inserts:
            return workload
        key = id(workload), inserts
        if key not in self._with_inserts:
            self._with_inserts[key] = workload, workload.resized(inserts=inserts)
        return self._with_inserts[key][1]

    def of(self, workload: Workload, call: Call, on_gpu: bool) -> KnownPass:
        """What is known of a pass of this very workload."""
        return self._passes.setdefault((id(workload), call, on_gpu), (workload, KnownPass()))[1]

    def bytes_of(self, workload: Workload, layer: PlacedLayer) -> LayerBytes:
        """What a layer of this very workload takes."""
        known = self._sizes.setdefault(id(workload), (workload, {}))[1]
        if layer.key not in known:
            known[layer.key] = layer_bytes(workload, layer)
        return known[layer.key]


class Tally:
    """Seconds of a pass, by resource and by kind of work; kept apart, because their exact sum is the same whatever the
    order of the layers. batch_steps: as in `PhaseCost`, as it is supposed. reads_s: what the CPU reads of layers;
    head_waits_s: what copies of the head wait for what it reads of that. products: that Python queues."""

    def __init__(
        self,
        workload: Workload,
        hardware: HardwareProfile,
        call: Call,
        on_gpu: bool,
        batch_steps: int,
        known: KnownPass | None = None,
    ) -> None:
        self.workload, self.hardware, self.call, self.on_gpu = workload, hardware, call, on_gpu
        self.batch_steps = batch_steps
        self.lanes: dict[str, list[float]] = {name: [] for name in RESOURCES}
        self.terms: dict[str, list[float]] = {name: [] for name in TERMS}
        self.before_head_s: list[float] = []
        self.reads_s: list[float] = []
        self.inserts_s: list[float] = []
        self.head_s = self.head_waits_s = 0.0
        self.products = 0
        self.known = known or KnownPass()
        self._blocks: dict[str, list[float]] = {}

    def sums(self, queueing_s: float, step_s: float) -> Sums:
        """Its sums, beside what is counted once a pass."""
        lanes, terms = ({name: fsum(parts) for name, parts in each.items()} for each in (self.lanes, self.terms))
        before_head_s, reads_s, inserts_s = map(fsum, (self.before_head_s, self.reads_s, self.inserts_s))
        batch_s = inserts_s * step_period(self.batch_steps) / self.batch_steps
        once = self.head_s, self.head_waits_s, queueing_s, step_s
        return Sums(lanes, terms, before_head_s, reads_s, inserts_s, batch_s, *once, self.batch_steps)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """As that of `KnownPass`."""
        return self.known.once(key, compute)

    def layer(self, key: Hashable, compute: "Callable[[Tally], None]") -> "Tally":
        """One layer by itself, which `compute` adds to an empty tally unless an equal one is known."""
        layers = self.known.layers
        if key not in layers:
            layers[key] = Tally(self.workload, self.hardware, self.call, self.on_gpu, self.batch_steps, self.known)
            compute(layers[key])
        return layers[key]

    def add_layers(self, layer: "Tally", times: int) -> None:
        """Add so many layers like one, or the head."""
        for ours, theirs in ((self.lanes, layer.lanes), (self.terms, layer.terms)):
            for name, parts in theirs.items():
                if parts:
                    ours[name] += parts * times
        self.before_head_s += layer.before_head_s * times
        self.reads_s += layer.reads_s * times
        self.inserts_s += layer.inserts_s * times
        self.head_s += layer.head_s
        self.head_waits_s += layer.head_waits_s
        self.products += layer.products * times

    def add_stage(
        self, kind: str, cpu_s: float, gpu_s: float, handovers_s: float, launch_s: float, block: str | None = None
    ) -> None:
        """Both lanes side by side, then the hand-overs. kind: linears | attention. block: of which this is a part; its
        lanes meet at its end only."""
        own = 0.0 if self.on_gpu else launch_s
        self.add(self.lanes["steps"], handovers_s + launch_s)
        if block is None:
            self.add(self.lanes["steps"], max(cpu_s, gpu_s))
        else:
            sums = self._blocks.setdefault(block, [0.0, 0.0])
            sums[0] += cpu_s
            sums[1] += gpu_s
        self.add(self.lanes["cpu"], cpu_s + own)
        self.add(self.lanes["gpu"], gpu_s + (launch_s - own))
        self.add(self.terms[f"cpu_{kind}"], cpu_s + own)
        self.add(self.terms[f"gpu_{kind}"], gpu_s + (launch_s - own))
        self.add(self.terms["handovers"], handovers_s)

    def add(self, parts: list[float], seconds: float) -> None:
        """Add seconds; what is nothing is left out."""
        if seconds:
            parts.append(seconds)

    def end_blocks(self) -> None:
        """Add the slower lane of every block."""
        for sums in self._blocks.values():
            self.add(self.lanes["steps"], max(sums))
        self._blocks.clear()
