"""Engines built by hand from a toy checkpoint and an explicit plan, and strategies that draw such plans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import strategies as st

from hetero_attn import LLM
from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.build import build_engine
from hetero_attn.engine.engine import Engine
from hetero_attn.models.decoder import decoder
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.workload import Sizes, build_workload
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.plan import Means, Plan, build_plan
from placement.plan.workload import NUM_ROW_TIERS, Workload

THREADS = 2


def nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Squared error over squared norm, in float64."""
    difference = (actual.double() - expected.double()).pow(2).sum()
    return (difference / expected.double().pow(2).sum()).item()


def toy_workload(
    path: Path,
    weight_dtype: str = "fp32",
    *,
    max_context: int = 128,
    max_batch: int = 2,
    page_size: int = 4,
    prefill_chunk: int = 16,
    kv_dtype: str | None = None,
    paired: bool = False,
) -> Workload:
    """The workload of a toy checkpoint with small pages and chunks, so that boundaries fall inside short prompts."""
    sizes = Sizes(
        max_context=max_context,
        max_batch=max_batch,
        page_size=page_size,
        prefill_chunk=prefill_chunk,
        kv_dtype=kv_dtype,
    )
    model = decoder(ModelConfig.from_dir(path), weight_dtype)
    return build_workload(model, weight_dtype, path.name, sizes, paired=paired)


def cpu_plan(workload: Workload) -> Plan:
    """Everything on the CPU lane: the one-device run."""
    linears = [LinearPlacement(shard.name, 0, (0,) * NUM_ROW_TIERS, shard.units) for shard in workload.linears]
    kv = [KvPlacement(shard.name, 0, 0, shard.kv_heads) for shard in workload.kv]
    return build_plan(workload, linears, kv, Means(device="cpu", num_threads=THREADS))


def emulated_plan(workload: Workload, linears: Sequence[LinearPlacement], kv: Sequence[KvPlacement]) -> Plan:
    """A three-lane plan whose budget is exactly what it needs."""
    plan = build_plan(workload, linears, kv, Means(device="emulated", gpu_memory_bytes=0, num_threads=THREADS))
    return build_plan(
        workload, linears, kv, Means(device="emulated", gpu_memory_bytes=plan.memory.gpu_bytes, num_threads=THREADS)
    )


def uniform_plan(
    workload: Workload, gpu: float, stream: float, gpu_kv_heads: int, gpu_tokens: int | None = None
) -> Plan:
    """Every linear cut at the same fractions in every tier, every layer's cache placed alike."""
    linears = []
    for shard in workload.linears:
        home = round(gpu * shard.units)
        streamed = min(round(stream * shard.units), shard.units - home)
        linears.append(LinearPlacement(shard.name, home, (streamed,) * NUM_ROW_TIERS, shard.units))
    tokens = (gpu_tokens or workload.min_gpu_tokens) if gpu_kv_heads else 0
    kv = [KvPlacement(shard.name, gpu_kv_heads, tokens, shard.kv_heads) for shard in workload.kv]
    return emulated_plan(workload, linears, kv)


@st.composite
def plans(draw: st.DrawFn, path: Path, weight_dtype: str) -> Plan:
    """Any valid plan: cuts per linear and tier, head owners and segment sizes per layer, page and chunk sizes,
    copies."""
    workload = toy_workload(
        path,
        weight_dtype,
        page_size=draw(st.sampled_from([1, 3, 4, 16, 64])),
        prefill_chunk=draw(st.sampled_from([1, 5, 16, 40])),
        max_batch=draw(st.integers(1, 3)),
    )
    workload = replace(workload, elastic=draw(st.booleans()))
    linears = []
    for shard in workload.linears:
        home = draw(st.integers(0, shard.units))
        streams = draw(st.tuples(*[st.integers(0, shard.units - home)] * NUM_ROW_TIERS))
        linears.append(LinearPlacement(shard.name, home, streams, shard.units))
    kv = []
    for shard in workload.kv:
        groups = draw(st.integers(0, shard.kv_heads))
        tokens = draw(st.integers(workload.min_gpu_tokens, workload.full_tokens)) if groups else 0
        kv.append(KvPlacement(shard.name, groups, tokens, shard.kv_heads))
    return emulated_plan(workload, linears, kv)


