"""An engine of any size whose weights and cache hold nothing, over lanes that only record."""

import torch

from cpu_kernels.formats import unit_bytes
from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.stream import PageStream
from hetero_attn.devices import Device
from hetero_attn.engine.build import step_table_bytes_of
from hetero_attn.engine.engine import Engine, make_buffers
from hetero_attn.lanes.flag_handover import FlagHandover
from hetero_attn.lanes.lanes import Activation, Lanes
from hetero_attn.lanes.staging import make_ring
from hetero_attn.lanes.tables import StepTables
from hetero_attn.models.decoder import LayerWeights, ModelWeights
from hetero_attn.ops.attend import AttentionParameters
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.weight_formats import weight_formats
from hetero_attn.spec.weights import LayerSpec, LinearSpec, model_spec
from hetero_attn.tools.timeline.recording import RecordedHostOps, RecordedWorker, Recording, RecordingDriver
from placement.plan.memory import LinearPlacement, first_dram_unit, staging_piece_units
from placement.plan.plan import Plan


def blank_engine(config: ModelConfig, plan: Plan) -> tuple[Engine, Recording]:
    """The engine of a plan, and what its steps will be recorded in."""
    recording = Recording()
    device, host_ops = Device(RecordingDriver(recording)), RecordedHostOps(recording)
    handover = FlagHandover(device, RecordedWorker(recording), host_ops, captures=True)  # type: ignore[arg-type]
    tables = StepTables(device, step_table_bytes_of(plan))
    ring, pages = make_ring(plan, device), PageStream(device, plan.workload)
    lanes = Lanes(host_ops, device, ring, tables, handover, pages)  # type: ignore[arg-type]
    buffers = make_buffers(config, plan, lanes)
    engine = Engine(config, plan, blank_weights(config, plan), lanes, KVCache(plan, device, False), buffers)
    for linear in engine.weights.linears:
        for home in (linear.gpu, linear.dram):
            recording.names[home.untyped_storage()._cdata] = linear.spec.name
    return engine, recording


def blank_weights(config: ModelConfig, plan: Plan) -> ModelWeights:
    """Weights of the plan's placements without memory; an embedding of one row of zeros for every token."""
    spec = model_spec(config, plan.shape == "paired", weight_formats(plan.workload.weight_dtype))
    placements = {placement.name: placement for placement in plan.linears}
    norm = _blank(config.hidden_size)
    embed = torch.zeros(1, config.hidden_size, dtype=torch.bfloat16, device="cpu").expand(config.vocab_size, -1)
    layers = tuple(_layer(config, plan, index, layer, placements) for index, layer in enumerate(spec.layers))
    return ModelWeights(layers, _linear(spec.head, placements["head"], plan), embed, "bf16", norm, config.rms_norm_eps)


def _layer(
    config: ModelConfig, plan: Plan, index: int, spec: LayerSpec, placements: dict[str, LinearPlacement]
) -> LayerWeights:
    angles, none = _blank(plan.max_context, config.rope.rotary_dim // 2), Activation(None, None)
    cos = Activation(angles, torch.empty(angles.shape, device="cpu"))
    head_norm = (
        none if spec.q_norm is None else Activation(_blank(config.head_dim), torch.empty(config.head_dim, device="cpu"))
    )
    attention = AttentionParameters(
        config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window[index], config.rms_norm_eps,
        cos, cos, head_norm, head_norm,
    )  # fmt: skip
    linears = {linear.kind: _linear(linear, placements[linear.name], plan) for linear in spec.linears}
    norm = _blank(config.hidden_size)
    return LayerWeights(**linears, input_norm=norm, post_attention_norm=norm, attention=attention)


def _linear(spec: LinearSpec, placement: LinearPlacement, plan: Plan) -> LinearWeights:
    piece_bytes = staging_piece_units(spec.shard(), plan.workload) * spec.unit_bytes
    if spec.row_unit:
        home, blocks = placement.gpu_units * spec.row_unit, spec.column_units * spec.unit_rows
        widths = (unit_bytes(spec.format, width) if width else 0 for width in (home, spec.in_features - home))
        gpu, dram = (_blank(blocks, width, dtype=torch.uint8) for width in widths)
        piece_blocks, first = max(1, piece_bytes // max(1, dram.shape[1])), placement.gpu_units
    else:
        width, first = unit_bytes(spec.format, spec.in_features), first_dram_unit(plan.workload, placement)
        gpu, dram = (
            _blank(units * spec.unit_rows, width, dtype=torch.uint8)
            for units in (placement.gpu_units, spec.units - first)
        )
        piece_blocks = piece_bytes // spec.unit_bytes * spec.unit_rows
    bias = Activation(None, None)
    if spec.has_bias:
        bias = Activation(_blank(spec.out_features), torch.empty(spec.out_features, device="cpu"))
    return LinearWeights(spec, placement, gpu, dram, bias, piece_blocks, first)


def _blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
