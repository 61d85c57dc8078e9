"""Does a plan give the answer of one device alone? A certificate for a placement, made on a prompt.

The reference is the same checkpoint on one lane: the CPU's kernels for a plan with a GPU, and the plain reference
operations for a plan on the CPU. Both see the same tokens (teacher forcing), so every position is compared. Both keep
the cache in the plan's KV dtype; what that dtype itself costs is measured against a third run with a plain cache.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch

from cpu_kernels.kv_layout import is_quantised, token_bytes
from hetero_attn.builder import build_engine
from hetero_attn.engine import Engine
from hetero_attn.llm import LLM
from hetero_attn.planning import PlannedModel
from hetero_attn.weights import natural_kv_dtype
from placement.plan import NUM_ROW_TIERS, KvPlacement, LinearPlacement, Plan, build_plan

# What rounding at the same places in another order explains; see the tolerances of the tests.
NMSE_LIMITS = {"fp32": 1e-10, "bf16": 1e-4, "q8": 1e-3, "q4": 1e-3}
# A number at the edge of two codes falls to either side; of q4 codes that is a fifteenth of the group's range.
KV_NMSE_LIMITS = {"fp32": 1e-10, "bf16": 1e-4, "q8": 1e-3, "q4": 1e-2}


@dataclass(frozen=True, slots=True)
class KvCost:
    """How far the logits of a quantised cache are from those of a plain one: nmse, token_agreement as in VerifyReport.

    loss: mean natural log of the probability that the compared tokens lose, so exp(loss) is the factor of perplexity.
    """

    against: str
    nmse: float
    token_agreement: float
    loss: float

    def line(self) -> str:
        """One line of the report."""
        return (
            f"  against {self.against} KV           NMSE {self.nmse:.3e}, same most likely token "
            f"{self.token_agreement:.2%}, perplexity {100 * (math.exp(self.loss) - 1):+.2f} %\n"
        )


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How far a plan's logits are from the reference's.

    nmse: squared error over squared norm. token_agreement: share of positions whose most likely token is the same.
    kv_cost: what a quantised cache costs, None beside a plain one.
    """

    model: str
    device: str
    reference: str
    weight_dtype: str
    kv_dtype: str
    tokens: int
    max_abs_error: float
    nmse: float
    nmse_limit: float
    token_agreement: float
    kv_cost: "KvCost | None"

    @property
    def passed(self) -> bool:
        """Whether the error is within what the arithmetic explains."""
        return self.nmse <= self.nmse_limit

    def table(self) -> str:
        """Plain text for people."""
        verdict = "the plan gives the same answer" if self.passed else "THE PLAN CHANGES THE ANSWER"
        return (
            f"{self.model} {self.weight_dtype}, {self.kv_dtype} KV, on {self.device} against {self.reference}, "
            f"{self.tokens} tokens\n"
            f"  largest error of a logit  {self.max_abs_error:.3e}\n"
            f"  NMSE                      {self.nmse:.3e}   limit {self.nmse_limit:.0e}\n"
            f"  same most likely token    {self.token_agreement:.2%} of positions\n"
            f"{'' if self.kv_cost is None else self.kv_cost.line()}"
            f"{verdict}"
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self) | {"passed": self.passed}


