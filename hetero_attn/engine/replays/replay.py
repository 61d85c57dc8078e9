"""A decode step on the CPU lane, recorded once for each batch size and replayed for every token.

The layers of a decode step call the same operations on the same buffers token after token; only the residual rows, the
positions and the page tables differ, and those are read from memory. So the calls are recorded as one program of the
thread team, which then runs whole steps without Python. The un-recorded path computes the same, bit for bit.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import RowKeys
from cpu_kernels.team.program import Program
from hetero_attn.lanes.activation import Activation
from hetero_attn.ops.step import PoolStep, Step


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
    pools = tuple(
        PoolStep(
            _own(pool.slots),
            tuple(replace(part, host=_clone(part.host), spilled=_clone(part.spilled)) for part in pool.parts),
        )
        for pool in step.pools
    )
    return replace(step, positions=_own(step.positions), pools=pools, sequence_ids=_own(step.sequence_ids))


def refresh(own: Step, step: Step) -> None:
    """Bring the next step's values into the recorded step's host tensors."""
    for target, source in zip(_tensors(own), _tensors(step), strict=True):
        target.copy_(source)


def _own(tables: Activation) -> Activation:
    return replace(tables, host=None if tables.host is None else tables.host.clone())


def _clone(segment: RowKeys | None) -> RowKeys | None:
    if segment is None:
        return None
    return RowKeys(*(tensor.clone() for tensor in segment))


def _tensors(step: Step) -> list[torch.Tensor]:
    tensors = [step.positions.host, step.sequence_ids.host]
    for pool in step.pools:
        tensors.append(pool.slots.host)
        for part in pool.parts:
            tensors += (*(part.host or ()), *(part.spilled or ()))
    return [tensor for tensor in tensors if tensor is not None]
