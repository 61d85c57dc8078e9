"""The experts of one layer that a pass of many rows streams: those that are warm, whichever they are.

Ids are data of a pass. A table in GPU memory says which experts are there for it, in expert slots or streamed; the
router's operation reads it and sorts the picks by it, as by that of the slots (`ops.expert_slots`). So those of
streamed experts are the GPU's and all others stay where the plan has their experts: every pick is computed once,
whatever is streamed. Table and copies are chosen between passes alone (`ops.streamed_expert_keeper`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.staging import Piece


@dataclass(frozen=True, slots=True)
class Streamed:
    """What the passes of one row tier stream of a layer: ids, ascending, and the pieces in which they are copied."""

    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class StreamedExperts:
    """One layer's.

    table: int32 [experts] in GPU memory, of each expert its number among those that are there for a pass, first the
    expert slots, then what is streamed, -1 for none. held: int32 [experts] there, the expert of each number. starts:
    int32 [2 experts + 1] in host memory, where each expert's picks began in the last pass, complete when it has ended.
    by_tier: of the row tiers whose passes stream by heat.
    """

    table: torch.Tensor
    held: torch.Tensor
    starts: torch.Tensor
    by_tier: dict[int, Streamed] = field(default_factory=dict)

    def note(self, lanes: Lanes, starts: torch.Tensor) -> None:
        """Bring to host memory where each expert's picks begin; starts: int32 in GPU memory, as in `Routes`."""
        # As float32, of which a GPU makes small copies by a kernel; the bits stay.
        lanes.copy(self.starts[: starts.shape[0]].view(torch.float32), starts.view(torch.float32))


def pieces_of(ids: Sequence[int], dram: torch.Tensor, first_dram_unit: int, piece_units: int) -> tuple[Piece, ...]:
    """The pieces of experts with ascending ids, neighbours in one run. dram: uint8 [experts, unit_bytes], those from
    first_dram_unit on."""
    return tuple(
        tuple(
            dram[start - first_dram_unit : stop - first_dram_unit] for start, stop in _runs(ids[at : at + piece_units])
        )
        for at in range(0, len(ids), piece_units)
    )


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending ids as [start, stop) of neighbours."""
    begins = [at for at in range(len(ids)) if at == 0 or ids[at] != ids[at - 1] + 1]
    return [(ids[at], ids[end - 1] + 1) for at, end in zip(begins, [*begins[1:], len(ids)], strict=True)]
