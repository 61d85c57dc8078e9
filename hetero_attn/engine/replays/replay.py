"""A decode step on the CPU lane, recorded once for each number of rows and replayed for every token.

A decode step calls the same operations on the same buffers token after token; only the tokens, their positions and the
page tables differ, and those are read from memory. So the calls are recorded as one program of the
thread team, which then runs whole steps without Python. The un-recorded path computes the same, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import RowKeys
from cpu_kernels.team.program import Program
from hetero_attn.cache.cache import KVCache
from hetero_attn.engine.replays.renewal import Renewal
from hetero_attn.lanes.activation import Activation
from hetero_attn.ops.step import PoolStep, Step
from hetero_attn.ops.step_rows import Rows, has_drafts

Kind = tuple[int, bool]


class Recorded(NamedTuple):
    """A step whose host tensors a program reads, and what writes the next one into them."""

    step: Step
    renewal: Renewal
    program: Program


class DecodeReplay:
    """Programs of decode steps by rows, and by whether states leave some of them out. `forward(step)` computes one
    step, from its tokens or from their embedded rows to the logits."""

    def __init__(self, ops: CpuKernels, forward: Callable[[Step], None]) -> None:
        self._ops = ops
        self._forward = forward
        self._recorded: dict[Kind, Recorded] = {}

    def program(self, rows: int, has_drafts: bool = False) -> Program:
        """The recorded step of so many rows; KeyError before its first run."""
        return self._recorded[rows, has_drafts].program

    def renewed(self, cache: KVCache, work: Sequence[Rows], rows: int) -> Step | None:
        """The recorded step of so many rows, which attend one by one, with what `make_step` would say of this work;
        None before there is one. The next call, or the next step of as many rows, writes over it."""
        recorded = self._recorded.get((rows, has_drafts(cache, work, rows)))
        if recorded is None:
            return None
        recorded.renewal.write(cache, work)
        return recorded.step

    def run(self, step: Step) -> None:
        """Compute a decode step; records it when its kind is new."""
        kind = step.rows, step.has_drafts
        recorded = self._recorded.get(kind)
        if recorded is None:
            own = own_copy(step)
            program = self._ops.record(lambda: self._forward(own))
            recorded = self._recorded[kind] = Recorded(own, Renewal(own), program)
        if recorded.step is not step:
            refresh(recorded.step, step)
            recorded.renewal.forget()
        recorded.program.run()


def own_copy(step: Step) -> Step:
    """The same step in host tensors that no other step shares; those on a device are where every step's are."""
    pools = tuple(
        PoolStep(
            _own(pool.slots),
            tuple(replace(part, host=_clone(part.host), spilled=_clone(part.spilled)) for part in pool.parts),
        )
        for pool in step.pools
    )
    return replace(
        step,
        token_ids=step.token_ids.clone(),
        positions=_own(step.positions),
        pools=pools,
        sequence_ids=_own(step.sequence_ids),
    )


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
    tensors = [step.token_ids, step.positions.host, step.sequence_ids.host]
    for pool in step.pools:
        tensors.append(pool.slots.host)
        for part in pool.parts:
            tensors += (*(part.host or ()), *(part.spilled or ()))
    return [tensor for tensor in tensors if tensor is not None]
