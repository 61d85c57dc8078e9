"""Gated DeltaNet: attention whose memory of a sequence is a matrix a head, whatever its length.

    q, k, v, z = in(norm(residual)), b, a = gates norm(residual);   q, k, v = silu(convolution over time of each)
    g = -exp(a_log) softplus(a + dt_bias), strength = sigmoid(b);   o = gated delta rule, see `ops.delta`
    residual += out(rms_norm(o) * silu(z))

The linears are cut over the lanes; everything between them is computed by torch where the residual stream lives, and
each sequence's state lies there.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch.nn.functional import silu, softplus

from hetero_attn.models.block import Block, BlockWeights, FixedView, Norm, normed_linear
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.delta import DeltaTokens, gated_delta, one_token, short_convolution, unit_length
from hetero_attn.ops.linear import SplitInput, linear_add
from hetero_attn.ops.run import Run
from hetero_attn.spec.decoder.delta import DeltaDeclaration
from hetero_attn.spec.decoder.norms import NORMED


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
        gates = work.of(NORMED, self._config.hidden_size).main @ weights.vector("gates").main.T
        for rows, sequences in runs_of(run.step.sequence_ids.host.tolist()):
            parts = projected.main[rows], gates[rows], out.main[rows]
            self._mix(weights, state, rows, parts, sequences, lanes.device is None)
        column = 0 if lanes.device is None else self._delta.value_width
        linear_add(lanes, last, tier, SplitInput(out, column), work.residual, work.scratch)

    def _mix(
        self,
        weights: BlockWeights,
        state: FixedView,
        rows: slice,
        parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sequences: int,
        on_host: bool,
    ) -> None:
        """Rows of so many sequences, each the same number of tokens; parts: of these rows the projections, the gates
        and the output, which is written. on_host: whether the states are in host memory."""
        delta = self._delta
        projected, gates, out = (part.unflatten(0, (sequences, -1)) for part in parts)
        ids = state.sequence_ids[rows][:: out.shape[1]]
        # Of one sequence in host memory its own state, not a copy of it.
        is_own = sequences == 1 and on_host
        kept = state.values[int(ids[0])][None] if is_own else state.values.index_select(0, ids)
        matrices = kept[:, : self.matrix_size].view(sequences, delta.value_heads, delta.key_dim, delta.value_dim)
        inputs = kept[:, self.matrix_size :].view(sequences, delta.kernel - 1, delta.conv_width)
        units = projected.unflatten(-1, (delta.key_heads, -1))
        widths = [delta.rows_per_key_head(name) for name in ("delta_q", "delta_k", "delta_v", "delta_z")]
        *qkv, z = (part.flatten(2) for part in units[..., : sum(widths)].split(widths, -1))
        mixed, inputs = short_convolution(torch.cat(qkv, -1), inputs, weights.vector("conv").main)
        tokens = self._tokens(weights, silu(mixed), gates)
        if out.shape[1] == 1:
            mixed = one_token(tokens, matrices)
        else:
            mixed, matrices = gated_delta(tokens, matrices)
        if not is_own or out.shape[1] > 1:
            state.values[:, : self.matrix_size].index_copy_(0, ids, matrices.flatten(1))
        state.values[:, self.matrix_size :].index_copy_(0, ids, inputs.flatten(1))
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
        rates = weights.vector("a_log").main
        rates = rates if delta.has_rates else -rates.exp()
        decay = rates * softplus(a + weights.vector("dt_bias").main)
        heads = (q * delta.key_dim**-0.5, k, v.unflatten(-1, (delta.value_heads, -1)), decay, b.sigmoid())
        return DeltaTokens(*(part.transpose(1, 2) for part in heads))


def runs_of(sequence_ids: list[int]) -> Iterator[tuple[slice, int]]:
    """(rows, how many sequences they are of): single tokens of all sequences that have one, side by side, and each
    longer run of one sequence."""
    lengths = [len(list(each)) for _, each in groupby(sequence_ids)]
    start = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        step = count if length == 1 else 1
        for _ in range(count // step):
            yield slice(start, start + step * length), step
            start += step * length
