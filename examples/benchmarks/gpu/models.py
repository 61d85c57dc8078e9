"""Whole models of `gpu_offload.py`: decode and prompts by a plan, and where their time went."""

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .checkpoints import cap_bytes, checkpoint
from .rates import planning_profile
from .run import Run

CONTEXT, QUICK_CONTEXT = 1024, 128
# What long prompts want of a plan: no CPU work where many rows pass, and the GPU attends. A planner that looks at
# long prompts itself comes to the like.
FOR_PROMPTS = """
rules:
  - {match: "layers.*.kv", kv: {gpu_heads: all}}
  - {match: "*", tiers: {"65+": {cpu: 0}}}
"""
PLANS = {"auto": None, "prompts": FOR_PROMPTS}
DECODE_ATTEMPTS = 3
TIMELINE_SHARE = 0.75  # whose timelines are kept: little may come back from a lent machine


def model(shape: str, share: float, plan: str = "auto") -> Callable[[Run], dict[str, Any]]:
    """The model with `share` of the weights' bytes on the GPU, loaded anew, by one of PLANS; a line a figure."""

    def measure(run: Run) -> dict[str, Any]:
        name = f"model {shape} q4 {share:.0%} {plan}"
        started, path = time.monotonic(), checkpoint(run, shape)
        if run.has_gpu:
            torch.cuda.reset_peak_memory_stats()
        written = time.monotonic()
        with load(run, path, cap_bytes(shape, "q4", share, run.quick), plan) as llm:
            loaded = time.monotonic()
            run.write(f"{name}: loaded", checkpoint_s=written - started, load_s=loaded - written, **about(run, llm))
            for row, values in rows(run, llm):
                run.write(f"{name}: {row}", **values)
            peak = llm.engine.lanes.device.arena.peak_bytes
            used = {"arena_peak_bytes": peak, "used_bytes": run.used_bytes, "gpu_memory": llm.plan.gpu_memory_bytes}
            if run.has_gpu:
                used["reserved_bytes"] = torch.cuda.max_memory_reserved()
            run.write(f"{name}: memory", **used)
            return {"trace": _prompt_trace(run, llm, name, share == TIMELINE_SHARE)}

    return measure


def resize(shape: str, first: float, then: float) -> Callable[[Run], dict[str, Any]]:
    """A model that was loaded to be resized, moved to a smaller share; decode after it."""

    def measure(run: Run) -> dict[str, Any]:
        caps = [cap_bytes(shape, "q4", share, run.quick) for share in (first, then)]
        with load(run, checkpoint(run, shape), caps[0], "auto", elastic=True) as llm:
            started = time.monotonic()
            llm.resize(caps[1])
            return {"resize_s": time.monotonic() - started, **decode(run, llm)}

    return measure


def load(run: Run, path: Any, gpu_memory: int, plan: str, elastic: bool = False) -> Any:
    """An `LLM` of q4 weights for one sequence of the longest prompt."""
    from hetero_attn import LLM
    from placement import Policy

    text = PLANS[plan]
    return LLM(
        path,
        policy="auto" if text is None else Policy.parse(text, plan),
        gpu_memory=gpu_memory,
        dtype="q4",
        device=run.device,
        max_context=QUICK_CONTEXT if run.quick else 4097,
        max_batch=1,
        hardware=planning_profile(run),
        progress=False,
        elastic=elastic,
    )


def about(run: Run, llm: Any) -> dict[str, Any]:
    """The plan and what of it could not be had."""
    device = llm.engine.lanes.device
    return {
        "handover": llm.engine.lanes.handover.name,
        "shape": llm.plan.shape,
        "prefill_chunk": llm.plan.prefill_chunk,
        "refused_pins": sorted(device.refused_kinds),
        "plan": llm.plan.table(),
    }


