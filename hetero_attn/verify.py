"""Does a plan give the answer of one device alone? A certificate for a placement, made on a prompt.

The reference is the same checkpoint on one lane: the CPU's kernels for a plan with a GPU, and the plain reference
operations for a plan on the CPU. Both see the same tokens (teacher forcing), so every position is compared.
"""

from dataclasses import asdict, dataclass, replace

import torch

from hetero_attn.builder import build_engine
from hetero_attn.engine import Engine
from hetero_attn.llm import LLM
from placement.plan import NUM_ROW_TIERS, KvPlacement, LinearPlacement, Plan, build_plan

# What rounding at the same places in another order explains; see the tolerances of the tests.
NMSE_LIMITS = {"fp32": 1e-10, "bf16": 1e-4, "q8": 1e-3, "q4": 1e-3}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How far a plan's logits are from the reference's.

    nmse: squared error over squared norm. token_agreement: share of positions whose most likely token is the same.
    """

    model: str
    device: str
    reference: str
    weight_dtype: str
    tokens: int
    max_abs_error: float
    nmse: float
    nmse_limit: float
    token_agreement: float

    @property
    def passed(self) -> bool:
        """Whether the error is within what the arithmetic explains."""
        return self.nmse <= self.nmse_limit

    def table(self) -> str:
        """Plain text for people."""
        verdict = "the plan gives the same answer" if self.passed else "THE PLAN CHANGES THE ANSWER"
        return (
            f"{self.model} {self.weight_dtype} on {self.device} against {self.reference}, {self.tokens} tokens\n"
            f"  largest error of a logit  {self.max_abs_error:.3e}\n"
            f"  NMSE                      {self.nmse:.3e}   limit {self.nmse_limit:.0e}\n"
            f"  same most likely token    {self.token_agreement:.2%} of positions\n"
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
    engine = build_engine(replace(planned, plan=reference_plan, device=reference_plan.device))
    try:
        actual, token_ids = _forced_logits(llm.engine, token_ids, gen_tokens, len(token_ids))
        expected, _ = _forced_logits(engine, token_ids, 0, len(token_ids) - gen_tokens)
    finally:
        engine.close()
    error = (actual - expected).double()
    return VerifyReport(
        model=planned.plan.model,
        device=planned.device,
        reference="the CPU lane" if reference_plan.device == "cpu" else "the reference operations",
        weight_dtype=planned.weight_dtype,
        tokens=len(token_ids),
        max_abs_error=error.abs().max().item(),
        nmse=(error.pow(2).sum() / expected.double().pow(2).sum()).item(),
        nmse_limit=NMSE_LIMITS[planned.weight_dtype],
        token_agreement=(actual.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    )


def one_lane_plan(plan: Plan) -> Plan:
    """The same workload on one lane: all on the CPU for a plan with a GPU, all on an unlimited emulated GPU else."""
    workload, on_gpu = plan.workload, plan.device == "cpu"
    no_stream = (0,) * NUM_ROW_TIERS
    linears = [
        LinearPlacement(shard.name, shard.units if on_gpu else 0, no_stream, shard.units) for shard in workload.linears
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
