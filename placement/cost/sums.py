"""What a pass adds up to, and how long it takes then: as long as the longest of its limits, each linear in its sums.

The equations are those of placement.cost.model. No step waits for copies into expert slots, so they have all of a step:
one whose copies come behind every step is no shorter than they and what is streamed keep the bus busy. With a batch of
copies every few steps the bus has less to do and the slots serve less. What is expected is the number of steps with
which a step is shortest (`shortest`): of many passes that more of anything makes no longer the shortest is such a one,
while whether copies fit into a step, asked of the step that they make shorter, has two answers or none.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from placement.cost.terms import Call, interference
from placement.machine.hardware import HardwareProfile


class Sums(NamedTuple):
    """Seconds of a pass by resource and by kind of work, layers and head together, before lanes slow each other.

    before_head_s: what streams for layers; reads_s: what the CPU reads for layers; inserts_s: copies into expert slots,
    batch_s: the same of steps in which a batch of them is on the bus, which the last of its period is not; head_s: the
    head's stage; head_waits_s: what its copies wait for what the CPU reads of it; queueing_s: what Python needs beside
    the GPU; step_s: once a pass. batch_steps: as in `PhaseCost`.
    """

    lanes: dict[str, float]
    terms: dict[str, float]
    before_head_s: float
    reads_s: float
    inserts_s: float
    batch_s: float
    head_s: float
    head_waits_s: float
    queueing_s: float
    step_s: float
    batch_steps: float

    def mixed_with(self, other: "Sums", share: float) -> "Sums":
        """The mean of passes of which a share is like another one."""

        def mean(ours, theirs):
            if isinstance(ours, dict):
                return {name: mean(seconds, theirs[name]) for name, seconds in ours.items()}
            return (1.0 - share) * ours + share * theirs

        return Sums(*map(mean, self, other))


class Interplay(NamedTuple):
    """How work of one kind slows another. per_copy, per_read: as `interference`; lost: of what could run side by side;
    dram_per_copy: seconds of the DRAM for one of the bus."""

    per_copy: float
    per_read: float
    lost: float
    dram_per_copy: float

    @classmethod
    def of(cls, hardware: HardwareProfile, call: Call, on_gpu: bool) -> "Interplay":
        """That of a pass on a machine."""
        lost = 1 - hardware.overlap_of(call.q_len) if on_gpu else 0.0
        return cls(*interference(hardware), lost, hardware.h2d_bytes_per_s / hardware.dram_bytes_per_s)


class PassCost(NamedTuple):
    """Seconds of one pass: those expected, and those if all that could run side by side did; the seconds that each
    resource needs by itself, and those of each kind of work. batch_steps: as in `PhaseCost`."""

    seconds: float
    overlapped_s: float
    lanes: dict[str, float]
    terms: dict[str, float]
    batch_steps: float = 1


class _Beside(NamedTuple):
    """A pass whose lanes slow each other. lanes: with what they wait; least_s: of each lane, and of the layers' copies
    with the head behind them; one_by_one_s: did nothing run side by side; bus_s: of all copies."""

    lanes: dict[str, float]
    least_s: tuple[float, ...]
    one_by_one_s: float
    bus_s: float

    @classmethod
    def of(cls, sums: Sums, interplay: Interplay) -> "_Beside":
        lanes, inserts_s = dict(sums.lanes), sums.inserts_s
        one_by_one_s = lanes["cpu"] + lanes["gpu"] + lanes["pcie"] + sums.terms["handovers"]
        reads_s = interplay.per_read * sums.reads_s
        waits_s = reads_s if lanes["pcie"] else 0.0
        if lanes["cpu"]:
            lanes["cpu"] += interplay.per_copy * (lanes["pcie"] + inserts_s)
        lanes["dram"] += inserts_s * interplay.dram_per_copy
        lanes["pcie"] += waits_s + sums.head_waits_s
        bus_s = lanes["pcie"] + sums.batch_s + (reads_s - waits_s if inserts_s else 0.0)
        return cls(lanes, (*lanes.values(), sums.before_head_s + waits_s + sums.head_s), one_by_one_s, bus_s)

    def limits(self, sums: Sums, lost: float) -> Iterator[float]:
        """What the pass takes at least, whatever the bus has to do beside it."""
        for least_s in self.least_s:
            yield least_s + sums.step_s
            yield (1.0 - lost) * least_s + lost * self.one_by_one_s + sums.step_s
        yield sums.queueing_s + sums.step_s


def cost_of(sums: Sums, interplay: Interplay) -> PassCost:
    """What a pass takes that adds up to this."""
    beside, copies_s = _Beside.of(sums, interplay), sums.inserts_s
    overlapped = max(beside.least_s)
    work = overlapped + interplay.lost * max(0.0, beside.one_by_one_s - overlapped)
    not_hidden = max(0.0, sums.queueing_s - work)
    around_s = not_hidden + sums.step_s
    terms = sums.terms | {"step": sums.terms["step"] + not_hidden, "copies": sums.terms["copies"] + copies_s}
    lanes = beside.lanes | {"pcie": beside.lanes["pcie"] + copies_s}
    seconds, least = (max(each + around_s, beside.bus_s) for each in (work, overlapped))
    return PassCost(seconds, least, lanes, terms, sums.batch_steps)


def _seconds(cost: PassCost) -> float:
    return cost.seconds


def shortest(of_batches: Iterable[Sums], interplay: Interplay) -> PassCost:
    """The shortest of passes that differ in how many steps a batch of copies takes, ascending, or of which some take
    one number and some the next. With more steps slots only serve less: none are looked at that would be no shorter if
    copies took no time."""
    best = before = None
    for sums in of_batches:
        if best is None or before is None:
            best = cost_of(sums, interplay)
        else:
            mixed = _just_in_time(before, sums, interplay)
            best = best if mixed is None else min(best, cost_of(mixed, interplay), key=_seconds)
            if cost_of(sums._replace(inserts_s=0.0, batch_s=0.0), interplay).seconds >= best.seconds:
                break
            best = min(best, cost_of(sums, interplay), key=_seconds)
        before = sums
    assert best is not None, "a batch takes at least one step"
    return best


def _just_in_time(fewer: Sums, more: Sums, interplay: Interplay) -> Sums | None:
    """As many passes of both kinds as keep the bus busy to their end; None unless it has too much to do in those of the
    first kind, and time left in the others."""
    few, many = _Beside.of(fewer, interplay), _Beside.of(more, interplay)
    limits = zip(few.limits(fewer, interplay.lost), many.limits(more, interplay.lost), strict=True)
    late = [(few.bus_s - before, many.bus_s - after) for before, after in limits]
    if min(late)[0] <= 0.0 or min(later for _, later in late) >= 0.0:
        return None
    return fewer.mixed_with(more, min(now / (now - later) for now, later in late if later < 0.0))
