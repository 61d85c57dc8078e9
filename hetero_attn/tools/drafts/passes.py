"""Seconds of a pass by how many rows of one sequence it computes: the ceiling of what drafts can gain."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hetero_attn.engine.engine import Engine
from hetero_attn.engine.greatest import greatest
from hetero_attn.engine.timed_steps import fill
from hetero_attn.ops.step_rows import Rows
from hetero_attn.planning.settle import PlannedModel
from placement.cost.drafts import pass_s
from placement.plan.drafting import expected_tokens

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True, slots=True)
class PassTime:
    """A pass of so many rows: median seconds, choosing a token from each row included; the processors' seconds; and
    seconds by the plan."""

    rows: int
    seconds: float
    cpu_s: float
    predicted_s: float


def pass_times(
    planned: PlannedModel, engine: Engine, depth: int = 0, repetitions: int = 5, rows: Sequence[int] = ROWS
) -> tuple[PassTime, ...]:
    """Time passes of each number of rows, in turns, behind `depth` tokens; one row must be among them.

    What takes more rows than a pass may have is left out.
    """
    sequence = engine.kv_cache.open()
    spent: dict[int, list[tuple[float, float]]] = {count: [] for count in rows if count <= engine.most_single_rows}
    try:
        fill(engine, sequence, depth)
        for turn in range(repetitions + 2):  # the first two record each pass and bring it into the caches
            for count, times in spent.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                with engine.lanes.torch_at_rest():
                    (logits,) = engine.run([Rows(sequence, range(1, count + 1), count)], copy=False)
                    for row in logits:
                        greatest(row)
                if turn > 1:
                    times.append((time.perf_counter() - began, time.process_time() - cpu_began))
                engine.kv_cache.rewind(sequence, depth)
    finally:
        engine.kv_cache.close(sequence)
    return tuple(
        PassTime(
            rows=count,
            seconds=statistics.median(wall_s for wall_s, _ in times),
            cpu_s=statistics.median(cpu_s for _, cpu_s in times),
            predicted_s=pass_s(planned.plan, planned.hardware, count, depth + 1),
        )
        for count, times in spent.items()
    )


def ceiling(times: Iterable[PassTime], acceptance: float) -> float:
    """The most that drafts of this acceptance gain over plain decoding where they themselves cost nothing."""
    seconds = {each.rows: each.seconds for each in times}
    return max(expected_tokens(acceptance, rows) * seconds[1] / took for rows, took in seconds.items())
