"""From a model and wishes to a plan: config and file headers in, nothing loaded and nothing measured."""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.hub import resolve_model, resolve_tokenizer
from hetero_attn.checkpoints.sources import read_config
from hetero_attn.errors import MemoryBudgetError
from hetero_attn.planning.arguments import check_choice
from hetero_attn.planning.choices import (
    DEFAULT_PREFILL_CHUNK,
    choose_batch,
    choose_context,
    choose_device,
    choose_formats,
    formats_by_rules,
    model_name,
    shares_head,
    with_chunk_choices,
)
from hetero_attn.planning.draft_checks import refuse_head, taps_for_head
from hetero_attn.planning.heats import with_heat
from hetero_attn.planning.options import PAGE_TOKENS, LoadOptions
from hetero_attn.planning.profiles import machine_profile
from hetero_attn.spec.blocks import ModelSpec
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.model import model_spec
from hetero_attn.spec.weight_formats import WeightFormats, weight_formats
from hetero_attn.spec.workload import Sizes, build_workload, natural_kv_dtype
from placement import BudgetError, HardwareProfile, Plan, Policy
from placement.machine.gpu_here import has_gpu
from placement.plan.units import format_bytes, parse_bytes
from placement.plan.workload import KV_DTYPES, Workload
from placement.solve.make_plan import Searched, plan_with_alternatives
from placement.solve.request import PlanRequest, requested

