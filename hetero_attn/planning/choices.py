"""What each open wish becomes: formats, device, context, batch and prefill chunks, from the model and the machine."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.sources import expect_readable, stored_formats
from hetero_attn.errors import ArgumentError, ContextLimitError
from hetero_attn.planning.arguments import check_choice
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.model import model_spec
from hetero_attn.spec.recipes import formats_of
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats, as_halves
from placement import HardwareProfile, Policy
from placement.machine.gpu_here import has_gpu
from placement.plan.memory import activation_bytes
from placement.plan.workload import ChunkChoice, Workload
from placement.policy.bind import dtype_by_rules

WEIGHT_DTYPES = ("bf16", "fp16", "fp32", "q8", "q4", "q4_m")
DEVICES = ("auto", "cuda", "cpu", "emulated")
DEFAULT_MAX_CONTEXT = 8192
DEFAULT_MAX_BATCH = 1
# Under `objective: throughput` so many sequences share the cache of so many whole contexts.
THROUGHPUT_MAX_BATCH = 16
THROUGHPUT_CONTEXTS = 4
DEFAULT_PREFILL_CHUNK = 512
MIN_PREFILL_CHUNK = 16
MAX_PREFILL_CHUNK = 2048
MUCH_OF_BUDGET = 10  # activations of a tenth of it and more are weighed against those of half the chunk


def choose_formats(dtype: str, config: ModelConfig, path: Path, known: KnownHeaders | None = None) -> WeightFormats:
    """The formats weights are kept in: a dtype or recipe where it is wished, for `auto` those of the files.
    known: as for `open_source`.

    fp16: float16 of the files stays; other numbers become bf16, because the range of float16 is small.
    """
    check_choice("dtype", dtype, ("auto", *WEIGHT_DTYPES))
    if dtype in ("auto", "fp16"):
        stored = stored_formats(path, config, known)
        return stored if dtype == "auto" else _halves(stored)
    expect_readable(path, known)
    return formats_of(dtype, config)


def _halves(stored: WeightFormats) -> WeightFormats:
    """Formats of 16 bits for `fp16`, with a warning where none of them is that."""
    halves = as_halves(stored)
    if "fp16" not in (*halves.names, halves.embed):
        warnings.warn(
            "dtype fp16 keeps float16 weights, and this model's files hold none: they become bf16, which has the range "
            "of all numbers",
            stacklevel=3,
        )
    return halves


def formats_by_rules(formats: WeightFormats, policy: Policy, config: ModelConfig) -> WeightFormats:
    """The formats with those that the policy's rules ask for single linears."""
    by_tensor, changed = {}, False
    for linear in model_spec(config, formats).linears:
        dtype = dtype_by_rules(policy, linear.name)
        changed |= dtype is not None
        by_tensor |= {part.tensor: dtype or part.format for part in linear.parts}
    return replace(formats, by_tensor=by_tensor, name="") if changed else formats


def shares_head(formats: WeightFormats, config: ModelConfig) -> bool:
    """Whether the rows of the head are those of the token embedding, in one and the same format."""
    return config.tie_word_embeddings and formats.embed == formats.of(tensor_name("embed"))


def model_name(given: str | Path, path: Path) -> str:
    """What a model is called in tables: the hub id it was asked by, else the name of its directory."""
    if path.is_file():
        return path.name
    if not Path(given).expanduser().is_dir():
        return str(given)
    parts = path.resolve().parts
    cached = [part for part in parts if part.startswith("models--")]
    name = (
        cached[-1].removeprefix("models--").replace("--", "/")
        if cached and "snapshots" in parts
        else path.resolve().name
    )
    return "".join(c if c.isprintable() else "?" for c in name)


def choose_device(device: str, hardware: HardwareProfile | str | None) -> str:
    """The device to plan for: the wish, or for `auto` the given hardware's, else the GPU where there is one, else the
    CPU."""
    check_choice("device", device.partition(":")[0], DEVICES)
    if device != "auto":
        return device
    if hardware is not None:
        profile = HardwareProfile.named(hardware) if isinstance(hardware, str) else hardware
        return "cuda" if profile.has_gpu else "cpu"
    return "cuda" if has_gpu() else "cpu"


def choose_context(max_context: int | None, config: ModelConfig) -> int:
    """Tokens to reserve for one sequence: the wish, or the model's limit up to DEFAULT_MAX_CONTEXT."""
    limit = config.max_position_embeddings
    if max_context is None:
        return min(limit, DEFAULT_MAX_CONTEXT)
    if max_context < 1:
        raise ArgumentError(f"max_context is {max_context}; it must be at least 1")
    if max_context > limit and config.rope.rope_type != "dynamic":
        raise ContextLimitError(max_context, limit)
    return max_context


def choose_batch(
    max_batch: int | None, kv_tokens: int | None, max_context: int, objective: str
) -> tuple[int, int | None]:
    """Sequences decoded together, and the KV slots that they share; None is a whole context for each."""
    if kv_tokens is not None and kv_tokens < max_context:
        raise ArgumentError(
            f"kv_tokens is {kv_tokens}, but one sequence may have max_context {max_context} tokens; give at least "
            "that, or a smaller max_context"
        )
    if max_batch is None and objective == "throughput":
        return THROUGHPUT_MAX_BATCH, kv_tokens or THROUGHPUT_CONTEXTS * max_context
    return max_batch or DEFAULT_MAX_BATCH, kv_tokens


def with_chunk_choices(build: Callable[..., Workload], budget_bytes: int) -> Workload:
    """The workload with the prefill chunks that the planner may choose from; `build(prefill_chunk=)` makes it, because
    other sizes follow the chunk too.

    Weights are streamed once a chunk and Python queues the kernels of each chunk anew, so large chunks serve prompts;
    their activations take memory that weights and cache could have. Beginning from the default, the chunk is halved, to
    16 rows at least, until its activations take a quarter of the budget at most, once more where they still take much
    of it, and doubled while they do and the context is longer. Smaller ones are for budgets that hold no plan with any
    of these: what a small budget holds, a larger one does too.
    """
    workload = build(prefill_chunk=DEFAULT_PREFILL_CHUNK)
    while workload.prefill_chunk > MIN_PREFILL_CHUNK and 4 * activation_bytes(workload) > budget_bytes:
        workload = build(prefill_chunk=workload.prefill_chunk // 2)
    choices, largest = [workload], min(MAX_PREFILL_CHUNK, workload.max_context)
    while 2 * choices[-1].prefill_chunk <= largest:
        larger = build(prefill_chunk=2 * choices[-1].prefill_chunk)
        if 4 * activation_bytes(larger) > budget_bytes:
            break
        choices.append(larger)
    smaller = [workload]
    while smaller[-1].prefill_chunk > MIN_PREFILL_CHUNK:
        smaller.append(build(prefill_chunk=smaller[-1].prefill_chunk // 2))
    if len(smaller) > 1 and MUCH_OF_BUDGET * activation_bytes(workload) > budget_bytes:
        del smaller[0]
        choices.insert(0, smaller[0])
    known, below = (
        tuple(ChunkChoice(each.prefill_chunk, each.resident_bytes) for each in some) for some in (choices, smaller[1:])
    )
    return replace(choices[0], chunk_choices=known, smaller_chunks=below)
