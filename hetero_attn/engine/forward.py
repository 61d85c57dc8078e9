"""A step over the lanes: embed, for each layer each of its blocks, and the logits of the rows that want them.

Nothing is allocated here that grows with the sequence: buffers and pages exist since the engine was made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from hetero_attn.cache.cache import KVCache
from hetero_attn.engine.draft_head import enter, keep
from hetero_attn.engine.passes.buffers import Buffers
from hetero_attn.engine.passes.guard import Guard
from hetero_attn.engine.replays.graph_replay import GraphReplay
from hetero_attn.engine.replays.replay import DecodeReplay
from hetero_attn.lanes.activation import before
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.block import FixedView, StateView
from hetero_attn.models.decoder import ModelWeights, capped, embed
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.ops.older_pages import older_blocks
from hetero_attn.ops.run import KvView, Run
from hetero_attn.ops.step import Step
from hetero_attn.ops.step_rows import Rows, wanted_rows
from hetero_attn.ops.streamed_expert_keeper import StreamKeeper
from hetero_attn.spec.blocks import Declaration, FixedState, KvState
from hetero_attn.spec.config import ModelConfig
from placement.plan.workload import row_tier


class Forward:
    """Computes steps of a model with its weights and its cache, in buffers of its own.

    streamed_experts: chooses what a step streams of them. replay: record decode steps where the lanes can, and replay
    them; the plain path computes the same. guard: around everything that computes. is_running: whether the GPU may
    still be at a chunk.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        lanes: Lanes,
        kv_cache: KVCache,
        buffers: Buffers,
        streamed_experts: StreamKeeper,
        replay: bool = True,
    ) -> None:
        self.work = buffers.work
        self.guard = Guard(lanes)
        self._config = config
        self._logit_rows = weights.spec.head.rows_of(config)
        self._weights = weights
        self._lanes = lanes
        self._kv_cache = kv_cache
        self._streamed_experts = streamed_experts
        self._logits = buffers.logits
        self._logits_views: dict[int, torch.Tensor] = {}
        self.is_running = False
        self._passes_caller: dict[int, bool] = {}
        self._watch: Callable[[int, torch.Tensor], None] | None = None
        self._records = all(block.records for block in weights.spec.blocks)
        self.replay = self._make_replay() if replay else None

    def _make_replay(self) -> DecodeReplay | GraphReplay | None:
        if self._lanes.device is None:
            return DecodeReplay(self._lanes.host_ops, self._decode_tokens if self._embeds_first else self.decode)
        return GraphReplay(self._lanes, self.decode) if self._lanes.handover.captures else None

    @property
    def logits_rows(self) -> int:
        """The most rows of logits that are computed at once."""
        return self._logits.main.shape[0]

    @property
    def _embeds_first(self) -> bool:
        """Whether a recorded step begins with its tokens."""
        return self._lanes.device is None and self._weights.fusion is None

    def renewed(self, work: Sequence[Rows]) -> Step | None:
        """In the place of `make_step`, in a fifth of its time: a step recorded from its tokens on, with this work in
        it; None where there is none for it."""
        if not isinstance(self.replay, DecodeReplay) or not self._embeds_first or work[-1].is_chunk:
            return None
        rows = sum([len(each.token_ids) for each in work])
        return self.replay.renewed(self._kv_cache, work, rows) if self.can_replay(row_tier(rows)) else None

    def replayed(self, step: Step, work: Sequence[Rows], copy: bool) -> torch.Tensor:
        """Run a step that was `renewed` with this work; returns what `logits` does. Nothing here is torch's, each of
        whose calls costs some ten microseconds after a pass over all weights."""
        with self.guard, self._lanes.main_lane():
            self.replay.run(step)
        return self._single_rows(step, work, copy)

    def run(self, step: Step, hidden: torch.Tensor | None = None) -> None:
        """Embed and run the layers; a step without a chunk goes on to the logits of all its rows.

        hidden: of a head that drafts what stands beside each token, as in `draft_head.enter`.
        """
        lanes, is_one_by_one = self._lanes, step.is_one_by_one
        is_replayed = is_one_by_one and self.can_replay(step.tier)
        is_captured = self._is_captured(step.tier)
        with self.guard:
            if is_one_by_one:
                self._kv_cache.wait_for_moves()
            self._streamed_experts.settle(step.tier, is_captured)
            if not (is_replayed and self._embeds_first):
                self._embed(step, hidden)
            with lanes.main_lane():
                if not is_one_by_one:
                    if lanes.pages is not None:
                        lanes.pages.announce(older_blocks(self._kv_cache, step, lanes.pages.block_pages))
                    self._announce(self._weights.layer_linears, step.tier)
                    self.layers(step)
                elif is_replayed:
                    self.replay.run(step)
                else:
                    self.decode(step)
            self._streamed_experts.ran(step.tier, step.rows, is_captured)
            if is_one_by_one:
                self._finish()

    def _embed(self, step: Step, hidden: torch.Tensor | None) -> None:
        lanes, weights = self._lanes, self._weights
        if weights.fusion is None:
            embed(lanes, weights, step.token_ids, self.work.residual.rows(0, step.rows))
        else:
            enter(lanes, weights, step.token_ids, hidden, self.work.rows(0, step.rows))
        lanes.inputs_queued()

    def can_replay(self, tier: int) -> bool:
        """Whether a step of this tier may be recorded; weights that could not be page-locked matter where they
        stream."""
        if self.replay is None or not self._records or not self._lanes.can_replay or self._watch is not None:
            return False
        if tier not in self._passes_caller:
            ring = self._lanes.ring
            pieces = (piece for linear in self._weights.linears for piece in linear.pieces(tier))
            self._passes_caller[tier] = ring is not None and any(map(ring.passes_caller, pieces))
        return not self._passes_caller[tier]

    def _is_captured(self, tier: int) -> bool:
        """Whether copies of a step of this tier were captured, to be made again from where they were made."""
        return isinstance(self.replay, GraphReplay) and self.replay.has_captured(tier)

    def forget_captured(self) -> None:
        """Capture steps anew; after weights or caches have moved."""
        self._passes_caller.clear()
        if isinstance(self.replay, GraphReplay):
            self.replay.forget()

    def _decode_tokens(self, step: Step) -> None:
        self._embed(step, None)
        self.decode(step)

    def decode(self, step: Step) -> None:
        """Queue a step's layers, and the logits of all its rows, whose embedded rows are on their way."""
        self._announce(self._weights.step_linears, step.tier)
        self.layers(step)
        self._project(0, step.rows)

    def layers(self, step: Step) -> None:
        """Queue every block of every layer."""
        run, work, spec = Run(self._lanes, step), self.work.rows(0, step.rows), self._weights.spec
        for index, (blocks, weights) in enumerate(zip(spec.layers, self._weights.layers, strict=True)):
            self._lanes.begin_layer()
            self._show(index, work)
            keep(self._lanes, spec, index, work)
            for block, of_block in zip(blocks, weights, strict=True):
                block.forward(run, of_block, self.state_of(block, step), work)
        self._show(len(spec.layers), work)
        keep(self._lanes, spec, len(spec.layers), work)

    def state_of(self, block: Declaration, step: Step) -> StateView:
        """What the block keeps of the step's sequences."""
        if isinstance(block.state, KvState):
            index, place = self._kv_cache.places[block.layer]
            return KvView(self._kv_cache.pools[index], place, step.pools[index])
        if isinstance(block.state, FixedState):
            states, keep = self._kv_cache.states, partial(self._kv_cache.prefix_states.keep, block.layer)
            drafts = states.rows_of_drafts(block.layer, 0, step.rows) if step.has_drafts else None
            return FixedView(states[block.layer], step.sequence_ids.main, keep, drafts, states.spare)
        return None

    def randomise(self) -> None:
        """Fill what `store` writes to the cache with random numbers."""
        for name in dict.fromkeys(block.stored for block in self._weights.spec.blocks if block.stored):
            self.work.randomise(name)

    def store(self, step: Step) -> None:
        """Store what the buffers hold as a step's keys and values in every layer, as if layers had computed it."""
        work, run = self.work.rows(0, step.rows), Run(self._lanes, step)
        for block, weights in self._weights.blocks:
            if isinstance(block.state, KvState):
                block.store(run, weights, self.state_of(block, step), work)
        self._lanes.finish()

    @contextmanager
    def watched_layers(self, watch: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
        """Within this, `watch(layer, residual)` sees the residual before every layer, and after the last one.

        residual: float32 [rows, hidden_size] where the residual stream lives, complete; what `watch` writes into it is
        what the layer reads. Steps take the plain path.
        """
        before, self._watch = self._watch, watch
        try:
            yield
        finally:
            self._watch = before

    def logits(self, step: Step, work: Sequence[Rows], copy: bool) -> torch.Tensor:
        """The logits of a step that was run, of all rows that want some, one after the other.

        copy: as in `Engine.run`. Where none are wanted the GPU may still be at the step.
        """
        if step.is_one_by_one:
            return self._single_rows(step, work, copy)
        wanted = wanted_rows(work)
        if not wanted:
            self._leave_running()
            return self._logits_view(0)
        start = self._gathered(wanted)
        pieces = range(start, start + len(wanted), self.logits_rows)
        stops = [min(piece + self.logits_rows, start + len(wanted)) for piece in pieces]
        if len(stops) == 1 and not copy:
            return self.logits_of(start, stops[0])
        return torch.cat([self.logits_of(*piece).clone() for piece in zip(pieces, stops, strict=True)])

    def _single_rows(self, step: Step, work: Sequence[Rows], copy: bool) -> torch.Tensor:
        logits = self._capped(step.rows)
        if sum([each.logits for each in work]) < step.rows:
            logits = logits[wanted_rows(work)]
        return logits.clone() if copy else logits

    def _gathered(self, wanted: Sequence[int]) -> int:
        """Bring the residual's wanted rows side by side, where they are not; returns where the first one is."""
        if wanted[-1] - wanted[0] == len(wanted) - 1:
            return wanted[0]
        residual = self.work.residual.main
        with self.guard:
            for place, row in enumerate(wanted):
                if place != row:
                    residual[place].copy_(residual[row])
        return 0

    def logits_of(self, start: int, stop: int) -> torch.Tensor:
        """Logits of rows [start, stop) of the residual, in a buffer that the next step writes again."""
        with self.guard:
            self._announce(tuple(self._weights.head.linears.values()), row_tier(stop - start))
            with self._lanes.main_lane():
                self._project(start, stop)
            self._finish()
        return self._capped(stop - start)

    def drain(self) -> None:
        """Wait for a chunk that was left running."""
        if self.is_running:
            with self.guard:
                self._finish()

    def _leave_running(self) -> None:
        """The host's part of a chunk is done, and has not failed; the GPU's runs on while the next chunk is
        prepared."""
        with self.guard:
            self._lanes.join()
        self.is_running = True

    def _finish(self) -> None:
        self.is_running = False
        self._lanes.finish()

    def _announce(self, linears: Sequence[LinearWeights], tier: int) -> None:
        if self._lanes.ring is not None:
            self._lanes.ring.announce(piece for linear in linears for piece in linear.pieces(tier))

    def _show(self, layer: int, work: Workspace) -> None:
        if self._watch is None:
            return
        self._lanes.settle_device()
        self._watch(layer, work.residual.main[:, : self._config.hidden_size])

    def _project(self, start: int, stop: int) -> None:
        """Logits of rows [start, stop) of the residual into the first rows of the logits buffer."""
        weights, out = self._weights, self._logits.rows(0, stop - start)
        weights.spec.head.project(self._lanes, weights.head, self.work.rows(start, stop), out)

    def _capped(self, rows: int) -> torch.Tensor:
        """The rows of logits that were computed, under the model's soft cap if it has one."""
        return capped(self._logits_view(rows), self._config.logit_cap)

    def _logits_view(self, rows: int) -> torch.Tensor:
        if rows not in self._logits_views:
            self._logits_views[rows] = before(self._logits.host[:rows], self._logit_rows)
        return self._logits_views[rows]
