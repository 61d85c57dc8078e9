"""Does a plan give the answer of one device alone? A certificate for a placement, made on a text.

The reference is the same checkpoint on one lane: the CPU's kernels for a plan with a GPU, and the plain reference
operations for a plan on the CPU. Both see the same tokens (teacher forcing), so every position is compared.

Two runs that round at the same places add in different orders; a number at the edge of two values then falls to either
side, and thirty layers make much of it. How much is explained by rounding is not a constant, so it is measured: the
reference is compared with its own twin, the same packed weights in exact arithmetic (`hetero_attn.tools.unrounded`).

    end to end   plan against reference, beside reference against twin: both are one rounding error, whatever the depth
    layer by     every layer on the input that the reference had there, where roundings are alike but for a few edges: a
    layer        plan that does anything else shows here first, and the report names the layer

Experts are chosen by scores, of which rounding may exchange near ones. What the plan chooses by itself is compared with
what the reference chose; all other figures are of the plan with the reference's choices, so that they tell arithmetic.

What a quantised cache itself costs is measured against a run with a plain cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from cpu_kernels.formats.pages import is_quantised, token_bytes
from gpu_kernels import reference
from hetero_attn.cache.cache import KVCache
from hetero_attn.engine.build import build_engine
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.passes.buffers import make_buffers
from hetero_attn.errors import PromptError
from hetero_attn.lanes import observe
from hetero_attn.llm import LLM, Prompt
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.workload import natural_kv_dtype
from hetero_attn.tools.forced_runs import (
    Distance,
    Run,
    distance,
    forced,
    generated,
    neighbour_errors,
    recorded,
    stage_errors,
    stage_names,
)
from hetero_attn.tools.routes.watch import Routes, agreement, replayed, watched
from hetero_attn.tools.unrounded import UnroundedOps
from hetero_attn.tools.verify_report import KvCost, StageError, VerifyReport
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.plan import Means, Plan, build_plan
from placement.plan.workload import NUM_ROW_TIERS

MOST_TOKENS = 512  # of a longer text the first ones are compared: the residuals of all layers are kept
# Two runs with independent errors of one size are twice as far from each other as from the truth; few tokens scatter.
# In fp32 the sums of one implementation may be several times as exact as another's.
END_TO_END_SHARE = {"fp32": 25.0, "bf16": 5.0, "q8": 5.0, "q4": 5.0}
# Given the same input, two lanes round alike but for numbers at an edge: measured, at most 0.07 of the rounding itself
# in 30 trained layers. In fp32 nothing is rounded alike. The CPU's prefill rounds quantised keys and values to bf16,
# which the others do not: measured, 0.39 of the rounding.
STAGE_SHARE = {"fp32": 25.0, "bf16": 0.5, "q8": 0.5, "q4": 0.5}
QUANTISED_KV_SHARE = 1.0
SMALLEST_NMSE = 1e-11  # of float32 sums in another order
# The most that rounding can be in one layer. Where more is found the yardstick is wrong, and does not count.
LARGEST_STAGE_ERROR = {"fp32": 1e-8, "bf16": 1e-3, "q8": 1e-2, "q4": 1e-2}
LARGEST_KV_ERROR = {"fp32": 0.0, "bf16": 1e-3, "q8": 1e-2, "q4": 1e-1}


def run(llm: LLM, prompt: Prompt, gen_tokens: int = 16) -> VerifyReport:
    """Compare the logits of `prompt` and of `gen_tokens` greedy tokens after it, prompt by prefill and the rest by
    decode.

    prompt: a text or token ids; of a long one the first MOST_TOKENS count, or what the context holds. Loads the
    checkpoint a second time, on one lane. Raises PromptError for a text where the model has no tokenizer, and what
    loading raises.
    """
    llm.check_context(gen_tokens + 1)
    token_ids = _token_ids(llm, prompt)[: min(MOST_TOKENS, llm.plan.max_context - gen_tokens)]
    return compare(llm.planned, llm.engine, token_ids, gen_tokens)


def compare(planned: PlannedModel, engine: Engine, token_ids: Sequence[int], gen_tokens: int) -> VerifyReport:
    """As `run`, for an engine without an LLM around it."""
    plan = one_lane_plan(planned.plan)
    own, others, routes = Routes(), Routes(), None
    with watched(engine, own):
        logits, token_ids = generated(engine, token_ids, gen_tokens)
    with _reference_engine(planned, plan) as reference_engine:
        with watched(reference_engine, others):
            run = recorded(reference_engine, token_ids, gen_tokens)
        rounding, twin_errors = _yardstick(reference_engine, run, others)
    if others.ids:
        routes = agreement(own, others)
        with replayed(engine, others):
            logits = forced(engine, token_ids, gen_tokens)
    with replayed(engine, others):
        errors = stage_errors(engine, run)
    found, kv_dtype = distance(logits, run.logits), plan.workload.kv_dtype
    return VerifyReport(
        model=plan.model,
        device=planned.device,
        reference="the CPU lane" if plan.device == "cpu" else "the reference operations",
        weight_dtype=planned.weight_dtype,
        kv_dtype=kv_dtype,
        tokens=len(token_ids),
        max_abs_error=(logits - run.logits).abs().max().item(),
        nmse=found.nmse,
        nmse_limit=max(SMALLEST_NMSE, END_TO_END_SHARE[planned.weight_formats.rounding] * rounding.nmse),
        mean_kl=found.mean_kl,
        token_agreement=found.token_agreement,
        rounding=rounding,
        stages=_stages(errors, twin_errors, neighbour_errors(run), planned.weight_formats.rounding, kv_dtype),
        kv_cost=_kv_cost(planned, plan, run) if is_quantised(kv_dtype) else None,
        routes=routes,
    )


def _token_ids(llm: LLM, prompt: Prompt) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    if llm.tokenizer is None:
        raise PromptError(
            f"{llm.plan.model} has no tokenizer, so there is no text to compare on; add its tokenizer files, or call "
            "hetero_attn.tools.verify.run(llm, token_ids) from Python"
        )
    return llm.tokenizer.encode(prompt)


def _stages(
    errors: Sequence[float], rounding: Sequence[float], neighbours: Sequence[float], weight_dtype: str, kv_dtype: str
) -> tuple[StageError, ...]:
    largest = max(LARGEST_STAGE_ERROR[weight_dtype], LARGEST_KV_ERROR[kv_dtype])
    share = max(STAGE_SHARE[weight_dtype], QUANTISED_KV_SHARE if is_quantised(kv_dtype) else 0.0)
    names = stage_names(len(errors) - 2)
    return tuple(
        StageError(name, error, rounded, max(SMALLEST_NMSE, share * min(rounded, largest)) + beside)
        for name, error, rounded, beside in zip(names, errors, rounding, neighbours, strict=True)
    )


@contextmanager
def _reference_engine(planned: PlannedModel, plan: Plan) -> Iterator[Engine]:
    """The checkpoint loaded once more by a plan of one lane; the emulated one runs the reference operations alone."""
    engine = build_engine(replace(planned, plan=plan, device=plan.device))
    try:
        with nullcontext() if plan.device == "cpu" else observe.computing_by(engine.lanes, reference):
            yield engine
    finally:
        engine.close()


def _yardstick(engine: Engine, run: Run, routes: Routes) -> tuple[Distance, tuple[float, ...]]:
    """How far the reference is from exact arithmetic over its own weights: at the end, and stage by stage."""
    plan = _with_kv_dtype(engine.plan, "fp32")
    lanes = engine.lanes
    cache, buffers = KVCache(plan, lanes.device, False), make_buffers(engine.weights.spec, plan, lanes)
    twin = Engine(engine.config, plan, engine.weights, lanes, cache, buffers, False)
    exact = torch.float64 if plan.workload.weight_dtype in ("fp32", "fp16") else torch.float32
    # Without rounding a token's numbers are the same by prefill and by decode, and prefill is many times faster.
    with observe.computing_by(lanes, UnroundedOps(exact)):
        with replayed(twin, routes):
            logits = forced(twin, run.token_ids, 0)
        with replayed(twin, routes):
            return distance(run.logits, logits), stage_errors(twin, replace(run, decoded=0))


def _kv_cost(planned: PlannedModel, plan: Plan, run: Run) -> KvCost:
    against = natural_kv_dtype(planned.weight_dtype)
    with _reference_engine(planned, _with_kv_dtype(plan, against)) as engine:
        plain = forced(engine, run.token_ids, run.decoded)
    following = torch.tensor(run.token_ids[1:], device="cpu")[:, None]
    losses = [-torch.log_softmax(rows[:-1], -1).gather(-1, following).mean().item() for rows in (run.logits, plain)]
    found = distance(run.logits, plain)
    return KvCost(against, found.nmse, found.token_agreement, losses[0] - losses[1])


def _with_kv_dtype(plan: Plan, kv_dtype: str) -> Plan:
    """The same placement with a cache of other numbers."""
    workload = plan.workload
    shards = tuple(
        replace(shard, bytes_per_token=token_bytes(kv_dtype, workload.head_dim_of(shard))) for shard in workload.kv
    )
    workload = replace(workload, kv=shards, kv_dtype=kv_dtype)
    return build_plan(workload, plan.linears, plan.kv, Means(device=plan.device, num_threads=plan.num_threads))


def one_lane_plan(plan: Plan) -> Plan:
    """The same workload on one lane: all on the CPU for a plan with a GPU, all on an unlimited emulated GPU else.

    A head whose rows are also the token embedding stays in host memory, where the embedding is read.
    """
    workload, on_gpu = plan.workload, plan.device == "cpu"
    no_stream = (0,) * NUM_ROW_TIERS
    host = frozenset(() if workload.embed_bytes else ("head",)) if on_gpu else frozenset(workload.shard_names())
    linears = [
        LinearPlacement(shard.name, 0 if shard.name in host else shard.units, no_stream, shard.units)
        for shard in workload.linears
    ]
    kv = [
        KvPlacement(shard.name, shard.kv_heads, workload.layer_tokens(shard), shard.kv_heads)
        if on_gpu
        else KvPlacement(shard.name, 0, 0, shard.kv_heads)
        for shard in workload.kv
    ]
    return build_plan(
        workload, linears, kv, Means(device="emulated" if on_gpu else "cpu", num_threads=plan.num_threads)
    )
