"""What Python and the hand-over between lanes cost on this machine, measured with the runtime itself.

The kernels' rates do not contain them, and for small models they decide. A toy model, small enough that its arithmetic
is nothing, is run as a real one would be; the differences between few and many layers, and between a GPU alone and one
that
shares its linears with the CPU, are the terms of the cost model: its own step, a layer, a launch, a hand-over.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cpu_kernels import CpuKernels
from hetero_attn.cache.pool import SequenceState
from hetero_attn.devices import Device
from hetero_attn.devices.protocols import Driver
from hetero_attn.engine.build import assemble, build_engine, connect
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.greatest import greatest
from hetero_attn.engine.host_memory import temporary_files_named
from hetero_attn.engine.timed_steps import decode_terms, prefill_terms
from hetero_attn.lanes.host_worker import HostWorker
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.decoder import decoder
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from hetero_attn.spec.config import ModelConfig
from placement.cost.terms import LAUNCHES_PER_LAYER
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Plan
from placement.policy.policy import Policy

# Four heads to a KV head, as in the kernels that the profiler has compiled.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 8, 2, 16, 64
FEW_LAYERS, MANY_LAYERS = 2, 10
PROMPT, CHUNK, CHUNKS = 2, 128, 4  # a chunk has as many rows as take the GPU's path for many
MAX_CONTEXT = 1024
STEPS, COLD_STEPS = 40, 10
SWEEP_BYTES = 128 << 20  # between steps, to drive Python out of the caches
LINEARS_PER_LAYER = 4
BUDGET_BYTES = 2 << 30  # far more than a toy needs, CUDA's own share included; only what a plan uses is taken
CPU = Policy.parse("version: 1")
ON_GPU = Policy.named("gpu_only")
SHARED = Policy.parse(
    """
rules:
  - {match: layers.*.kv, kv: {gpu_heads: all, gpu_tokens: all}}
  - {match: head, gpu: 1}
  - {match: "layers.*", gpu: 0.5, cpu: 0.5}
""",
    "shared",
)

# Prompts by the GPU alone, of weights at home and half streamed, beside steps in which the CPU team is at work: it is
# awake when the prompt begins, as it is when somebody asks.
AT_HOME = Policy.parse(
    """
rules:
  - {match: layers.*.kv, kv: {gpu_heads: all, gpu_tokens: all}}
  - {match: head, gpu: 0, cpu: 1}
  - {match: "layers.*", gpu: 1}
""",
    "at home",
)
STREAMED = Policy.parse(
    """
rules:
  - {match: layers.*.kv, kv: {gpu_heads: all, gpu_tokens: all}}
  - {match: head, gpu: 0, cpu: 1}
  - {match: "layers.*", gpu: 0.5, tiers: {"1": {cpu: 0.5}, "65+": {cpu: 0}}}
