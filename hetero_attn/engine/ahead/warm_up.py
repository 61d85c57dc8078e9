"""Compile or map every kernel that a model will use while it loads, not inside its first answer.

CPU kernels depend on dtypes, row counts and head shape, not on widths: each runs once on a few rows of toy size. GPU
kernels are compiled for the widths, strides and alignments that they are launched with: the model's own first steps do
that, and compile nothing else. The numbers that they compute are of no use to anybody.
"""

from collections.abc import Callable, Collection

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import (
    ChunkKeys,
    DeltaRule,
    DeltaStates,
    Pages,
    Partial,
    Picks,
    Rotation,
    Routes,
    RowKeys,
    Scoring,
)
from cpu_kernels.formats import format_of
from cpu_kernels.formats.pages import row_items
from cpu_kernels.formats.weights import BLOCK_FEATURES, block_bytes
from hetero_attn.cache.pages import TORCH_DTYPES
from hetero_attn.checkpoints.loading.run_rows import PLAIN_DTYPES
from hetero_attn.engine.engine import Engine
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.mlp import activation_op
from hetero_attn.spec.delta_config import DeltaConfig
from hetero_attn.spec.experts_config import ExpertsConfig
from hetero_attn.spec.weight_formats import WeightFormats

FLOAT32 = {"dtype": torch.float32, "device": "cpu"}  # whatever the process has made its default

WIDTH = 64
PROMPT_ROWS = {80, 40, 20, 10, 2}  # more than the kernels for few rows take, then one prompt for each of their tiles
DECODE_STEPS = 3  # plainly, captured, replayed
ROW_COUNTS = (1, 4, 65)  # one row, a few, a prompt: the kernels' own tiers


def warm_up(ops: CpuKernels, config: ModelConfig, formats: WeightFormats, kv_dtype: str) -> None:
    """Run every operation once on toy tensors with the model's formats of weights, dtypes and head shape."""

    def run() -> None:
        for heads, head_dim in config.head_shapes:
            _attention(ops, config, kv_dtype, heads, head_dim)
        if formats.reordered:
            x = torch.zeros(1, WIDTH, **FLOAT32)
            ops.gather_columns(x, torch.zeros(WIDTH, dtype=torch.int32, device="cpu"), torch.zeros_like(x))
        if config.delta is not None:
            _delta(ops, config.delta)
        _embedding(ops, formats.embed, config.embedding_scale != 1.0)
        for name in formats.names:
            for rows in ROW_COUNTS:
                _linears(ops, config, name, rows)
                if config.experts is not None:
                    _experts(ops, config.experts, name, rows)

    ops.prepare(run)
    run()
    x, weight = torch.zeros(1, WIDTH, **FLOAT32), torch.ones(WIDTH, **FLOAT32)
    ops.record(lambda: ops.rms_norm(x, weight, 1e-6, x)).run()


def warm_up_copies(ops: CpuKernels) -> None:
    """The same of what a model needs beside a head that drafts for it."""
    rows = torch.zeros(1, WIDTH, **FLOAT32)
    ops.prepare(lambda: ops.copy_rows(rows, rows.clone()))
    ops.copy_rows(rows, rows.clone())


def make_first_steps(
    engine: Engine, on_prepare: Callable[[str], None] = lambda name: None, int8_rows: Collection[int] = ()
) -> None:
    """Run short prompts and some tokens in sequences of their own; on_prepare(name) is called before each kind of them.

    int8_rows: numbers of rows beyond which the GPU multiplies in another way.
    The cache is as empty as before, and the engine's report has counted nothing.
    """
    longest = engine.plan.max_context - DECODE_STEPS
    wanted = PROMPT_ROWS | {rows + 1 for rows in int8_rows}
    rows = sorted((count for count in wanted if count <= min(engine.prefill_chunk, longest)), reverse=True)
    for count in rows:
        on_prepare(f"GPU kernels for prompts of {count} tokens")
        sequence = engine.kv_cache.open(count + DECODE_STEPS)
        engine.prefill(sequence, [0] * count)
        if count == rows[-1]:
            on_prepare("GPU kernels for single tokens")
            for _ in range(DECODE_STEPS):
                engine.decode_step([sequence], [0])
        engine.kv_cache.close(sequence)
    engine.report.forget()


def _embedding(ops: CpuKernels, name: str, is_scaled: bool) -> None:
    kind, out = format_of(name), torch.zeros(1, WIDTH, **FLOAT32)
    if kind.is_row_major:
        rows = torch.zeros(1, WIDTH, dtype=PLAIN_DTYPES[name], device="cpu")
    else:
        rows = torch.zeros(1, kind.block_bytes(WIDTH), dtype=torch.uint8, device="cpu")
    ops.unpack_rows(rows, name, torch.zeros(1, dtype=torch.int64, device="cpu"), out)
    if is_scaled:
        ops.scale_rows(out[:, :1].clone(), out)


