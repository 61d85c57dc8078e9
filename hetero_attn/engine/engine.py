"""The one function that everything else serves: `run`, a forward pass over rows of any number of sequences.

    embed -> for each layer, for each of its blocks: block.forward -> logits

`prefill` and `decode_step` are a pass with one prompt's chunk, and one with the newest token of each sequence. Nothing
is allocated here that grows with the sequence: buffers and pages exist since the engine was made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.graph_replay import GraphReplay
from hetero_attn.engine.lane_report import LaneReport
from hetero_attn.engine.move import go_over
from hetero_attn.engine.replay import DecodeReplay
from hetero_attn.errors import EngineDeadError
from hetero_attn.lanes import observe
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.stopwatch import Stopwatch, time_recorded
from hetero_attn.models.block import FixedView, StateView
from hetero_attn.models.decoder import ModelWeights, capped, embed
from hetero_attn.models.workspace import Workspace, make_buffer, make_workspace
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.ops.run import KvView, Run
from hetero_attn.ops.step import Rows, Step, make_step, most_lines, older_blocks
from hetero_attn.spec.blocks import Declaration, FixedState, KvState, ModelSpec
from hetero_attn.spec.buffers import ActivationWidths
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.workload import LOGITS_ROWS
from placement.plan.plan import Plan
from placement.plan.workload import row_tier


class Engine:
    """Runs a model's forward passes over the lanes by a plan. One thread at a time may use it.

    report: where the time of its steps went. replay: record decode steps where the lanes can, and replay them; the
    plain path computes the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        weights: ModelWeights,
        lanes: Lanes,
        kv_cache: KVCache,
        buffers: "Buffers",
        replay: bool = True,
    ) -> None:
        self.config = config
        self.plan = plan
        self.lanes = lanes
        self.kv_cache = kv_cache
        self.report = LaneReport()
        self.weights = weights
        self._fault: str | None = None
        self._is_running = False
        self._passes_caller: dict[int, bool] = {}
        self._watch: Callable[[int, torch.Tensor], None] | None = None
        self._rows, self._work, self._logits = buffers
        self._records = all(block.records for block in weights.spec.blocks)
        self.replay = self._make_replay() if replay else None

    def _make_replay(self) -> DecodeReplay | GraphReplay | None:
        if self.lanes.device is None:
            return DecodeReplay(self.lanes.host_ops, self._decode)
        return GraphReplay(self.lanes, self._decode) if self.lanes.handover.captures else None

    @property
    def prefill_chunk(self) -> int:
        """The most prompt tokens that one step computes."""
        return min(self._rows, self.kv_cache.max_new_tokens)

    def chunk_rows(self, beside: int = 0) -> int:
        """The most rows of prompts that one step computes beside so many that attend one by one."""
        return min(self._rows - beside, self.kv_cache.max_new_tokens)

    @torch.inference_mode()
    def run(self, work: Sequence[Rows], copy: bool = True) -> list[torch.Tensor]:
        """Append tokens to sequences, all in one pass; returns the logits of each one's last `logits` tokens.

        work: each sequence once, in any order, as `check` allows: at most `chunk_rows` rows of chunks. A row sees what
        stands before it, so its logits are those of a pass of its own. Rows that turn out to be unwanted are taken back
        by `kv_cache.rewind`.

        Float32 [logits, vocab_size] each. copy=False: in the engine's own buffer where they fit, valid until its next
        step; copying a large batch's logits costs more than the layers' small operations together. Where no logits are
        wanted the head's weights are not read, and the GPU may still be at it when the next step is queued.
        """
        order = sorted(range(len(work)), key=lambda index: work[index].is_chunk)
        ordered = [work[index] for index in order]
        self.check(ordered)
        logits = self._pass(ordered, copy).split([each.logits for each in ordered])
        return [each for _, each in sorted(zip(order, logits, strict=True), key=lambda pair: pair[0])]

    def check(self, work: Sequence[Rows]) -> None:
        """Raise ValueError for rows that one step cannot compute."""
        sequences = {each.sequence.id for each in work}
        if not work or len(sequences) < len(work) or not all(each.token_ids for each in work):
            raise ValueError("a step takes at least one sequence, each once, with at least one token")
        rows = pages = lines = 0
        for each in work:
            count = len(each.token_ids)
            rows, lines = rows + count, lines + (1 if each.is_chunk else count)
            pages += self.kv_cache.new_pages(count) if count > 1 else 0
        most_pages = self.kv_cache.max_new_pages if pages else None
        limits = (
            (rows, self._rows, "rows"),
            (pages, pages if most_pages is None else most_pages, "new pages of the KV cache"),
            (
                lines,
                self.plan.max_batch if lines <= self.plan.max_batch else self.most_lines,
                "rows that attend one by one, and chunks",
            ),
        )
        for count, most, what in limits:
            if count > most:
                raise ValueError(f"a step of this engine takes at most {most} {what}, not {count}")

    @property
    def most_lines(self) -> int:
        """The most rows that attend one by one, and chunks, of one step."""
        return most_lines(self.lanes, self.kv_cache, self._rows)

    @property
    def most_single_rows(self) -> int:
        """The most rows that attend one by one in a step and may be several of a sequence, all with their logits."""
        return min(self.prefill_chunk, self.most_lines, self._logits_rows)

    def _pass(self, work: Sequence[Rows], copy: bool) -> torch.Tensor:
        """`run`, of rows in the order of a step; returns the logits of all that want some, one after the other."""
        token_ids = [token_id for each in work for token_id in each.token_ids]
        with self.report.measure(self.lanes, _counts(work), len(token_ids)), self.lanes.torch_at_rest():
            if not work[-1].is_chunk:
                self._drain()
            step = make_step(self.lanes, self.kv_cache, work)
            self._forward(step, token_ids)
            logits = self._logits_after(step, work, copy)
        for sequence, added, _, _ in work:
            sequence.length += len(added)
        return logits

    def _logits_after(self, step: Step, work: Sequence[Rows], copy: bool) -> torch.Tensor:
        if step.is_one_by_one:
            logits = self._capped(step.rows)
            if sum(each.logits for each in work) < step.rows:
                logits = logits[_wanted_rows(work)]
            return logits.clone() if copy else logits
        wanted = _wanted_rows(work)
        if not wanted:
            self._leave_running()
            return self._logits_view(0)
        start = self._gathered(wanted)
        pieces = range(start, start + len(wanted), self._logits_rows)
        stops = [min(piece + self._logits_rows, start + len(wanted)) for piece in pieces]
        if len(stops) == 1 and not copy:
            return self._logits_of(start, stops[0])
        return torch.cat([self._logits_of(*piece).clone() for piece in zip(pieces, stops, strict=True)])

    def _gathered(self, wanted: Sequence[int]) -> int:
        """Bring the residual's wanted rows side by side, where they are not; returns where the first one is."""
        if wanted[-1] - wanted[0] == len(wanted) - 1:
            return wanted[0]
        residual = self._work.residual.main
        with self._guarded():
            for place, row in enumerate(wanted):
                if place != row:
                    residual[place].copy_(residual[row])
        return 0

    @torch.inference_mode()
    def prefill(self, sequence: SequenceState, token_ids: Sequence[int], logits: bool = True) -> torch.Tensor | None:
        """Append a prompt to a sequence, one chunk; returns the last token's logits, float32 [vocab_size].

        token_ids: at most `prefill_chunk`. The result is the caller's own; None with logits=False, for a chunk that is
        not the last, as in `run`.
        """
        rows = self._pass([Rows(sequence, token_ids, int(logits), is_chunk=True)], True)
        return rows[0] if logits else None

    @torch.inference_mode()
    def prefill_logits(self, sequence: SequenceState, token_ids: Sequence[int]) -> torch.Tensor:
        """As `prefill`, but returns the logits of every token, float32 [len(token_ids), vocab_size]."""
        return self._pass([Rows(sequence, token_ids, len(token_ids), is_chunk=True)], True)

    @torch.inference_mode()
    def decode_step(
        self, sequences: Sequence[SequenceState], token_ids: Sequence[int], copy: bool = True
    ) -> torch.Tensor:
        """Append one token to each sequence; returns their logits, float32 [len(sequences), vocab_size].

        copy: as in `run`.
        """
        pairs = zip(sequences, token_ids, strict=True)
        return self._pass([Rows(sequence, (token_id,)) for sequence, token_id in pairs], copy)

    @torch.inference_mode()
    def fill(self, sequence: SequenceState, tokens: int) -> None:
        """Append tokens with random keys and values, nothing computed: a long context in seconds, for measurements."""
        with self.lanes.torch_at_rest():
            self._drain()
            for name in dict.fromkeys(block.stored for block in self.weights.spec.blocks if block.stored):
                self._work.randomise(name)
        stop = sequence.length + tokens
        while sequence.length < stop:
            rows = min(self.prefill_chunk, stop - sequence.length)
            with self._guarded(), self.lanes.torch_at_rest():
                chunk = Rows(sequence, range(rows), 0, is_chunk=True)
                self._store_rows(make_step(self.lanes, self.kv_cache, [chunk]))
            sequence.length += rows

    def _store_rows(self, step: Step) -> None:
        """Store random keys and values in every layer, as if the layers had computed them."""
        work, run = self._work.rows(0, step.rows), Run(self.lanes, step)
        for blocks, weights in zip(self.weights.spec.layers, self.weights.layers, strict=True):
            for block, of_block in zip(blocks, weights, strict=True):
                if isinstance(block.state, KvState):
                    block.store(run, of_block, self.state_of(block, step), work)
        self.lanes.finish()

    @torch.inference_mode()
    def decode_terms(self, sequence: SequenceState, token_id: int) -> dict[str, float]:
        """Seconds of the next decode step by kind of work (placement.plan.phase.TERMS), each by itself.

        The sequence does not grow; the step's KV entries and activations are left with values of no meaning.
        """
        self._drain()
        step = make_step(self.lanes, self.kv_cache, [Rows(sequence, [token_id])])
        if self.lanes.device is not None or self.replay is None:
            stopwatch = Stopwatch()
            with self.lanes.torch_at_rest(), observe.watched(self.lanes, stopwatch):
                self._forward(step, [token_id])
            return stopwatch.seconds

        def replay_of(term: str | None) -> Callable[[], None]:
            replay = DecodeReplay(self.lanes.host_ops, self._decode)
            with observe.only(self.lanes, term):
                replay.run(step)
            return lambda: replay.run(step)

        with self.lanes.torch_at_rest():
            return time_recorded(replay_of)

    @torch.inference_mode()
    def prefill_terms(self, sequence: SequenceState, token_ids: Sequence[int]) -> dict[str, float]:
        """As `decode_terms`, of a prompt of at most `prefill_chunk` tokens with the logits of its last one."""
        self._drain()
        stopwatch = Stopwatch()
        with self.lanes.torch_at_rest(), observe.watched(self.lanes, stopwatch):
            step = make_step(self.lanes, self.kv_cache, [Rows(sequence, token_ids, is_chunk=True)])
            self._forward(step, token_ids)
            self._logits_of(step.rows - 1, step.rows)
        return stopwatch.seconds

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

    def recut(self, plan: Plan) -> None:
        """Take over the stream/cpu boundaries of a plan that is the present one otherwise; between two steps."""
        self.lanes.finish()
        for weights, placement in zip(self.weights.linears, plan.linears, strict=True):
            assert weights.placement.gpu_units == placement.gpu_units, f"{placement.name}: its home would move"
            weights.placement = placement
        self._forget_captured()
        self.plan = plan

    def move(self, plan: Plan) -> None:
        """Go over to another plan of an elastic model between two steps; open sequences keep every token.

        What fails half-way is undone and raised; if even that fails the engine is dead and says so from then on.
        """
        try:
            self._go_over(plan)
        except BaseException as error:
            try:
                self._go_over(self.plan)
            except BaseException:
                self._fault = f"{type(error).__name__}: {error}"
                raise EngineDeadError(self._dead_message) from error
            raise
        self.plan = plan

    def _go_over(self, plan: Plan) -> None:
        with self.lanes.torch_at_rest():
            go_over(self.lanes, self.weights.linears, self.kv_cache, plan)
        self._forget_captured()

    def _forget_captured(self) -> None:
        self._passes_caller.clear()
        if isinstance(self.replay, GraphReplay):
            self.replay.forget()

    def check_alive(self) -> None:
        """Raise EngineDeadError if a move between plans failed and could not be undone."""
        if self._fault is not None:
            raise EngineDeadError(self._dead_message)

    @property
    def _dead_message(self) -> str:
        return f"{self.plan.model}: the engine is unusable after {self._fault}; close it and load it again"

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Around the work of a step: one that fails leaves nothing behind, one whose lanes are stuck is the last."""
        try:
            with self.lanes.given_up_on_error():
                yield
        except EngineDeadError as error:
            self._fault = f"{type(error).__name__}: {error}"
            raise

    def close(self) -> None:
        """Release lanes, threads and buffers; idempotent."""
        self.lanes.close()

    def _forward(self, step: Step, token_ids: Sequence[int]) -> None:
        """Embed and run the layers; a step without a chunk goes on to the logits of all its rows."""
        lanes, weights, is_one_by_one = self.lanes, self.weights, step.is_one_by_one
        with self._guarded():
            if is_one_by_one:
                self.kv_cache.wait_for_moves()
            ids = torch.tensor(token_ids, device="cpu")
            embed(lanes, weights, ids, self._work.residual.rows(0, step.rows))
            lanes.inputs_queued()
            with lanes.main_lane():
                if not is_one_by_one:
                    if lanes.pages is not None:
                        lanes.pages.announce(older_blocks(self.kv_cache, step, lanes.pages.block_pages))
                    self._announce(weights.layer_linears, step.tier)
                    self._layers(step)
                elif self._can_replay(step.tier):
                    self.replay.run(step)
                else:
                    self._decode(step)
            if is_one_by_one:
                self._finish()

    def _can_replay(self, tier: int) -> bool:
        """Whether a step of this tier may be recorded; weights that could not be page-locked matter where they
        stream."""
        if self.replay is None or not self._records or not self.lanes.can_replay or self._watch is not None:
            return False
        if tier not in self._passes_caller:
            ring = self.lanes.ring
            pieces = (piece for linear in self.weights.linears for piece in linear.pieces(tier))
            self._passes_caller[tier] = ring is not None and any(map(ring.passes_caller, pieces))
        return not self._passes_caller[tier]

    def _announce(self, linears: Sequence[LinearWeights], tier: int) -> None:
        if self.lanes.ring is not None:
            self.lanes.ring.announce(piece for linear in linears for piece in linear.pieces(tier))

    def _decode(self, step: Step) -> None:
        self._announce(self.weights.linears, step.tier)
        self._layers(step)
        self._project(0, step.rows)

    def _layers(self, step: Step) -> None:
        run, work, spec = Run(self.lanes, step), self._work.rows(0, step.rows), self.weights.spec
        for index, (blocks, weights) in enumerate(zip(spec.layers, self.weights.layers, strict=True)):
            self.lanes.begin_layer()
            self._show(index, work)
            for block, of_block in zip(blocks, weights, strict=True):
                block.forward(run, of_block, self.state_of(block, step), work)
        self._show(len(spec.layers), work)

    def state_of(self, block: Declaration, step: Step) -> StateView:
        """What the block keeps of the step's sequences."""
        if isinstance(block.state, KvState):
            index, place = self.kv_cache.places[block.layer]
            return KvView(self.kv_cache.pools[index], place, step.pools[index])
        if isinstance(block.state, FixedState):
            return FixedView(self.kv_cache.states[block.layer], step.sequence_ids.main)
        return None

    def _show(self, layer: int, work: Workspace) -> None:
        if self._watch is None:
            return
        self.lanes.settle_device()
        self._watch(layer, work.residual.main[:, : self.config.hidden_size])

    def _project(self, start: int, stop: int) -> None:
        """Logits of rows [start, stop) of the residual into the first rows of the logits buffer."""
        weights, out = self.weights, self._logits.rows(0, stop - start)
        weights.spec.head.project(self.lanes, weights.head, self._work.rows(start, stop), out)

    def _logits_of(self, start: int, stop: int) -> torch.Tensor:
        """Logits of rows [start, stop) of the residual, in the engine's own buffer."""
        with self._guarded():
            self._announce(tuple(self.weights.head.linears.values()), row_tier(stop - start))
            with self.lanes.main_lane():
                self._project(start, stop)
            self._finish()
        return self._capped(stop - start)

    def _leave_running(self) -> None:
        """The host's part of a chunk is done, and has not failed; the GPU's runs on while the next chunk is
        prepared."""
        with self._guarded():
            self.lanes.join()
        self._is_running = True

    def _drain(self) -> None:
        """Wait for a chunk that was left running."""
        if self._is_running:
            with self._guarded():
                self._finish()

    def _finish(self) -> None:
        self._is_running = False
        self.lanes.finish()

    @property
    def _logits_rows(self) -> int:
        return self._logits.main.shape[0]

    def _capped(self, rows: int) -> torch.Tensor:
        """The rows of logits that were computed, under the model's soft cap if it has one."""
        return capped(self._logits_view(rows), self.config.logit_cap)

    def _logits_view(self, rows: int) -> torch.Tensor:
        return self._logits.host[:rows, : self.config.vocab_size]


def _counts(work: Sequence[Rows]) -> dict[str, int]:
    """Rows of a step by phase. A chunk whose every logit is asked for is in none: the head's work for it is no
    prompt's."""
    counts = {"prefill": 0, "decode": 0}
    for _, token_ids, logits, is_chunk in work:
        if not is_chunk:
            counts["decode"] += len(token_ids)
        elif logits <= 1:
            counts["prefill"] += len(token_ids)
    return counts


def _wanted_rows(work: Sequence[Rows]) -> list[int]:
    """Which rows of a step logits are wanted of, in their order."""
    wanted, stop = [], 0
    for each in work:
        stop += len(each.token_ids)
        wanted += range(stop - each.logits, stop)
    return wanted


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