""",
    "streamed",
)

MakeDriver = Callable[[], Driver]


def with_runtime_costs(profile: HardwareProfile, device: str, make_driver: MakeDriver | None = None) -> HardwareProfile:
    """The profile with Python's and the lanes' own costs measured; takes a second or two.

    device: cpu | cuda | emulated. make_driver: makes the device driver to measure instead of the usual one.
    """
    with ExitStack() as kept:
        with temporary_files_named("the small models that are measured"):
            folder = kept.enter_context(tempfile.TemporaryDirectory(prefix="hetero-attn-profile-"))
            toys = {layers: write_toy(Path(folder) / str(layers), layers) for layers in (FEW_LAYERS, MANY_LAYERS)}
        profile = replace(profile, **cpu_costs(toys[MANY_LAYERS], profile))
        if device != "cpu":
            profile = replace(profile, **gpu_costs(toys, profile, device, make_driver))
    return profile


def cpu_costs(toy: Path, profile: HardwareProfile) -> dict[str, Any]:
    """step_overhead_s of a recorded step, with what the weights of a large model leave of Python in the caches and as
    it is, and layer_overhead_s of a step that is not recorded: all beyond the operations themselves."""
    with _engine(toy, CPU, profile, "cpu", None) as engine:
        cold, decode, prefill = (
            _seconds(engine, _decode, cold=True),
            _seconds(engine, _decode),
            _seconds(engine, _prefill),
        )
        sequence = engine.kv_cache.open()
        in_step = sum(decode_terms(engine, sequence, 1).values())
        in_prompt = sum(prefill_terms(engine, sequence, [1] * PROMPT).values())
    step = max(0.0, decode - in_step)
    return {
        "step_overhead_s": max(step, cold - in_step),
        "cached_step_overhead_s": step,
        "layer_overhead_s": max(0.0, prefill - in_prompt - step) / MANY_LAYERS,
    }


def gpu_costs(
    toys: dict[int, Path], profile: HardwareProfile, device: str, make_driver: MakeDriver | None
) -> dict[str, Any]:
    """launch_overhead_s, step_overhead_s and handover_s from steps of the GPU alone and of shared linears, the costs of
    queueing from prompts."""
    times = {}
    for name, layers, policy in (
        ("few", FEW_LAYERS, ON_GPU),
        ("many", MANY_LAYERS, ON_GPU),
        ("shared", MANY_LAYERS, SHARED),
    ):
        with _engine(toys[layers], policy, profile, device, make_driver) as engine:
            times[name] = _seconds(engine, _decode)
            if policy is ON_GPU:
                times[f"{name}, cold"] = _seconds(engine, _decode, cold=True)
    layer = max(0.0, times["many"] - times["few"]) / (MANY_LAYERS - FEW_LAYERS)
    handover = max(0.0, times["shared"] - times["many"]) / (MANY_LAYERS * LINEARS_PER_LAYER)
    return {
        "launch_overhead_s": layer / LAUNCHES_PER_LAYER,
        **queueing_costs(toys, profile, device, make_driver),
        "step_overhead_s": max(0.0, times["few, cold"] - FEW_LAYERS * layer),
        "cached_step_overhead_s": max(0.0, times["few"] - FEW_LAYERS * layer),
        "handover_s": handover,
    }


def queueing_costs(
    toys: dict[int, Path], profile: HardwareProfile, device: str, make_driver: MakeDriver | None
) -> dict[str, float]:
    """gpu_layer_overhead_s and gpu_product_overhead_s: what a layer adds to a prompt in chunks that are left running,
    with four products and, half of each linear streamed, with eight."""
    layer_s = []
    for policy in (AT_HOME, STREAMED):
        seconds = {}
        for layers in (FEW_LAYERS, MANY_LAYERS):
            with _engine(toys[layers], policy, profile, device, make_driver) as engine:
                seconds[layers] = _seconds(engine, _chunks, before=_decode)
        added = max(0.0, seconds[MANY_LAYERS] - seconds[FEW_LAYERS]) / (MANY_LAYERS - FEW_LAYERS)
        layer_s.append(added / CHUNKS)
    at_home, streamed = layer_s
    product_s = max(0.0, streamed - at_home) / LINEARS_PER_LAYER
    return {"gpu_layer_overhead_s": at_home, "gpu_product_overhead_s": product_s}


@contextmanager
def _engine(
    toy: Path, policy: Policy, profile: HardwareProfile, device: str, make_driver: MakeDriver | None
) -> Iterator[Engine]:
    budget = None if device == "cpu" else min(BUDGET_BYTES, profile.gpu_memory_bytes)
    planned = settle(
        LoadOptions(
            model=toy,
            policy=policy,
            gpu_memory=budget,
            dtype="bf16",
            device=device,
            hardware=profile,
            max_context=MAX_CONTEXT,
            max_batch=1,
            num_threads=profile.cores,
        )
    )
    engine = (
        build_engine(planned) if make_driver is None else assemble(planned, lanes_over(planned.plan, make_driver()))
    )
    try:
        yield engine
    finally:
        engine.close()


def lanes_over(plan: Plan, driver: Driver) -> Lanes:
    """The overlapping lanes of a plan over a device driver that is there."""
    worker = HostWorker()
    return connect(plan, CpuKernels(plan.num_threads), Device(driver, plan.gpu_memory_bytes), worker)


def _decode(engine: Engine, sequence: SequenceState) -> None:
    greatest(engine.decode_step([sequence], [1])[0])


def _prefill(engine: Engine, sequence: SequenceState) -> None:
    greatest(engine.prefill(sequence, [1] * PROMPT))


def _chunks(engine: Engine, sequence: SequenceState) -> None:
    """A prompt in chunks of which each is queued while the one before may still run."""
    assert engine.kv_cache.rewind(sequence, 0), "the toy's context is short, so every prompt begins anew"
    for chunk in range(CHUNKS):
        engine.prefill(sequence, [1] * CHUNK, logits=chunk == CHUNKS - 1)


def _seconds(
    engine: Engine,
    work: Callable[[Engine, SequenceState], None],
    cold: bool = False,
    before: Callable[[Engine, SequenceState], None] | None = None,
) -> float:
    """Median time of a step. cold: between steps read as many bytes as a large model's step does. before: untimed work
    ahead of each."""
    sequence, times = engine.kv_cache.open(), []
    weights = torch.ones(SWEEP_BYTES if cold else 0, dtype=torch.uint8, device="cpu")
    for _ in range((COLD_STEPS if cold or before else STEPS) + 2):
        if cold:
            engine.lanes.host_ops.sweep(weights)
        if before is not None:
            before(engine, sequence)
        started = time.perf_counter()
        work(engine, sequence)
        times.append(time.perf_counter() - started)
    engine.kv_cache.close(sequence)
    return statistics.median(times[2:])


def write_toy(folder: Path, layers: int) -> Path:
    """A checkpoint of a Llama with `layers` tiny layers, all weights zero, in `folder`; returns it."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in decoder(ModelConfig.from_dir(folder)).tensors.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))
    return folder
