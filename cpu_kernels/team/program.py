"""A recorded sequence of ops, run by the thread team without Python between them.

Recording checks every argument as a direct call would and keeps addresses, sizes and strides; a run replays them. It is
for calls that repeat on the same tensors, as the layers of a decode step do: a call through Python costs some ten
microseconds, an op of a program less than one beyond its work. A program may also wait for flags and set them
(`CpuKernels.record_wait`, `record_set`), so that another thread, or a GPU, and the program take turns.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cpu_kernels.team.arguments import MAX_PARAMETERS
from cpu_kernels.team.team import RecordedOp, Team
from cpu_kernels.team.words import (
    EXPIRED,
    PROGRAM_COUNT,
    PROGRAM_ENTRY_BYTES,
    PROGRAM_HEAD_BYTES,
    PROGRAM_INDEX,
    PROGRAM_TIMEOUT_NS,
    PROGRAM_WAITED_NS,
)

TIMEOUT_S = 60.0


class Program:
    """The given ops and entries over flags in order. Its working memory is its own: direct calls may come between
    runs."""

    def __init__(self, team: Team, ops: Sequence[RecordedOp]):
        self._team = team
        self._ops = tuple(ops)
        scratch_bytes = max((op.scratch_bytes for op in ops), default=0)
        self._scratch = torch.empty(scratch_bytes + 4096, dtype=torch.uint8, device="cpu")
        scratch = (self._scratch.data_ptr() + 4095) & ~4095
        self._block = torch.zeros(PROGRAM_HEAD_BYTES + PROGRAM_ENTRY_BYTES * len(ops), dtype=torch.uint8, device="cpu")
        self._address, self._timeout_s = self._block.data_ptr(), 0.0
        memory = self._block.numpy()
        struct.pack_into("=q", memory, PROGRAM_COUNT, len(ops))
        for index, op in enumerate(ops):
            _write(memory, PROGRAM_HEAD_BYTES + PROGRAM_ENTRY_BYTES * index, op, scratch)

    def __len__(self) -> int:
        """Number of ops and entries over flags."""
        return len(self._ops)

    def select(self, keep: Callable[[str], bool]) -> "Program":
        """The ops whose kernel's name is kept, alone: to see what they cost; what they compute means nothing."""
        return Program(self._team, [op for op in self._ops if keep(op.name)])

    @property
    def waited_s(self) -> float:
        """Seconds for which the last run waited for flags."""
        return self._word(PROGRAM_WAITED_NS) / 1e9

    def run(self, timeout_s: float = TIMEOUT_S) -> None:
        """Run every entry in order.

        Raises TimeoutError where a flag does not get its value within about `timeout_s` of the program's asking for it,
        and RuntimeError naming the op that found its tensors' contents wrong; what follows the failure has not run.
        """
        if timeout_s != self._timeout_s:
            struct.pack_into("=q", self._block.numpy(), PROGRAM_TIMEOUT_NS, int(1e9 * timeout_s))
            self._timeout_s = timeout_s
        failure = self._team.replay(self._address)
        if failure:
            index = self._word(PROGRAM_INDEX)
            if failure == EXPIRED:
                raise TimeoutError(f"entry {index} of a recorded program waited {timeout_s:g} s for a flag")
            raise RuntimeError(
                f"op {index} ({self._ops[index].name}) of a recorded program stopped with code {failure}: an id, a "
                "page table or a length holds a value outside its range"
            )

    def _word(self, offset: int) -> int:
        return struct.unpack_from("=q", self._block.numpy(), offset)[0]


def _write(memory: Any, offset: int, op: RecordedOp, scratch: int) -> None:
    words = (op.kernel_address, scratch, *op.parameters)
    struct.pack_into(f"={len(words)}q", memory, offset, *words)
    assert len(words) <= 1 + MAX_PARAMETERS, f"{op.name} has {len(words) - 1} parameters, at most {MAX_PARAMETERS} fit"
