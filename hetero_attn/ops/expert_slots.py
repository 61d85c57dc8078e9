"""The expert slots of one layer: GPU memory in which any of its experts may lie, beside all of them in DRAM.

Which one lies where is a table in GPU memory. The router's operation reads it once a step and sorts the picks by it:
those of experts in slots come first and are the GPU's, the others stay where the plan has their experts. So whatever
the table says, every pick is computed once, and a recorded step follows it. It is written between steps only
(`ops.expert_slot_keeper`).
"""

from dataclasses import dataclass

import torch

from hetero_attn.lanes.lanes import Lanes

NOTED_ROWS = 64  # of a step, its last ones: what came before them is gone from the slots, or stays for good


@dataclass(frozen=True, slots=True)
class ExpertSlots:
    """One layer's.

    memory: uint8 [slots, unit_bytes], packed experts. table: int32 [experts], the slot of each expert, -1 for none.
    held: int32 [slots], the expert of each slot. All of them in GPU memory. chosen: int32 [NOTED_ROWS, per_row] in host
    memory, the experts of a step's last rows, complete when it has ended.
    """

    memory: torch.Tensor
    table: torch.Tensor
    held: torch.Tensor
    chosen: torch.Tensor

    @property
    def count(self) -> int:
        """How many slots there are."""
        return self.memory.shape[0]

    def note(self, lanes: Lanes, ids: torch.Tensor) -> None:
        """Bring the experts of a step's last rows to host memory; ids: int32 [rows, per_row] in GPU memory."""
        rows = min(NOTED_ROWS, ids.shape[0])
        # As float32, of which a GPU makes small copies by a kernel; the bits stay.
        lanes.copy(self.chosen[:rows].view(torch.float32), ids[-rows:].view(torch.float32))
