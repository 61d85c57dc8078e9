"""What a model hands out to a head that drafts for it, and what such a head takes in and hands on, see
`spec.draft_heads.eagle_config`."""

import torch

from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.decoder import ModelWeights, embed
from hetero_attn.models.workspace import Workspace
from hetero_attn.spec.blocks import KEPT, ModelSpec
from hetero_attn.spec.decoder.eagle import EMBEDDED
from placement.plan.workload import row_tier


def keep(lanes: Lanes, spec: ModelSpec, layer: int, work: Workspace) -> None:
    """Queue copies of the residual stream before a layer, where it is tapped; a recorded step copies too."""
    width = spec.hidden_size
    for place, tap in enumerate(spec.taps):
        if tap == layer:
            kept = work.of(KEPT, width * len(spec.taps)).main[:, place * width : (place + 1) * width]
            lanes.main_ops.copy_rows(kept, work.residual.main[:, :width])


def kept_rows(spec: ModelSpec, work: Workspace, start: int, stop: int) -> torch.Tensor:
    """What was kept of rows [start, stop) of the last step, which has ended: float32 [rows, taps * hidden_size], in
    host memory, the caller's own."""
    return work.of(KEPT, spec.hidden_size * len(spec.taps)).main[start:stop].to("cpu", copy=True)


def enter(
    lanes: Lanes, weights: ModelWeights, token_ids: torch.Tensor, hidden: torch.Tensor | None, work: Workspace
) -> None:
    """Begin a step of a head: the embedded tokens in a buffer of their own, `hidden` in the residual stream.

    token_ids: int64 [rows]. hidden: float32 [rows, hidden_size] in host memory; None counts as zeros.
    """
    width = weights.spec.hidden_size
    embed(lanes, weights, token_ids, work.of(EMBEDDED, width))
    residual = work.residual.columns(0, width)
    if hidden is None:
        residual.host.zero_()
    else:
        residual.host.copy_(hidden)
    if lanes.device is not None:
        lanes.copy(residual.device, residual.host)


def handed_on(lanes: Lanes, weights: ModelWeights, rows: int, eps: float, work: Workspace) -> torch.Tensor:
    """The hidden states of the first rows of the last step, which has ended: float32 [rows, hidden_size], in host
    memory, the caller's own; normalised where eps is above 0."""
    hidden = work.residual.main[:rows, : weights.spec.hidden_size].to("cpu", copy=True)
    if eps:
        lanes.host_ops.rms_norm(hidden, weights.head.vector("norm").host, eps, hidden)
    return hidden


def fused(lanes: Lanes, weights: ModelWeights, taken: torch.Tensor, work: Workspace) -> torch.Tensor:
    """What a head makes of hidden states of a large model, in a pass of its own.

    taken: float32 [rows, fusion_width] in host memory. Returns float32 [rows, hidden_size], the caller's own. work:
    for as many rows.
    """
    weights.spec.fusion.taken(work).host.copy_(taken)
    if lanes.ring is not None:
        tier = row_tier(taken.shape[0])
        lanes.ring.announce(piece for linear in weights.fusion.linears.values() for piece in linear.pieces(tier))
    with lanes.main_lane():
        out = weights.spec.fusion.fuse(lanes, weights.fusion, work)
    lanes.finish()
    return out.host[:, : weights.spec.hidden_size].clone()