PLANNED_DRAM = 0.95  # of a machine's memory, where a plan must be held to it: the system needs some too


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model with everything decided that loading needs.

    path: its directory or GGUF file. weight_dtype: what tables call the formats of its weights, which `formats` has
    where they are not all one. device: cpu | cuda[:N] | emulated. hardware, policy: the rates and the wishes that the
    plan was made with. workload: what was asked of the planner, its shape and prefill chunk still open; plan.workload
    has those that were chosen. spec: the model's blocks, None for those of the family that `config` names.
    tokenizer: where it is, None for beside the weights. taps: before which layers the residual stream is kept for a
    head that drafts. headers: those of the files, read by planning; loading reads no file's again. searched: the plan
    beside what the search compared, None where another found it.
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
    taps: tuple[int, ...] = ()
    headers: KnownHeaders = field(default_factory=KnownHeaders, compare=False, repr=False)
    searched: Searched | None = field(default=None, compare=False, repr=False)

    @property
    def model(self) -> ModelSpec:
        """The blocks of the model, with what they compute."""
        from hetero_attn.models.decoder import decoder  # imports torch, which planning does without

        spec = self.spec or decoder(self.config, self.weight_formats)
        return replace(spec, taps=self.taps) if self.taps else spec

    @property
    def weight_formats(self) -> WeightFormats:
        """In which format every weight is held."""
        return self.formats or weight_formats(self.weight_dtype)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model as it is known before its sizes are: where it is, its config, how its weights are to be held, and what it
    keeps for a head. headers: those of the files that were read on the way, also of what drafts."""

    path: Path
    config: ModelConfig
    formats: WeightFormats
    headers: KnownHeaders
    taps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """A model with all that planning needs. request: what is asked of the planner; the others as in `PlannedModel`."""

    model: _Model
    device: str
    hardware: HardwareProfile
    policy: Policy
    workload: Workload
    tokenizer: Path
    request: PlanRequest

    def planned(self, plan: Plan) -> PlannedModel:
        """The model with a plan, whose way to draft it keeps for later plans."""
        model = self.model
        return PlannedModel(
            path=model.path,
            config=model.config,
            weight_dtype=model.formats.label,
            device=self.device,
            hardware=self.hardware,
            plan=plan,
            policy=self.policy,
            workload=replace(self.workload, drafting=plan.workload.drafting),
            formats=model.formats,
            tokenizer=self.tokenizer,
            taps=model.taps,
            headers=model.headers,
        )

    @property
    def is_too_large(self) -> bool:
        """Whether GPU and host memory together are less than the weights alone, so that no plan fits the machine."""
        memory = (self.request.gpu_memory_bytes or 0) + self.hardware.dram_bytes
        return self.workload.weight_bytes + self.workload.embed_bytes > memory

    def searched(self) -> PlannedModel:
        """The model with the plan for its request; BudgetError and PolicyError as `make_plan`."""
        searched = plan_with_alternatives(self.request)
        return replace(self.planned(searched.plan), searched=searched)


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


def settle(options: LoadOptions, asked: Asked | None = None) -> PlannedModel:
    """Decide everything about a model that can be decided without reading its weights.

    Nothing is open afterwards, and sizes are in the plan's workload alone. asked: what `ask` has made of the options.
    """
    asked = asked or ask(options)
    try:
        planned = asked.searched()
    except BudgetError as error:
        raise MemoryBudgetError(str(error)) from error
    return planned if asked.is_too_large else _within_host_memory(asked, planned) or planned


def _within_host_memory(asked: Asked, planned: PlannedModel) -> PlannedModel | None:
    """The fastest plan that the machine's host memory holds where the fastest of all takes more, as expert slots do,
    which need every expert in DRAM; None where nothing is to be done or no plan does."""
    memory, dram_bytes = planned.plan.memory, asked.hardware.dram_bytes
    if memory.host_bytes + memory.pinned_bytes <= dram_bytes or asked.policy.host_memory is not None:
        return None
    limit = int(PLANNED_DRAM * dram_bytes)
    policy = asked.policy.model_copy(update={"host_memory": limit})
    narrower = replace(asked.request, policy=policy, limits=asked.request.limits | {"host": limit})
    try:
        return replace(asked, policy=policy, request=narrower).searched()
    except BudgetError:
        return None


def ask(options: LoadOptions, drafts: bool = False, known: KnownHeaders | None = None) -> Asked:
    """What is asked of the planner for a model. drafts: for another, so that it may be a head. known: the headers that
    this start has read so far.

    The one place where options, policy, config and machine meet: an option goes before the policy's key, and that
    before what the model or the machine suggests.
    """
    path, known = resolve_model(options.model, options.file), known or KnownHeaders()
    tokenizer = path if options.tokenizer is None else resolve_tokenizer(options.tokenizer)
    config = read_config(path, known)
    if not drafts:
        refuse_head(options, config)
    policy = _wishes(options)
    taps = taps_for_head(policy.speculate, options, config, known)
    formats = formats_by_rules(choose_formats(options.dtype, config, path, known), policy, config)
    device = choose_device(options.device, options.hardware)
    kind = device.partition(":")[0]
    hardware = _rates(options, device)
    _warn_of_wishes_without_effect(policy, kind, hardware)
    budget_bytes = None if kind == "cpu" else policy.gpu_memory or hardware.gpu_memory_bytes
    model = _Model(path, config, formats, known, taps)
    workload = _workload(options, policy, model, kind, budget_bytes)
    workload = with_heat(workload, path)
    if kind == "cuda" and has_gpu():
        from hetero_attn.devices.machine import with_own_bytes

        hardware = with_own_bytes(hardware, device)
    policy = policy.without_sizes()
    request = requested(workload, hardware, policy, device=kind, gpu_memory_bytes=budget_bytes)
    return Asked(model, device, hardware, policy, workload, tokenizer, request)


def _wishes(options: LoadOptions) -> Policy:
    """The policy that the options name, with what they say themselves in the place of its own keys.

    The objective, the rules and what they leave open are the policy's; nothing else of the options is read for it.
    """
    policy = options.policy if isinstance(options.policy, Policy) else Policy.load(options.policy)
    check_choice("kv_dtype", options.kv_dtype, ("auto", *KV_DTYPES))
    said = {
        "gpu_memory": None if options.gpu_memory is None else parse_bytes(options.gpu_memory),
        "context": options.max_context,
        "batch": options.max_batch,
        "kv_tokens": options.kv_tokens,
        "kv_dtype": None if options.kv_dtype == "auto" else options.kv_dtype,
        "threads": options.num_threads,
        "elastic": options.elastic or None,
        "speculate": options.speculate,
    }
    return policy.model_copy(update={key: value for key, value in said.items() if value is not None})


def _warn_of_wishes_without_effect(policy: Policy, kind: str, hardware: HardwareProfile) -> None:
    """Say what was asked for and cannot be had; twice the cores are threads that a machine may have."""
    if kind == "cpu" and policy.gpu_memory is not None:
        warnings.warn(
            f"gpu_memory {format_bytes(policy.gpu_memory)} has no effect: this plan has no GPU, the CPU computes all",
            stacklevel=2,
        )
    if policy.threads is not None and policy.threads > 2 * hardware.cores:
        warnings.warn(
            f"{policy.threads} CPU threads are more than the {hardware.cores} cores of {hardware.name} can run at "
            "once, and will wait for each other",
            stacklevel=2,
        )


def _rates(options: LoadOptions, device: str) -> HardwareProfile:
    named = options.hardware
    return (HardwareProfile.named(named) if isinstance(named, str) else named) or machine_profile(device)


def _workload(options: LoadOptions, policy: Policy, model: _Model, kind: str, budget_bytes: int | None) -> Workload:
    """The workload in the sizes that were asked for; on a GPU its prefill chunk is left to the planner unless fixed.

    One sequence is planned for unless more are asked for; under `objective: throughput` many share the KV slots of a
    few.
    """
    config, formats = model.config, model.formats
    context = choose_context(policy.context, config)
    batch, kv_tokens = choose_batch(policy.batch, policy.kv_tokens, context, policy.objective)
    sizes = Sizes(
        max_context=context,
        max_batch=batch,
        kv_tokens=kv_tokens,
        page_size=options.page_size,
        kv_dtype=policy.kv_dtype or natural_kv_dtype(formats.label),
        prefill_chunk=policy.prefill_chunk or DEFAULT_PREFILL_CHUNK,
        prefix_cache=options.prefix_cache,
    )
    spec, name = replace(model_spec(config, formats), taps=model.taps), model_name(options.model, model.path)
    from_head = shares_head(formats, config) and kind == "cpu"

    def build(prefill_chunk: int) -> Workload:
        return build_workload(spec, formats, name, replace(sizes, prefill_chunk=prefill_chunk), from_head)

    if policy.prefill_chunk is None and budget_bytes is not None:
        return with_chunk_choices(build, budget_bytes)
    return build(sizes.prefill_chunk)
