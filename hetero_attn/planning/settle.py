"""From a model and wishes to a plan: config and file headers in, nothing loaded and nothing measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hetero_attn.checkpoints.hub import resolve_model, resolve_tokenizer
from hetero_attn.checkpoints.sources import read_config, stored_formats
from hetero_attn.errors import ConfigError, MemoryBudgetError
from hetero_attn.planning.arguments import check_choice
from hetero_attn.planning.options import PAGE_TOKENS, LoadOptions
from hetero_attn.planning.profiles import current_profile, lane_threads
from hetero_attn.spec.blocks import ModelSpec
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.model import model_spec
from hetero_attn.spec.recipes import formats_of
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats, as_halves, weight_formats
from hetero_attn.spec.workload import build_workload, natural_kv_dtype
from placement import BudgetError, HardwareProfile, Plan, Policy, make_plan
from placement.machine.gpu_here import has_gpu
from placement.plan.memory import activation_bytes
from placement.plan.units import parse_bytes
from placement.plan.workload import KV_DTYPES, ChunkChoice, Workload
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


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model with everything decided that loading needs.

    path: its directory or GGUF file. weight_dtype: what tables call the formats of its weights, which `formats` has
    where
    they are not all one. device: cpu | cuda[:N] | emulated. hardware, policy: the rates and the wishes that the plan
    was
    made with. workload: what was asked of the planner, its shape and prefill chunk still open; plan.workload has those
    that were chosen. spec: the model's blocks, None for those of the family that `config` names.
    tokenizer: where it is, None for beside the weights.
    """

    path: Path
    config: ModelConfig
    weight_dtype: str
    device: str
    hardware: HardwareProfile
    plan: Plan
    policy: Policy = Policy()
    workload: Workload | None = None
    formats: WeightFormats | None = None
    spec: ModelSpec | None = None
    tokenizer: Path | None = None

    @property
    def model(self) -> ModelSpec:
        """The blocks of the model, with what they compute."""
        from hetero_attn.models.decoder import decoder  # imports torch, which planning does without

        return self.spec or decoder(self.config, self.weight_formats)

    @property
    def weight_formats(self) -> WeightFormats:
        """In which format every weight is held."""
        return self.formats or weight_formats(self.weight_dtype)


def plan_model(
    model: str | Path,
    policy: str | Path | Policy = "auto",
    gpu_memory: str | int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    hardware: HardwareProfile | str | None = None,
    max_context: int | None = None,
    max_batch: int | None = None,
    num_threads: int | None = None,
    page_size: int = PAGE_TOKENS,
    kv_dtype: str = "auto",
    file: str | None = None,
) -> Plan:
    """Plan a model from its config and headers alone; the arguments are those of `LLM`.

    hardware: a profile, or the name of a catalogue machine; None is this machine, by its kept profile if it has one.
    Raises what `LLM` raises before it loads weights.
    """
    wishes = LoadOptions(
        model=model,
        policy=policy,
        gpu_memory=gpu_memory,
        dtype=dtype,
        device=device,
        hardware=hardware,
        max_context=max_context,
        max_batch=max_batch,
        num_threads=num_threads,
        page_size=page_size,
        kv_dtype=kv_dtype,
        file=file,
    )
    return settle(wishes).plan


def settle(options: LoadOptions) -> PlannedModel:
    """Decide everything about a model that can be decided without reading its weights.

    The one place where options, policy, config and machine meet: an option goes before the policy's key, and that
    before what the model or the machine suggests. Nothing is open afterwards, and sizes are in the plan's workload
    alone.
    """
    path = resolve_model(options.model, options.file)
    tokenizer = path if options.tokenizer is None else resolve_tokenizer(options.tokenizer)
    config = read_config(path)
    policy = _wishes(options)
    formats = formats_by_rules(choose_formats(options.dtype, config, path), policy, config)
    device = choose_device(options.device, options.hardware)
    kind = device.partition(":")[0]
    hardware = _rates(options, device)
    budget = None if kind == "cpu" else _budget_bytes(options, policy, hardware)
    workload = _workload(options, policy, config, formats, path, kind, budget)
    if kind == "cuda" and has_gpu():
        from hetero_attn.devices.machine import with_own_bytes

        hardware = with_own_bytes(hardware, device)
    policy = policy.without_sizes()
    try:
        plan = make_plan(workload, hardware, policy, device=kind, gpu_memory_bytes=budget)
    except BudgetError as error:
        raise MemoryBudgetError(str(error)) from error
    return PlannedModel(
        path, config, formats.label, device, hardware, plan, policy, workload, formats, tokenizer=tokenizer
    )


def _wishes(options: LoadOptions) -> Policy:
    """The policy that the options name, with those of its keys that they say themselves."""
    policy = options.policy if isinstance(options.policy, Policy) else Policy.load(options.policy)
    said = {"threads": options.num_threads or policy.threads, "elastic": options.elastic or policy.elastic}
    return policy.model_copy(update=said)