def rows(run: Run, llm: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each figure when it is known: decode at the end of CONTEXT, prompts from their beginning."""
    yield "decode", decode(run, llm)
    for tokens in (64, 16) if run.quick else (4096, 512):
        yield f"pp{tokens}", prompt(run, llm, tokens)


def decode(run: Run, llm: Any) -> dict[str, Any]:
    """Tokens a second, and of a step in milliseconds: the CPU lane's work, its waiting for the GPU, and Python's rest.

    The first two are known where steps are captured.
    """
    from hetero_attn.engine.timed_steps import fill
    from placement.cost.model import predict

    engine, tokens = llm.engine, 4 if run.quick else 64
    context = min(CONTEXT, llm.plan.max_context) - tokens - 2
    sequence, lanes = engine.kv_cache.open(), engine.lanes
    fill(engine, sequence, context)
    steps, chosen, speeds, lane = [], [], [], []
    with lanes.torch_at_rest():
        for attempt in range(1 + DECODE_ATTEMPTS):  # the first compiles and captures
            token, count = 1, 4 if attempt == 0 else tokens
            began, before = (time.perf_counter(), (lanes.cpu_lane_s, lanes.handover.parked_s))
            for _ in range(count):
                started = time.perf_counter()
                logits = engine.decode_step([sequence], [token], copy=False)[0]
                computed = time.perf_counter()
                token = int(logits.argmax())
                if attempt:
                    steps.append(computed - started)
                    chosen.append(time.perf_counter() - computed)
            if attempt:
                speeds.append(count / (time.perf_counter() - began))
                spent = (lanes.cpu_lane_s - before[0], lanes.handover.parked_s - before[1])
                lane.append([part / count for part in spent])
            if not engine.kv_cache.rewind(sequence, context):
                engine.kv_cache.close(sequence)
                sequence = engine.kv_cache.open()
                fill(engine, sequence, context)
    engine.kv_cache.close(sequence)
    speed, step_s = statistics.median(speeds), statistics.median(steps)
    worked, parked = (statistics.median(part) for part in zip(*lane, strict=True))
    plan, hardware = llm.planned.plan, llm.planned.hardware
    cost = predict(
        plan.workload,
        plan.linears,
        plan.kv,
        hardware,
        phase="decode",
        rows=1,
        context=context + tokens // 2,
        on_gpu=True,
    )
    return {
        **_speed(cost, speed, speeds),
        "step_ms": 1e3 * step_s,
        "p95_step_ms": 1e3 * sorted(steps)[int(0.95 * len(steps))],
        "worked_ms": 1e3 * worked,
        "parked_ms": 1e3 * parked,
        "rest_ms": 1e3 * (step_s - worked - parked),
        "argmax_ms": 1e3 * statistics.median(chosen),
    }


def prompt(run: Run, llm: Any, tokens: int) -> dict[str, Any]:
    """Tokens a second of a prompt; of one prompt in milliseconds the CPU lane's work and the caller's waiting for it;
    its launches and copies."""
    from placement.cost.model import predict

    engine, plan = llm.engine, llm.planned.plan
    _once(engine, tokens)  # compiles
    before = _counters(engine)
    times = [_once(engine, tokens) for _ in range(1 if run.quick else 3)]
    spent = [(after - earlier) / len(times) for earlier, after in zip(before, _counters(engine), strict=True)]
    speeds = [tokens / seconds for seconds in times]
    cost = predict(
        plan.workload, plan.linears, plan.kv, llm.planned.hardware, phase="prefill", rows=tokens, context=0, on_gpu=True
    )
    counts = _launches(run, engine, tokens)
    launches = sum(counts.values())
    seconds = statistics.median(times)
    return {
        **_speed(cost, tokens / seconds, speeds),
        "ms": 1e3 * seconds,
        "cpu_lane_ms": 1e3 * spent[0],
        "waited_ms": 1e3 * spent[1],
        "streamed_bytes": spent[2],
        "launches": counts,
        "us_per_launch": 1e6 * seconds / launches if launches else None,
    }


def _speed(cost: Any, speed: float, speeds: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_s": speed,
        "least": min(speeds),
        "most": max(speeds),
        "predicted_tokens_per_s": cost.tokens_per_s,
        "bound_tokens_per_s": cost.rows / cost.busiest_s,
        "lanes_ms": {lane: 1e3 * seconds for lane, seconds in cost.lanes},
    }


def _counters(engine: Any) -> tuple[float, float, float]:
    return engine.lanes.cpu_lane_s, engine.lanes.waited_s, engine.lanes.streamed_bytes


def _once(engine: Any, tokens: int) -> float:
    """Seconds of a prompt in a sequence of its own."""
    sequence, started = engine.kv_cache.open(), time.perf_counter()
    for start in range(0, tokens, engine.prefill_chunk):
        rows = min(engine.prefill_chunk, tokens - start)
        engine.prefill(sequence, [1] * rows, logits=start + rows == tokens)
    seconds = time.perf_counter() - started
    engine.kv_cache.close(sequence)
    return seconds


def _prompt_trace(run: Run, llm: Any, name: str, save: bool) -> dict[str, Any]:
    """Milliseconds of a long prompt and a step by lane and kind of work, by the GPU's own clock, with their counts.
    save: the timeline in a file of its own."""
    from hetero_attn.tools.trace import trace_steps

    trace = trace_steps(llm.engine, 64 if run.quick else 4096, 1)
    file = run.out / f"trace-{name.replace(' ', '-').replace('%', '')}.json"
    if save:
        trace.save(file)
    seconds, counts = Counter(), Counter()
    for span in trace.spans:
        kind = f"{span.lane}: {span.name.partition(' ')[0]}"  # without the shard that it is of
        seconds[kind] += span.stop - span.start
        counts[kind] += 1
    return {
        "file": file.name if save else None,
        "spans": {kind: [counts[kind], 1e3 * seconds[kind]] for kind in sorted(seconds)},
    }


def _launches(run: Run, engine: Any, tokens: int) -> dict[str, int]:
    """Launches of a prompt by who makes them; none where they cannot be counted, which a line says."""
    try:
        with _counted(run) as counts:
            _once(engine, tokens)
    except Exception as error:  # another Triton or torch counts otherwise: the prompt's speed is known all the same
        run.write("launches cannot be counted", error=f"{type(error).__name__}: {error}"[:500])
        return {}
    return dict(counts)


@contextlib.contextmanager
def _counted(run: Run) -> Iterator[Counter]:
    """Count what this thread launches inside: kernels of Triton, and operations of torch on the GPU."""
    counts, mode = Counter(), _TorchOps()
    if not run.has_gpu:
        yield counts
        return
    from triton import knobs

    def launched(*arguments: object) -> None:
        counts["triton"] += 1

    knobs.runtime.launch_enter_hook.add(launched)
    try:
        with mode:
            yield counts
    finally:
        knobs.runtime.launch_enter_hook.remove(launched)
        counts["torch"] = mode.count


class _TorchOps(TorchDispatchMode):
    """Counts operations that give a tensor on the GPU and are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        result = func(*args, **(kwargs or {}))
        is_launch = not getattr(func, "is_view", False) and "empty" not in func.name()
        if is_launch and isinstance(result, torch.Tensor) and result.is_cuda:
            self.count += 1
        return result
