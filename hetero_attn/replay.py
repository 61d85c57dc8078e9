"""A decode step on the CPU lane, recorded once for each batch size and replayed for every token.

The layers of a decode step call the same operations on the same buffers token after token; only the residual rows, the
positions and the page tables differ, and those are read from memory. So the calls are recorded as one program of the
thread team, which then runs whole steps without Python. The un-recorded path computes the same, bit for bit.
"""

from collections.abc import Callable

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.program import Program
from hetero_attn.lanes import Activation
from hetero_attn.step import GroupStep, Segment, Step


class DecodeReplay:
    """Programs of decode steps by batch size. `forward(step)` computes one step without its embedding, logits included."""

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
            own = _own_copy(step)
            self._recorded[step.rows] = (own, self._ops.record(lambda: self._forward(own)))
        own, program = self._recorded[step.rows]
        for target, source in zip(_tensors(own), _tensors(step), strict=True):
            target.copy_(source)
        program.run()


def _own_copy(step: Step) -> Step:
    """The same step in tensors that no other step shares."""
    groups = tuple(GroupStep(_clone(group.host), None, None) for group in step.groups)
    positions = Activation(None, step.positions.host.clone())
    return Step(False, step.rows, step.tier, step.sequences, positions, groups)


def _clone(segment: Segment) -> Segment:
    return Segment(*(field.clone() for field in (segment.slots, segment.table, segment.start, segment.stop)))


def _tensors(step: Step) -> tuple[torch.Tensor, ...]:
    segments = [group.host for group in step.groups]
    return (
        step.positions.host,
        *(field for host in segments for field in (host.slots, host.table, host.start, host.stop)),
    )
