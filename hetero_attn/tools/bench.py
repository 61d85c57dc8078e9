"""Measured speed of a loaded model beside what its plan predicted and what the machine's memory allows.

Rows are named as llama-bench names them: `pp512` computes a prompt of 512 tokens, `tg128` generates 128 one at a
time, `@ d4096` after that many tokens are in the cache. On the CPU alone the ceiling of a decode row is the DRAM's read
bandwidth over the bytes that a token must read, and a prompt, which depends on arithmetic, has only its prediction.
With a GPU the ceiling is what the plan's busiest lane (GPU, PCIe, CPU cores, DRAM) allows at its measured rate if it
never waits.

The tokens of a depth are random keys and values, stored without computing a prompt: what attention costs depends on how
many there are and not on what they say.
"""

import io
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console

from hetero_attn.engine.engine import Engine
from hetero_attn.engine.greatest import greatest
from hetero_attn.engine.lane_report import ExpertCounts
from hetero_attn.engine.timed_steps import decode_terms, fill, prefill_terms
from hetero_attn.llm import LLM
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.tools.terms import Term, compare_terms, term_lines
from placement.cost.model import predict
from placement.plan.columns import Column, fitting_table
from placement.plan.phase import PhaseCost
from placement.plan.warm import expert_slot_hits
from placement.plan.words import cpu_threads, wrapped

