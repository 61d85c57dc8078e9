"""Gated DeltaNet: attention whose memory of a sequence is a matrix a head, whatever its length.

    q, k, v, z = in(norm(residual)), b, a = gates norm(residual);   q, k, v = silu(convolution over time of each)
    g = rate softplus(a + dt_bias), strength = sigmoid(b);   o = gated delta rule, see `ops.delta`
    residual += out(rms_norm(o) * silu(z))

The linears are cut over the lanes; what is between them is computed where the residual stream lives, and each
sequence's state lies there. Single tokens are one operation of the kernels, `delta_step`; torch computes prompts, in
chunks.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import silu, softplus

from cpu_kernels.contract import DeltaRule, DeltaStates
from cpu_kernels.formats.weights import BLOCK_FEATURES
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.block import Block, BlockWeights, FixedView, Norm, normed_linear
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.delta import DeltaTokens, gated_delta, short_convolution, unit_length
from hetero_attn.ops.linear import SplitInput, linear_add
from hetero_attn.ops.run import Run
from hetero_attn.spec.decoder.delta import GATES, DeltaDeclaration
from hetero_attn.spec.decoder.norms import NORMED

EXACT_ROWS = 16  # of a step, up to which linears of integers give the same bits for any number of rows


class DeltaRows(NamedTuple):
    """Rows between the projections: [rows, features] of the first one, of the gates, and of what the last one reads,
    which is written."""

    projected: torch.Tensor
    gates: torch.Tensor
    out: torch.Tensor

    def of(self, rows: slice) -> "DeltaRows":
        """Some of the rows."""
        return DeltaRows(*(part[rows] for part in self))


class DeltaNet(DeltaDeclaration, Block):
    """The gated DeltaNet of a layer."""

    def forward(self, run: Run, weights: BlockWeights, state: FixedView, work: Workspace) -> None:
        """Queue the block."""
        lanes, tier = run.lanes, run.step.tier
        first, last = weights.linears["delta_in"], weights.linears["delta_out"]
        projected = work.of("delta_in", self.first.out_features)
        out = work.of("delta_out", self._delta.value_width)
        normed_linear(lanes, tier, Norm.of(self._config, weights), first, work, projected)
        lanes.pull(projected, first.device_features(tier), self.first.out_features)
        parts = DeltaRows(projected.main, self._gates(run, weights, work), out.main)
        if state.drafts is not None:
            for kept, part in zip(self._split(state.drafts), parts, strict=False):
                lanes.main_ops.copy_rows(kept, part)
        if run.step.is_one_by_one:
            self._step(lanes, weights, state, state.sequence_ids, parts)
        else:
            self._mix_runs(run, weights, state, parts)
        column = 0 if lanes.device is None else self._delta.value_width
        linear_add(lanes, last, tier, SplitInput(out, column), work.residual, work.scratch)

    def take_in(self, lanes: Lanes, weights: BlockWeights, state: FixedView, work: Workspace) -> None:
        """The rows once more, whose outputs nobody reads."""
        out = work.of("delta_out", self._delta.value_width).main
        self._step(lanes, weights, state, state.sequence_ids, DeltaRows(*self._split(state.drafts), out))

    def _split(self, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What drafts leave: their projected rows and their gates."""
        width = self.first.out_features
        return drafts[:, :width], drafts[:, width:]

    def _gates(self, run: Run, weights: BlockWeights, work: Workspace) -> torch.Tensor:
        """What strengths and decays are made of, float32 products with the normalised rows."""
        lanes, matrix, normed = run.lanes, weights.vector("gates").main, work.of(NORMED, self._config.hidden_size).main
        gates = work.of(GATES, matrix.shape[0]).main
        if lanes.device is None:
            packed = matrix.view(torch.uint8).view(matrix.shape[0] // BLOCK_FEATURES, -1)
            # A row's sum is in another order where several are computed at once: drafts would change last bits, and so
            # would their absence from a step of several sequences.
            rows = 1 if run.step.is_one_by_one and run.step.rows <= EXACT_ROWS else run.step.rows
            for x, out in zip(normed.split(rows), gates.split(rows), strict=True):
                lanes.host_ops.linear(x, packed, "fp32", None, out)
        else:
            torch.matmul(normed, matrix.T, out=gates)
        return gates

    def _mix_runs(self, run: Run, weights: BlockWeights, state: FixedView, parts: DeltaRows) -> None:
        """Single tokens of many sequences together, and every longer run of one by itself, up to where its state is
        kept and on from there."""
        sequence_ids, kept = run.step.sequence_ids.host.tolist(), run.step.kept_states
        for rows, sequences in runs_of(sequence_ids, [stop for stop, _ in kept]):
            ids = state.sequence_ids[rows]
            if len(ids) == sequences:
                self._step(run.lanes, weights, state, ids, parts.of(rows))
            else:
                self._mix(weights, state.values, ids[:1], parts.of(rows))
            for stop, place in kept:
                if rows.start < stop <= rows.stop:
                    state.keep(sequence_ids[stop - 1], place)

    def _step(self, lanes: Lanes, weights: BlockWeights, state: FixedView, ids: torch.Tensor, parts: DeltaRows) -> None:
        """Single tokens, and drafts behind them."""
        units, rule = parts.projected.unflatten(1, (self._delta.key_heads, -1)), self._rule(lanes, weights)
        lanes.main_ops.delta_step(units, parts.gates, rule, DeltaStates(state.values, state.spare), ids, parts.out)

    def _rule(self, lanes: Lanes, weights: BlockWeights) -> DeltaRule:
        """Of the vectors where they lie; the CPU's vectors need the features of a tap side by side."""
        if "rule" not in weights.made:
            taps, eps = weights.vector("conv").main.T, self._config.rms_norm_eps
            taps = taps.contiguous() if lanes.device is None else taps
            rates, bias, norm = (weights.vector(name).main for name in ("rates", "dt_bias", "out_norm"))
            weights.made["rule"] = DeltaRule(taps, rates, bias, norm, eps, self._delta.is_tiled)
        return weights.made["rule"]

    def _mix(self, weights: BlockWeights, states: torch.Tensor, ids: torch.Tensor, parts: DeltaRows) -> None:
        """Rows of one sequence. ids: int64 [1], which."""
        delta = self._delta
        projected, gates, out = (part[None] for part in parts)
        kept = states.index_select(0, ids)
        matrices = kept[:, : self.matrix_size].view(1, delta.value_heads, delta.key_dim, delta.value_dim)
        inputs = kept[:, self.matrix_size :].view(1, delta.kernel - 1, delta.conv_width)
        units = projected.unflatten(-1, (delta.key_heads, -1))
        widths = [delta.rows_per_key_head(name) for name in ("delta_q", "delta_k", "delta_v", "delta_z")]
        *qkv, z = (part.flatten(2) for part in units[..., : sum(widths)].split(widths, -1))
        mixed, inputs = short_convolution(torch.cat(qkv, -1), inputs, weights.vector("conv").main)
        mixed, matrices = gated_delta(self._tokens(weights, silu(mixed), gates), matrices)
        states.index_copy_(0, ids, torch.cat([matrices.flatten(1), inputs.flatten(1)], 1))
        mixed = mixed.transpose(1, 2)  # (sequences, tokens, heads, value_dim)
        inverse = torch.rsqrt(mixed.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)
        normed = (mixed * inverse * weights.vector("out_norm").main).flatten(2) * silu(z)
        if delta.is_tiled:
            by_head = normed.unflatten(2, (delta.key_heads, delta.values_per_key, -1))
            normed = by_head.transpose(2, 3).flatten(2)
        out.copy_(normed)

    def _tokens(self, weights: BlockWeights, mixed: torch.Tensor, gates: torch.Tensor) -> DeltaTokens:
        """What the delta rule takes, of [sequences, tokens, features] behind the convolution."""
        delta = self._delta
        q, k, v = mixed.split([delta.key_width, delta.key_width, delta.value_width], -1)
        q, k = (
            unit_length(part.unflatten(-1, (delta.key_heads, -1))).repeat_interleave(delta.values_per_key, 2)
            for part in (q, k)
        )
        b, a = (gates[..., start : start + delta.value_heads] for start in (0, delta.value_heads))
        decay = weights.vector("rates").main * softplus(a + weights.vector("dt_bias").main)
        heads = (q * delta.key_dim**-0.5, k, v.unflatten(-1, (delta.value_heads, -1)), decay, b.sigmoid())
        return DeltaTokens(*(part.transpose(1, 2) for part in heads))


def runs_of(sequence_ids: list[int], cuts: Sequence[int] = ()) -> Iterator[tuple[slice, int]]:
    """(rows, how many sequences they are of): single tokens of all sequences that have one, side by side, and each
    longer run of one sequence, in pieces where a cut lies inside it. cuts: ascending."""
    for rows, sequences in _whole_runs(sequence_ids):
        inside = [cut for cut in cuts if rows.start < cut < rows.stop] if sequences == 1 else []
        for start, stop in pairwise((rows.start, *inside, rows.stop)):
            yield slice(start, stop), sequences


def _whole_runs(sequence_ids: list[int]) -> Iterator[tuple[slice, int]]:
    lengths = [len(list(each)) for _, each in groupby(sequence_ids)]
    start = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        step = count if length == 1 else 1
        for _ in range(count // step):
            yield slice(start, start + step * length), step
            start += step * length
