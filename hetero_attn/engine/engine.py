"""The one function that everything else serves: `run`, a forward pass over rows of any number of sequences.

    embed -> for each layer, for each of its blocks: block.forward -> logits      (`Forward`)

`prefill` and `decode_step` are a pass with one prompt's chunk, and one with the newest token of each sequence.
"""

from collections.abc import Sequence
from typing import NoReturn, SupportsIndex

import torch

from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.draft_head import fused, handed_on, kept_rows
from hetero_attn.engine.forward import Forward
from hetero_attn.engine.lane_report import LaneReport, counters
from hetero_attn.engine.move import go_over
from hetero_attn.engine.passes.buffers import Buffers
from hetero_attn.engine.passes.taken_drafts import TakenDrafts
from hetero_attn.errors import EngineDeadError
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.decoder import ModelWeights
from hetero_attn.ops.expert_slot_keeper import SlotKeeper
from hetero_attn.ops.step import Step, make_step, most_lines
from hetero_attn.ops.step_rows import Rows
from hetero_attn.ops.streamed_expert_keeper import StreamKeeper
from hetero_attn.spec.config import ModelConfig
from placement.plan.heat import ExpertHeat
from placement.plan.plan import Plan


class Engine:
    """Runs a model's forward passes over the lanes by a plan. One thread at a time may use it.

    report: where the time of its steps went. forward: what computes a step. replay: record decode steps where the lanes
    can, and replay them; the plain path computes the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        weights: ModelWeights,
        lanes: Lanes,
        kv_cache: KVCache,
        buffers: Buffers,
        replay: bool = True,
    ) -> None:
        self.config = config
        self.plan = plan
        self.lanes = lanes
        self.kv_cache = kv_cache
        self.report = LaneReport()
        self.weights = weights
        self._expert_slots = SlotKeeper(lanes)
        self._expert_slots.open(weights.linears, plan)
        self._streamed_experts = StreamKeeper(lanes, self._expert_slots)
        self._streamed_experts.open(weights.linears, plan)
        self.forward = Forward(config, weights, lanes, kv_cache, buffers, self._streamed_experts, replay)
        kv_cache.states.take_in = TakenDrafts(lanes, weights, self.forward, kv_cache.states)
        self._rows = buffers.rows
        self._first_rows: dict[int, int] = {}  # of the last step, by sequence

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"the loaded model {self.plan.model} cannot be copied or pickled, for its threads and memory are this "
            "process's; load it where it is wanted"
        )

    @property
    def prefill_chunk(self) -> int:
        """The most prompt tokens that one step computes."""
        return min(self._rows, self.kv_cache.max_new_tokens)

    def chunk_rows(self, beside: int = 0) -> int:
        """The most rows of prompts that one step computes beside so many that attend one by one."""
        return min(self._rows - beside, self.kv_cache.max_new_tokens)

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
        return min(self.prefill_chunk, self.most_lines, self.forward.logits_rows)

    def _pass(self, work: Sequence[Rows], copy: bool) -> torch.Tensor:
        """`run`, of rows in the order of a step; returns the logits of all that want some, one after the other."""
        with self.lanes.torch_at_rest():
            self.kv_cache.states.settle()
            before = counters(self.lanes)
            step = self.forward.renewed(work)
            if step is None:
                step, logits = self._plain_pass(work, copy)
            else:
                logits = self.forward.replayed(step, work, copy)
            after = counters(self.lanes)
        self._first_rows, row = {}, 0
        for each in work:
            if step.has_drafts:
                self.kv_cache.states.drafted(each.sequence.id, row + 1, len(each.token_ids) - 1)
            self._first_rows[each.sequence.id], row = row, row + len(each.token_ids)
            each.sequence.length += len(each.token_ids)
        self.report.count(_counts(work), row, before, after)
        return logits

    @torch.inference_mode()
    def _plain_pass(self, work: Sequence[Rows], copy: bool) -> tuple[Step, torch.Tensor]:
        if not work[-1].is_chunk or self._streamed_experts.knows_nothing:
            self.forward.drain()
        if not self.forward.is_running:
            self.report.streamed(self._streamed_experts.note())
            self._expert_slots.settle()
        step = make_step(self.lanes, self.kv_cache, work)
        self.forward.run(step, _hidden(work))
        logits = self.forward.logits(step, work, copy)
        if not self.forward.is_running:
            self.report.routed(*self._expert_slots.note(step.rows))
            self.report.streamed(self._streamed_experts.note())
        return step, logits

    def prefill(self, sequence: SequenceState, token_ids: Sequence[int], logits: bool = True) -> torch.Tensor | None:
        """Append a prompt to a sequence, one chunk; returns the last token's logits, float32 [vocab_size].

        token_ids: at most `prefill_chunk`. The result is the caller's own; None with logits=False, for a chunk that is
        not the last, as in `run`.
        """
        rows = self._pass([Rows(sequence, token_ids, int(logits), is_chunk=True)], True)
        return rows[0] if logits else None

    def prefill_logits(self, sequence: SequenceState, token_ids: Sequence[int]) -> torch.Tensor:
        """As `prefill`, but returns the logits of every token, float32 [len(token_ids), vocab_size]."""
        return self._pass([Rows(sequence, token_ids, len(token_ids), is_chunk=True)], True)

    def decode_step(
        self, sequences: Sequence[SequenceState], token_ids: Sequence[int], copy: bool = True
    ) -> torch.Tensor:
        """Append one token to each sequence; returns their logits, float32 [len(sequences), vocab_size].

        copy: as in `run`.
        """
        pairs = zip(sequences, token_ids, strict=True)
        return self._pass([Rows(sequence, (token_id,)) for sequence, token_id in pairs], copy)

    @torch.inference_mode()
    def kept(self, sequence: SequenceState, rows: int) -> torch.Tensor:
        """What is handed to a head that drafts, of the first `rows` rows of a sequence in the last step: float32
        [rows, taps * hidden_size], the caller's own. Only of a model that was planned with taps."""
        first = self._first_rows[sequence.id]
        self.forward.drain()
        return kept_rows(self.weights.spec, self.forward.work, first, first + rows)

    @torch.inference_mode()
    def fused(self, taken: torch.Tensor) -> torch.Tensor:
        """`draft_head.fused`, of a head that drafts; at most `prefill_chunk` rows."""
        self.forward.drain()
        with self.forward.guard, self.lanes.torch_at_rest():
            return fused(self.lanes, self.weights, taken, self.forward.work.rows(0, taken.shape[0]))

    @torch.inference_mode()
    def handed_on(self, rows: int) -> torch.Tensor:
        """`draft_head.handed_on`, of a head's last step, whose rows attended one by one."""
        eps = self.config.rms_norm_eps if self.config.eagle.norm_output else 0.0
        return handed_on(self.lanes, self.weights, rows, eps, self.forward.work)

    def recut(self, plan: Plan) -> None:
        """Take over the stream/cpu boundaries of a plan that is the present one otherwise; between two steps."""
        self.lanes.finish()
        for weights, placement in zip(self.weights.linears, plan.linears, strict=True):
            assert weights.placement.gpu_units == placement.gpu_units, f"{placement.name}: its home would move"
            weights.placement = placement
        self._streamed_experts.open(self.weights.linears, plan)
        self.forward.forget_captured()
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
                self.forward.guard.fault = f"{type(error).__name__}: {error}"
                raise EngineDeadError(self._dead_message) from error
            raise
        self.plan = plan

    def _go_over(self, plan: Plan) -> None:
        with self.lanes.torch_at_rest():
            go_over(self.lanes, self.weights.linears, self.kv_cache, self._expert_slots, plan)
            self._streamed_experts.open(self.weights.linears, plan)
        self.forward.forget_captured()

    def expert_heats(self) -> dict[str, ExpertHeat]:
        """How warm experts were while this ran, by the name of their linear; see `SlotKeeper.heats`."""
        return self._expert_slots.heats()

    def check_alive(self) -> None:
        """Raise EngineDeadError if a move between plans failed and could not be undone."""
        if self.forward.guard.fault is not None:
            raise EngineDeadError(self._dead_message)

    @property
    def _dead_message(self) -> str:
        return f"{self.plan.model}: the engine is unusable after {self.forward.guard.fault}; close it and load it again"

    def close(self) -> None:
        """Release lanes, threads and buffers; idempotent."""
        self.lanes.close()


def _hidden(work: Sequence[Rows]) -> torch.Tensor | None:
    """What stands beside the tokens of a step of a head, one row after the other."""
    if work[0].hidden is None:
        return None
    return work[0].hidden if len(work) == 1 else torch.cat([each.hidden for each in work])


def _counts(work: Sequence[Rows]) -> dict[str, int]:
    """Rows of a step by phase. A chunk whose every logit is asked for is in none: the head's work for it is no
    prompt's."""
    counts = {"prefill": 0, "decode": 0}
    for each in work:
        if not each.is_chunk:
            counts["decode"] += len(each.token_ids)
        elif each.logits <= 1:
            counts["prefill"] += len(each.token_ids)
    return counts