EMULATED_NOTE = (
    "an emulated GPU is no GPU: `predicted` is for its invented rates, and no error against them means anything"
)
DEPTH_NOTE = "@ dN: on top of N tokens in the cache, random keys and values that no prompt computed"


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One figure. tokens_per_s: median, least and most over the repetitions.

    bytes_per_token: weights and cache that one generated token reads, None for prompts. ceiling_tokens_per_s: on the
    CPU alone the DRAM's read bandwidth over those bytes, None for prompts; with a GPU what the busiest lane of the plan
    allows
    when it never waits. predicted_tokens_per_s: by the plan. terms: of one generated token or of the whole prompt.
    expert_hits: shares of a generated token's picks in expert slots, predicted and measured; None without any.
    """

    name: str
    tokens_per_s: float
    least: float
    most: float
    predicted_tokens_per_s: float
    bytes_per_token: int | None
    ceiling_tokens_per_s: float | None
    terms: tuple[Term, ...] = ()
    expert_hits: tuple[float, float] | None = None

    @property
    def achieved_bytes_per_s(self) -> float | None:
        """Bytes read a second at the median speed."""
        return None if self.bytes_per_token is None else self.bytes_per_token * self.tokens_per_s

    @property
    def prediction_error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_tokens_per_s / self.tokens_per_s - 1


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Every row of a run and what it ran on. max_batch: sequences that the plan has room for; one was measured."""

    model: str
    weight_dtype: str
    device: str
    num_threads: int
    hardware: str
    rows: tuple[BenchRow, ...]
    max_batch: int = 1

    def table(self, width: int = 120) -> str:
        """Plain text for people; a table has the columns that have room, `to_dict` all."""
        console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
        console.print(fitting_table(_columns(self.rows), width))
        where = f"on {self.device}, {cpu_threads(self.num_threads)}"
        notes = [EMULATED_NOTE] * self.device.startswith("emulated") + [DEPTH_NOTE] * self.has_depth
        if self.max_batch > 1:
            notes.append(f"one sequence was measured, with the plan for {self.max_batch} together")
        lines = [*notes, *(line for row in self.rows for line in term_lines(row.name, row.terms))]
        for row in self.rows:
            if row.expert_hits is not None:
                predicted, measured = row.expert_hits
                lines.append(f"{row.name}: {measured:.0%} of the picks in expert slots, predicted {predicted:.0%}")
        head = wrapped(f"{self.model} {self.weight_dtype} {where}; rates of {self.hardware}", width)
        return f"{head}\n{console.file.getvalue()}" + "".join(f"{wrapped(line, width)}\n" for line in lines)

    @property
    def has_depth(self) -> bool:
        """Whether any row ran on top of tokens already in the cache."""
        return any("@" in row.name for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        values = asdict(self)
        for row, fields in zip(self.rows, values["rows"], strict=True):
            fields |= {
                "achieved_bytes_per_s": row.achieved_bytes_per_s,
                "prediction_error": row.prediction_error,
                "terms": [term.to_dict() for term in row.terms],
            }
        return values


def run(
    llm: LLM, prompt_tokens: int = 512, gen_tokens: int = 128, depths: Sequence[int] = (0,), repetitions: int = 3
) -> BenchReport:
    """Measure prefill and decode at each depth; every row is warmed up once and is the median of `repetitions` runs.

    Raises PromptError when depth and test do not fit the plan's context.
    """
    for depth in depths:
        llm.check_context(depth + max(prompt_tokens, gen_tokens + 1))
    return measure(llm.planned, llm.engine, prompt_tokens, gen_tokens, depths, repetitions)


def measure(
    planned: PlannedModel,
    engine: Engine,
    prompt_tokens: int,
    gen_tokens: int,
    depths: Sequence[int] = (0,),
    repetitions: int = 3,
) -> BenchReport:
    """As `run`, for an engine without an LLM around it."""
    rows: list[BenchRow] = []
    for depth in depths:
        with _Bench(planned, engine, depth) as bench:
            if prompt_tokens:
                rows.append(bench.row(f"pp{prompt_tokens}", prompt_tokens, bench.prefill, repetitions, "prefill"))
            if gen_tokens:
                rows.append(bench.row(f"tg{gen_tokens}", gen_tokens, bench.decode, repetitions, "decode"))
    plan = planned.plan
    device = plan.device
    if engine.lanes.device is not None:
        device = f"{device} (hand-over: {engine.lanes.handover.name})"
    return BenchReport(
        plan.model,
        plan.workload.weight_dtype,
        device,
        plan.num_threads,
        planned.hardware.name,
        tuple(rows),
        plan.max_batch,
    )


def _columns(rows: Sequence[BenchRow]) -> list[Column]:
    """The share of the ceiling, which two others tell, is left out first."""
    ceilings = [row.ceiling_tokens_per_s for row in rows]
    achieved = [row.achieved_bytes_per_s for row in rows]
    shares = [None if each is None else row.tokens_per_s / each for row, each in zip(rows, ceilings, strict=True)]
    return [
        Column("test", [row.name for row in rows], is_name=True),
        Column("tokens/s", [f"{row.tokens_per_s:.2f}" for row in rows]),
        Column("range", [f"{row.least:.2f}-{row.most:.2f}" for row in rows], spared=3),
        Column("GB/s", ["-" if each is None else f"{each / 1e9:.1f}" for each in achieved], spared=2),
        Column("ceiling", ["-" if each is None else f"{each:.2f}" for each in ceilings]),
        Column("share", ["-" if each is None else f"{each:.0%}" for each in shares], spared=1),
        Column("predicted", [f"{row.predicted_tokens_per_s:.2f}" for row in rows]),
        Column("error", [f"{row.prediction_error:+.0%}" for row in rows]),
    ]


class _Bench:
    """One sequence filled to a depth, to which each measurement returns."""

    def __init__(self, planned: PlannedModel, engine: Engine, depth: int) -> None:
        self._plan, self._hardware, self._engine, self._depth = planned.plan, planned.hardware, engine, depth
        generator = torch.Generator().manual_seed(0)
        self._token_ids = torch.randint(
            self._engine.config.vocab_size, (planned.plan.max_context,), generator=generator, device="cpu"
        ).tolist()

    def __enter__(self) -> "_Bench":
        self._sequence = self._engine.kv_cache.open()
        fill(self._engine, self._sequence, self._depth)
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.kv_cache.close(self._sequence)

    def prefill(self, tokens: int) -> None:
        """Compute a prompt of `tokens` tokens."""
        start = self._sequence.length
        for first in range(start, start + tokens, self._engine.prefill_chunk):
            last = min(first + self._engine.prefill_chunk, start + tokens)
            self._engine.prefill(self._sequence, self._token_ids[first:last], logits=last == start + tokens)

    def decode(self, tokens: int) -> None:
        """Generate `tokens` tokens, each chosen from the logits of the one before."""
        token_id = self._token_ids[0]
        with self._engine.lanes.torch_at_rest():
            for _ in range(tokens):
                token_id = greatest(self._engine.decode_step([self._sequence], [token_id], copy=False)[0])

    def row(self, name: str, tokens: int, work: Callable[[int], None], repetitions: int, phase: str) -> BenchRow:
        """Time `work(tokens)` and put prediction and ceiling beside it."""
        engine = self._engine
        work(min(tokens, 8))
        self._return()
        engine.report.reset()
        speeds = sorted(tokens / self._time(work, tokens) for _ in range(repetitions))
        spent, speed = engine.report.phases[phase], statistics.median(speeds)
        experts = engine.report.experts
        cost = self._predict(phase, tokens)
        read = self._bytes_per_token(tokens) if phase == "decode" else None
        hardware, on_cpu = self._hardware, self._plan.device == "cpu"
        if on_cpu:
            ceiling = hardware.dram_bytes_per_s / read if read else None
        else:
            ceiling = cost.rows / cost.busiest_s
        passes = spent.steps if phase == "decode" else repetitions
        terms = compare_terms(
            cost, self._terms(phase, cost), cost.rows / speed, spent.handover_s / max(1, passes), on_cpu
        )
        label = f"{name} @ d{self._depth}" if self._depth else name
        hits = self._expert_hits(experts, cost) if phase == "decode" and experts.steps else None
        return BenchRow(label, speed, speeds[0], speeds[-1], cost.tokens_per_s, read, ceiling, terms, hits)

    def _expert_hits(self, counts: ExpertCounts, cost: PhaseCost) -> tuple[float, float]:
        return expert_slot_hits(self._plan.workload, self._plan.linears, cost.batch_steps), counts.hit_rate

    def _terms(self, phase: str, cost: PhaseCost) -> Counter[str]:
        """Seconds of one step or prompt by kind of work, at the context of the prediction."""
        engine, seconds = self._engine, Counter[str]()
        if phase == "decode":
            fill(engine, self._sequence, cost.context - self._depth)
            seconds.update(decode_terms(engine, self._sequence, self._token_ids[0]))
        for start in range(0, cost.rows if phase == "prefill" else 0, engine.prefill_chunk):
            chunk = self._token_ids[start : min(start + engine.prefill_chunk, cost.rows)]
            seconds.update(prefill_terms(engine, self._sequence, chunk))
            self._sequence.length += len(chunk)
        self._return()
        return seconds

    def _time(self, work: Callable[[int], None], tokens: int) -> float:
        started = time.perf_counter()
        work(tokens)
        seconds = time.perf_counter() - started
        self._return()
        return seconds

    def _return(self) -> None:
        if not self._engine.kv_cache.rewind(self._sequence, self._depth):
            self._engine.kv_cache.close(self._sequence)
            self.__enter__()

    def _predict(self, phase: str, tokens: int) -> PhaseCost:
        plan, hardware = self._plan, self._hardware
        rows, context = (tokens, self._depth) if phase == "prefill" else (1, self._depth + tokens // 2)
        return predict(
            plan.workload,
            plan.linears,
            plan.kv,
            hardware,
            phase=phase,
            rows=rows,
            context=context,
            on_gpu=plan.device != "cpu",
        )

    def _bytes_per_token(self, tokens: int) -> int:
        workload, context = self._plan.workload, self._depth + tokens // 2
        cache = sum(shard.kv_heads * shard.bytes_per_token * shard.visible_tokens(context) for shard in workload.kv)
        return workload.weight_bytes + cache