def _rates(options: LoadOptions, device: str) -> HardwareProfile:
    named = options.hardware
    return (HardwareProfile.named(named) if isinstance(named, str) else named) or machine_profile(device)


def _budget_bytes(options: LoadOptions, policy: Policy, hardware: HardwareProfile) -> int:
    if options.gpu_memory is not None:
        return parse_bytes(options.gpu_memory)
    return policy.gpu_memory or hardware.gpu_memory_bytes


def _workload(
    options: LoadOptions,
    policy: Policy,
    config: ModelConfig,
    formats: WeightFormats,
    path: Path,
    kind: str,
    budget_bytes: int | None,
) -> Workload:
    """The workload in the sizes that were asked for; on a GPU its prefill chunk is left to the planner unless fixed.

    One sequence is planned for unless more are asked for; under `objective: throughput` many share the KV slots of a
    few.
    """
    context = choose_context(options.max_context or policy.context, config)
    batch, kv_tokens = choose_batch(
        options.max_batch or policy.batch, options.kv_tokens or policy.kv_tokens, context, policy.objective
    )
    build = partial(
        build_workload,
        model_spec(config, formats),
        formats,
        name=model_name(options.model, path),
        max_context=context,
        max_batch=batch,
        kv_tokens=kv_tokens,
        page_size=options.page_size,
        kv_dtype=choose_kv_dtype(options.kv_dtype, policy, formats.label),
        embed_shares_head=shares_head(formats, config) and kind == "cpu",
    )
    if policy.prefill_chunk is None and budget_bytes is not None:
        return with_chunk_choices(build, budget_bytes)
    return build(prefill_chunk=policy.prefill_chunk or DEFAULT_PREFILL_CHUNK)


def machine_profile(device: str) -> HardwareProfile:
    """The rates to plan with on this machine: measured ones if a profile is kept, else the catalogue's generic ones.

    An emulated GPU has rates of its own in the catalogue; they say nothing about any GPU.
    """
    threads = lane_threads()
    if device == "emulated":
        return HardwareProfile.named("emulated").with_threads(threads)
    if device.startswith("cuda"):
        from hetero_attn.devices.machine import device_index, gpu_profile

        stored = current_profile()
        profile = gpu_profile(device_index(device), stored)
        return profile if profile is stored else profile.with_threads(threads)
    return current_profile() or HardwareProfile.named("generic-cpu").with_threads(threads)


def choose_formats(dtype: str, config: ModelConfig, path: Path) -> WeightFormats:
    """The formats weights are kept in: a dtype or recipe where it is wished, for `auto` those of the files.

    fp16: float16 of the files stays; other numbers become bf16, because the range of float16 is small.
    """
    check_choice("dtype", dtype, ("auto", *WEIGHT_DTYPES))
    if dtype in ("auto", "fp16"):
        stored = stored_formats(path, config)
        return stored if dtype == "auto" else as_halves(stored)
    return formats_of(dtype, config)


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


def choose_kv_dtype(kv_dtype: str, policy: Policy, weight_dtype: str) -> str:
    """The dtype of the cache: the wish, else the policy's, else float32 beside float32 weights and bfloat16
    otherwise."""
    check_choice("kv_dtype", kv_dtype, ("auto", *KV_DTYPES))
    if kv_dtype != "auto":
        return kv_dtype
    return policy.kv_dtype or natural_kv_dtype(weight_dtype)


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
        raise ConfigError(f"max_context is {max_context}; it must be at least 1")
    if max_context > limit and config.rope.rope_type != "dynamic":
        raise ConfigError(
            f"max_context is {max_context}, but the model was made for {limit} positions; ask for at most {limit}"
        )
    return max_context


def choose_batch(
    max_batch: int | None, kv_tokens: int | None, max_context: int, objective: str
) -> tuple[int, int | None]:
    """Sequences decoded together, and the KV slots that they share; None is a whole context for each."""
    if kv_tokens is not None and kv_tokens < max_context:
        raise ConfigError(
            f"kv_tokens is {kv_tokens}, but one sequence may have max_context {max_context} tokens; give at least "
            "that, "
            "or a smaller max_context"
        )
    if max_batch is None and objective == "throughput":
        return THROUGHPUT_MAX_BATCH, kv_tokens or THROUGHPUT_CONTEXTS * max_context
    return max_batch or DEFAULT_MAX_BATCH, kv_tokens


def with_chunk_choices(build: Callable[..., Workload], budget_bytes: int) -> Workload:
    """The workload with the prefill chunks that the planner may choose from; `build(prefill_chunk=)` makes it, because
    other sizes follow the chunk too.

    Weights are streamed once a chunk and Python queues the kernels of each chunk anew, so large chunks serve prompts;
    their activations take memory that weights and cache could have. Beginning from the default, the chunk is halved, to
    16 rows at least, until its activations take a quarter of the budget at most, and doubled while they do and the
    context is longer.
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
    known = tuple(ChunkChoice(choice.prefill_chunk, choice.resident_bytes) for choice in choices)
    return replace(workload, chunk_choices=known)
