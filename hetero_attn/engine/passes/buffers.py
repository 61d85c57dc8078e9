"""The memory that an engine's steps write: activations and logits."""

from typing import NamedTuple

from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.workspace import Workspace, make_buffer, make_workspace
from hetero_attn.spec.blocks import ModelSpec
from hetero_attn.spec.buffers import ActivationWidths
from hetero_attn.spec.workload import LOGITS_ROWS
from placement.plan.plan import Plan


class Buffers(NamedTuple):
    """What an engine's steps write: activations of at most `rows` rows, and logits."""

    rows: int
    work: Workspace
    logits: Activation


def make_buffers(model: ModelSpec, plan: Plan, lanes: Lanes) -> Buffers:
    """Allocate them; before the weights, so that where the system page-locks only so much, it locks these."""
    rows, head = max(plan.prefill_chunk, plan.max_batch), model.head.linears[0]
    logits = make_buffer(lanes, max(LOGITS_ROWS, plan.max_batch), head.out_features, "resident")
    return Buffers(rows, make_workspace(ActivationWidths.of(model), rows, lanes), logits)