def run(llm: LLM, prompt: str, gen_tokens: int = 16) -> VerifyReport:
    """Compare the logits of `prompt` and of `gen_tokens` greedy tokens after it, prompt by prefill and the rest by
    decode.

    Loads the checkpoint a second time, on one lane. Raises what loading raises.
    """
    token_ids = llm.tokenizer.encode(prompt)
    llm.check_context(len(token_ids) + gen_tokens)
    planned = llm.planned
    reference_plan = one_lane_plan(planned.plan)
    actual, token_ids = _forced_logits(llm.engine, token_ids, gen_tokens, len(token_ids))
    expected = _logits_on(planned, reference_plan, token_ids, gen_tokens)
    error, kv_dtype = (actual - expected).double(), planned.plan.workload.kv_dtype
    cost = None
    if is_quantised(kv_dtype):
        plain = _logits_on(planned, plain_kv_plan(reference_plan), token_ids, gen_tokens)
        cost = _kv_cost(expected, plain, token_ids, natural_kv_dtype(planned.weight_dtype))
    return VerifyReport(
        model=planned.plan.model,
        device=planned.device,
        reference="the CPU lane" if reference_plan.device == "cpu" else "the reference operations",
        weight_dtype=planned.weight_dtype,
        kv_dtype=kv_dtype,
        tokens=len(token_ids),
        max_abs_error=error.abs().max().item(),
        nmse=_nmse(actual, expected),
        nmse_limit=max(NMSE_LIMITS[planned.weight_dtype], KV_NMSE_LIMITS[kv_dtype]),
        token_agreement=_agreement(actual, expected),
        kv_cost=cost,
    )


def _logits_on(planned: PlannedModel, plan: Plan, token_ids: list[int], gen_tokens: int) -> torch.Tensor:
    """Logits of every token through another plan of the same checkpoint, the last `gen_tokens` by decode."""
    engine = build_engine(replace(planned, plan=plan, device=plan.device))
    try:
        return _forced_logits(engine, token_ids, 0, len(token_ids) - gen_tokens)[0]
    finally:
        engine.close()


def _kv_cost(logits: torch.Tensor, plain: torch.Tensor, token_ids: list[int], against: str) -> KvCost:
    following = torch.tensor(token_ids[1:])[:, None]
    losses = [-torch.log_softmax(rows[:-1], -1).gather(-1, following).mean().item() for rows in (logits, plain)]
    return KvCost(against, _nmse(logits, plain), _agreement(logits, plain), losses[0] - losses[1])


def _nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).double().pow(2).sum() / expected.double().pow(2).sum()).item()


def _agreement(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual.argmax(-1) == expected.argmax(-1)).double().mean().item()


def plain_kv_plan(plan: Plan) -> Plan:
    """The same placement with a cache of plain numbers."""
    workload = plan.workload
    kv_dtype = natural_kv_dtype(workload.weight_dtype)
    size = token_bytes(kv_dtype, workload.head_dim)
    shards = tuple(replace(shard, bytes_per_token=size) for shard in workload.kv)
    workload = replace(workload, kv=shards, kv_dtype=kv_dtype)
    return build_plan(workload, plan.linears, plan.kv, device=plan.device, num_threads=plan.num_threads)


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
        KvPlacement(shard.name, shard.groups, workload.layer_tokens(shard), shard.groups)
        if on_gpu
        else KvPlacement(shard.name, 0, 0, shard.groups)
        for shard in workload.kv
    ]
    return build_plan(workload, linears, kv, device="emulated" if on_gpu else "cpu", num_threads=plan.num_threads)


def _forced_logits(
    engine: Engine, token_ids: list[int], new_tokens: int, prompt_tokens: int
) -> tuple[torch.Tensor, list[int]]:
    """Logits of every token, the first `prompt_tokens` by prefill; `new_tokens` greedy ones are appended and scored."""
    sequence, rows, token_ids = engine.kv_cache.open(), [], list(token_ids)
    try:
        for start in range(0, prompt_tokens, engine.prefill_chunk):
            rows.append(
                engine.prefill_logits(sequence, token_ids[start : min(start + engine.prefill_chunk, prompt_tokens)])
            )
        position = prompt_tokens
        while position < len(token_ids) or new_tokens:
            if position == len(token_ids):
                token_ids.append(int(rows[-1][-1].argmax()))
                new_tokens -= 1
            rows.append(engine.decode_step([sequence], [token_ids[position]]))
            position += 1
    finally:
        engine.kv_cache.close(sequence)
    return torch.cat(rows), token_ids