def _linears(ops: CpuKernels, config: ModelConfig, weight_dtype: str, rows: int) -> None:
    x, out = torch.zeros(rows, WIDTH, **FLOAT32), torch.zeros(rows, 2 * BLOCK_FEATURES, **FLOAT32)
    weight = torch.zeros(2, block_bytes(weight_dtype, WIDTH), dtype=torch.uint8, device="cpu")
    ones = torch.ones(WIDTH, **FLOAT32)
    if config.layer_norm:
        ops.layer_norm(x, ones, ones if config.norm_bias else None, 1e-6, x)
    else:
        ops.rms_norm(x, ones, 1e-6, x)
    ops.linear(x, weight, weight_dtype, None, out, True)
    activated = x[:, :BLOCK_FEATURES] if config.gated else x[:, : 2 * BLOCK_FEATURES]
    getattr(ops, activation_op(config))(out, activated)


def _experts(ops: CpuKernels, experts: ExpertsConfig, weight_dtype: str, rows: int) -> None:
    x, out = torch.zeros(rows, WIDTH, **FLOAT32), torch.zeros(rows, BLOCK_FEATURES, **FLOAT32)
    ids, weights = torch.zeros(rows, 1, dtype=torch.int32, device="cpu"), torch.zeros(rows, 2, **FLOAT32)
    places, starts = torch.zeros_like(ids), torch.zeros(2, dtype=torch.int32, device="cpu")
    weight = torch.zeros(1, 1, block_bytes(weight_dtype, WIDTH), dtype=torch.uint8, device="cpu")
    router = torch.zeros(BLOCK_FEATURES, WIDTH, **FLOAT32)
    ops.route(x, router, Scoring(gated=True), Routes(ids, places, places.view(-1), starts, weights))
    ops.expert_linear(x, Picks(None, starts, 0), weight, weight_dtype, out)
    if experts.has_bias:
        ops.add_expert_bias(out[:1], Picks(None, starts, 0), out)
    if experts.clamp is not None:
        ops.clamped_silu_mul(x[:, : 2 * BLOCK_FEATURES], *experts.clamp, out)
    ops.combine(out, out, starts[1:], places, weights[:, :1], out)
    ops.scale_rows(weights[:, 1:], out)
    if experts.beside_mlp:
        ops.add_expert_bias(out[:1], Picks(None, starts, 0), out)
        ops.copy_rows(out, out.clone())


def _delta(ops: CpuKernels, delta: DeltaConfig) -> None:
    """One row of one key head, and its gates."""
    key_dim, value_dim, heads = delta.key_dim, delta.value_dim, delta.values_per_key
    features = 2 * key_dim + heads * value_dim
    numbers, norm = torch.zeros(heads, **FLOAT32), torch.zeros(value_dim, **FLOAT32)
    rule = DeltaRule(torch.zeros(delta.kernel, features, **FLOAT32), numbers, numbers, norm, 1e-6)
    states = torch.zeros(1, heads * key_dim * value_dim + (delta.kernel - 1) * features, **FLOAT32)
    projected, out = torch.zeros(1, 1, features + heads * value_dim, **FLOAT32), norm.repeat(1, heads)
    gates, matrix = torch.zeros(1, 2 * heads, **FLOAT32), torch.zeros(1, 64 * WIDTH, dtype=torch.uint8, device="cpu")
    ops.linear(torch.zeros(1, WIDTH, **FLOAT32), matrix, "fp32", None, torch.zeros(1, BLOCK_FEATURES, **FLOAT32))
    ops.delta_step(projected, gates, rule, DeltaStates(states), torch.zeros(1, dtype=torch.int64, device="cpu"), out)


def _attention(ops: CpuKernels, config: ModelConfig, kv_dtype: str, heads: int, head_dim: int) -> None:
    page_size, rows = 4, 2
    shape = (1, page_size, row_items(kv_dtype, head_dim))
    pages = Pages(*(torch.zeros(shape, dtype=TORCH_DTYPES[kv_dtype], device="cpu") for _ in range(2)))
    norm = torch.ones(head_dim, **FLOAT32) if config.qk_norm else None
    angles = torch.zeros(page_size, config.rope.rotary_dim // 2 or head_dim // 2, **FLOAT32)
    qkv, slots = torch.zeros(rows, 1, (heads + 2) * head_dim, **FLOAT32), torch.arange(rows, device="cpu")[:, None]
    query, out = (torch.zeros(rows, heads, head_dim, **FLOAT32) for _ in range(2))
    into = Partial(out, torch.zeros(rows, heads, **FLOAT32))
    positions = torch.arange(rows, device="cpu")
    ops.rope_append(qkv, positions, Rotation(angles, angles, norm, norm, config.rms_norm_eps), query, pages, slots)
    shapes = ((rows, 1, 1), (rows,), (rows,))
    table, start, stop = (torch.zeros(*shape, dtype=torch.int32, device="cpu") for shape in shapes)
    ops.decode_attention(query, pages, RowKeys(table, start, stop + rows), 1.0, into, config.attention_cap)
    ops.prefill_attention(query, pages, ChunkKeys(table[0], 0, rows, 0), 1.0, into, config.attention_cap)
    if config.has_sinks:
        ops.add_sinks(into.lse[0], into)
    if config.gated_attention:
        ops.sigmoid_mul(query, out)
