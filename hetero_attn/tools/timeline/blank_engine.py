"""An engine of any size whose weights and cache hold nothing, over lanes that only record."""

import torch

from cpu_kernels.formats import unit_bytes
from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.stream import PageStream
from hetero_attn.devices import Device
from hetero_attn.engine.build import step_table_bytes_of
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.passes.buffers import make_buffers
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.flag_handover import FlagHandover
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.staging import make_ring
from hetero_attn.lanes.tables import StepTables
from hetero_attn.models.block import BlockWeights
from hetero_attn.models.decoder import ModelWeights, decoder
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.spec.blocks import Declaration, ModelSpec
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.weight_formats import weight_formats
from hetero_attn.spec.weights import LinearSpec
from hetero_attn.tools.timeline.recorded_ops import RecordedHostOps, RecordedWorker
from hetero_attn.tools.timeline.recording import Recording
from hetero_attn.tools.timeline.recording_driver import RecordingDriver
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
    model = decoder(config, weight_formats(plan.workload.weight_dtype))
    buffers = make_buffers(model, plan, lanes)
    engine = Engine(config, plan, blank_weights(model, plan), lanes, KVCache(plan, device, False), buffers)
    for linear in engine.weights.linears:
        for home in (linear.gpu, linear.dram):
            recording.names[home.untyped_storage()._cdata] = linear.spec.name
    return engine, recording


def blank_weights(model: ModelSpec, plan: Plan) -> ModelWeights:
    """Weights of the plan's placements without memory; an embedding of one row of zeros for every token."""
    placed = {
        shard.name: (shard.row_cut, placement)
        for shard, placement in zip(plan.workload.linears, plan.linears, strict=True)
    }
    embed = torch.zeros(1, model.hidden_size, dtype=torch.bfloat16, device="cpu").expand(model.vocab_size, -1)
    layers = tuple(tuple(_block(block, placed, plan) for block in layer) for layer in model.layers)
    return ModelWeights(model, layers, _block(model.head, placed, plan), embed, "bf16")


def _block(block: Declaration, placed: dict[str, tuple[bool, LinearPlacement]], plan: Plan) -> BlockWeights:
    rope = None if block.rope is None else _both(plan.max_context, block.rope.rotary_dim // 2)
    linears = {}
    for linear in block.linears:
        by_rows, placement = placed[linear.name]
        linears[linear.kind] = _linear(linear.by_rows or linear if by_rows else linear, placement, plan)
    vectors = {vector.name: _both(vector.features) for vector in block.vectors}
    vectors |= {matrix.name: _both(matrix.padded_rows, matrix.features) for matrix in block.matrices}
    return BlockWeights(linears, vectors, None if rope is None else (rope, rope))


def _linear(spec: LinearSpec, placement: LinearPlacement, plan: Plan) -> LinearWeights:
    piece_bytes = staging_piece_units(spec.shard, plan.workload) * spec.unit_bytes
    if spec.row_unit:
        home, blocks = placement.gpu_units * spec.row_unit, spec.column_units * spec.unit_rows
        widths = (unit_bytes(spec.format, width) if width else 0 for width in (home, spec.in_features - home))
        gpu, dram = (_blank(blocks, width, dtype=torch.uint8) for width in widths)
        piece_blocks, first = max(1, piece_bytes // max(1, dram.shape[1])), placement.gpu_units
    else:
        width, first = spec.row_bytes, first_dram_unit(plan.workload, placement)
        gpu, dram = (
            _blank(units * spec.unit_rows, width, dtype=torch.uint8)
            for units in (placement.gpu_units, spec.units - first)
        )
        piece_blocks = piece_bytes // spec.unit_bytes * spec.unit_rows
    bias = Activation(None, None)
    if spec.has_bias:
        bias = _both(*spec.bias_shape)
    order = _both(spec.in_features, dtype=torch.int32) if spec.is_reordered else Activation(None, None)
    return LinearWeights(spec, placement, gpu, dram, bias, piece_blocks, first, order)


def _blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _both(*shape: int, dtype: torch.dtype = torch.float32) -> Activation:
    return Activation(_blank(*shape, dtype=dtype), torch.empty(shape, dtype=dtype, device="cpu"))