def make_engine(path: Path, plan: Plan, *, overlap: bool = True) -> Engine:
    """Load a toy checkpoint by a plan."""
    planned = PlannedModel(
        path,
        ModelConfig.from_dir(path),
        plan.workload.weight_dtype,
        plan.device,
        HardwareProfile.named("emulated"),
        plan,
    )
    return build_engine(planned, overlap)


def run_logits(engine: Engine, token_ids: Sequence[int], prompt_tokens: int) -> torch.Tensor:
    """Teacher-forced logits: a prompt in chunks, then one decode step a token; float32 [len(token_ids), vocab_size]."""
    sequence = engine.kv_cache.open()
    rows = []
    for start in range(0, prompt_tokens, engine.prefill_chunk):
        rows.append(
            engine.prefill_logits(sequence, token_ids[start : min(start + engine.prefill_chunk, prompt_tokens)])
        )
    rows += [engine.decode_step([sequence], [token_id]) for token_id in token_ids[prompt_tokens:]]
    engine.kv_cache.close(sequence)
    return torch.cat(rows)


def decoded_together(
    engine: Engine, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]
) -> tuple[list[SequenceState], list[list[torch.Tensor]]]:
    """The open sequences of prompts that are read in chunks of 16 and then given the same tokens, one a step for all;
    and each one's logits of these steps."""
    sequences, found = [engine.kv_cache.open() for _ in prompts], [[] for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        for start in range(0, len(prompt), 16):
            engine.prefill(sequence, prompt[start : start + 16])
    for token_id in token_ids:
        for rows, logits in zip(found, engine.decode_step(sequences, [token_id] * len(prompts)), strict=True):
            rows.append(logits)
    return sequences, found


def batch_and_again(engine: Engine, token_ids: Sequence[int]) -> list[tuple[Sequence[int], torch.Tensor]]:
    """Two prompts of other lengths, decoded together, then a third in the place of the first: the tokens of each, at
    least 41 are given, and the logits behind the last ones. Closes the engine."""
    prompts, decoded = (token_ids[:9], token_ids[20:41]), token_ids[10:16]
    sequences, found = decoded_together(engine, prompts, decoded)
    engine.kv_cache.close(sequences[0])
    again = run_logits(engine, token_ids[5:30], 11)
    engine.close()
    together = [([*prompt, *decoded], torch.stack(rows)) for prompt, rows in zip(prompts, found, strict=True)]
    return [*together, (token_ids[5:30], again)]


@dataclass(frozen=True, slots=True)
class Run:
    """Token ids and the logits that the one-device run gives for them."""

    path: Path
    token_ids: tuple[int, ...]
    prompt_tokens: int
    logits: torch.Tensor


def one_device_run(path: Path, weight_dtype: str, tokens: int = 70, prompt_tokens: int = 60, vocab: int = 307) -> Run:
    """The reference of a placement test: the CPU lane alone."""
    generator = torch.Generator().manual_seed(5)
    token_ids = tuple(torch.randint(vocab, (tokens,), generator=generator).tolist())
    engine = make_engine(path, cpu_plan(toy_workload(path, weight_dtype)))
    try:
        return Run(path, token_ids, prompt_tokens, run_logits(engine, token_ids, prompt_tokens))
    finally:
        engine.close()


def model_logits(path, dtype="auto", device="cpu", *, tokens, **options) -> torch.Tensor:
    """Logits of all tokens by an `LLM` over files, loaded for this alone."""
    with LLM(path, dtype=dtype, device=device, max_context=64, progress=False, num_threads=2, **options) as llm:
        return llm.logits(tokens)
