"""A decode step on the CPU lane, recorded once for each batch size and replayed for every token.

The layers of a decode step call the same operations on the same buffers token after token; only the residual rows, the
positions and the page tables differ, and those are read from memory. So the calls are recorded as one program of the
thread team, which then runs whole steps without Python. The un-recorded path computes the same, bit for bit.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.team.program import Program
from hetero_attn.ops.step import Segment, Step


class DecodeReplay:
    """Programs of decode steps by batch size. `forward(step)` computes one step without its embedding, logits
    included."""

    def __init__(self, ops: CpuKernels, forward: Callable[[Step], None]) -> None:
        self._ops = ops
        self._forward = forward
        self._recorded: dict[int, tuple[Step, Program]] = {}

    def program(self, rows: int) -> Program:
        """The recorded step of this batch size; KeyError before its first run."""
        return self._recorded[rows][1]

    def run(self, step: Step) -> None:
        """Compute a decode step whose embedded rows are in the residual; records its batch size when it is new."""
        if step.rows not in self._recorded:
            own = own_copy(step)
            self._recorded[step.rows] = (own, self._ops.record(lambda: self._forward(own)))
        own, program = self._recorded[step.rows]
        refresh(own, step)
        program.run()


def own_copy(step: Step) -> Step:
    """The same step in host tensors that no other step shares; those on a device are where every step's are."""
    groups = tuple(replace(group, host=_clone(group.host), spilled=_clone(group.spilled)) for group in step.groups)
    return replace(step, positions=replace(step.positions, host=step.positions.host.clone()), groups=groups)


def refresh(own: Step, step: Step) -> None:
    """Bring the next step's values into the recorded step's host tensors."""
    for target, source in zip(_tensors(own), _tensors(step), strict=True):
        target.copy_(source)


def _clone(segment: Segment | None) -> Segment | None:
    if segment is None:
        return None
    fields = (segment.slots, segment.table, segment.start, segment.stop)
    return Segment(*(None if field is None else field.clone() for field in fields))


def _tensors(step: Step) -> tuple[torch.Tensor, ...]:
    segments = [segment for group in step.groups for segment in (group.host, group.spilled) if segment is not None]
    fields = [field for part in segments for field in (part.slots, part.table, part.start, part.stop)]
    return (step.positions.host, *(field for field in fields if field is not None))
