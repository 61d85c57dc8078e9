"""A recorded sequence of ops, run by the thread team without Python between them.

Recording checks every argument as a direct call would and keeps addresses, sizes and strides; a run replays them. It is
for calls that repeat on the same tensors, as the layers of a decode step do: a call through Python costs some ten
microseconds, an op of a program less than one beyond its work.
"""

import struct
from collections.abc import Callable, Sequence

import torch

from .team import RecordedOp, Team
from .team_layout import MAX_PARAMETERS, PROGRAM_COUNT, PROGRAM_ENTRY_BYTES, PROGRAM_HEAD_BYTES, PROGRAM_INDEX


class Program:
    """The given ops in order. Its working memory is its own: direct calls may come between runs."""

    def __init__(self, team: Team, ops: Sequence[RecordedOp]):
        self._team = team
        self._ops = tuple(ops)
        scratch_bytes = max((op.scratch_bytes for op in ops), default=0)
        self._scratch = torch.empty(scratch_bytes + 4096, dtype=torch.uint8)
        scratch = (self._scratch.data_ptr() + 4095) & ~4095
        self._block = torch.zeros(PROGRAM_HEAD_BYTES + PROGRAM_ENTRY_BYTES * len(ops), dtype=torch.uint8)
        memory = self._block.numpy()
        struct.pack_into("=q", memory, PROGRAM_COUNT, len(ops))
        for index, op in enumerate(ops):
            _write(memory, PROGRAM_HEAD_BYTES + PROGRAM_ENTRY_BYTES * index, op, scratch)

    def __len__(self) -> int:
        """Number of ops."""
        return len(self._ops)

    def select(self, keep: Callable[[str], bool]) -> "Program":
        """The ops whose kernel's name is kept, alone: to see what they cost; what they compute means nothing."""
        return Program(self._team, [op for op in self._ops if keep(op.name)])

    def run(self) -> None:
        """Run every op in order. Raises RuntimeError naming the op that found its tensors' contents wrong."""
        failure = self._team.replay(self._block.data_ptr())
        if failure:
            (index,) = struct.unpack_from("=q", self._block.numpy(), PROGRAM_INDEX)
            raise RuntimeError(
                f"op {index} ({self._ops[index].name}) of a recorded program stopped with code {failure}: a page "
                "table or a length holds a value outside its range"
            )


def _write(memory: object, offset: int, op: RecordedOp, scratch: int) -> None:
    words = (op.kernel_address, scratch, *op.parameters)
    struct.pack_into(f"={len(words)}q", memory, offset, *words)
    assert len(words) <= 1 + MAX_PARAMETERS, f"{op.name} has {len(words) - 1} parameters, at most {MAX_PARAMETERS} fit"
