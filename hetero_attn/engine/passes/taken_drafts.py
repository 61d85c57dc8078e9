"""Drafts that turned out right, taken in by states of fixed size between two passes."""

import torch

from hetero_attn.cache.states import FixedStates
from hetero_attn.engine.forward import Forward
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.block import FixedView
from hetero_attn.models.decoder import ModelWeights
from hetero_attn.spec.blocks import FixedState


class TakenDrafts:
    """Moves the states of a sequence on by rows of the last step, layer by layer; `FixedStates.take_in`."""

    def __init__(self, lanes: Lanes, weights: ModelWeights, forward: Forward, states: FixedStates) -> None:
        self._lanes, self._weights, self._forward, self._states = lanes, weights, forward, states

    @torch.inference_mode()
    def __call__(self, sequence_id: int, first: int, count: int) -> None:
        """Take in rows [first, first + count) of the last step, which were drafts of this sequence."""
        work = self._forward.work.rows(0, count)
        with self._forward.guard, self._lanes.torch_at_rest(), self._lanes.main_lane():
            for block, weights in self._weights.blocks:
                if isinstance(block.state, FixedState):
                    drafts = self._states.rows_of_drafts(block.layer, first, count)
                    of_one = FixedView(*self._states.of_one(block.layer, sequence_id, count), drafts=drafts)
                    block.take_in(self._lanes, weights, of_one, work)
