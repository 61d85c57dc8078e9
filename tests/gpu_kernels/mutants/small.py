"""Planted bugs of the small ops: norms, activations, rows, rotation and what the cache keeps."""

from __future__ import annotations

from functools import partial

import torch

from tests.support.kernels import kernel_checks as checks
from tests.support.kernels.code_pages import check_rope_append
from tests.support.kernels.delta_cases import Shape, check_delta_step, check_drafts

RMS_NORM = partial(checks.check_rms_norm, device="cpu", rows=2, hidden=100)
SILU_MUL = partial(checks.check_silu_mul, device="cpu", rows=2, units=3)
LAYER_NORM = partial(checks.check_layer_norm, device="cpu", rows=2, hidden=100, has_bias=True)
LAYER_NORM_ALONE = partial(checks.check_layer_norm, device="cpu", rows=2, hidden=100, has_bias=False)
GATHER = partial(checks.check_gather_columns, device="cpu", rows=2, features=1100)
GELU = partial(checks.check_gelu, device="cpu", rows=2, features=1100)
GELU_MUL = partial(checks.check_gelu_mul, device="cpu", rows=2, units=3)
RMS_NORM_ADDED = partial(checks.check_rms_norm_added, device="cpu", rows=2, hidden=100)
ADD_ROWS = partial(checks.check_add_rows, device="cpu", rows=3, columns=1030)
COPY_ROWS = partial(checks.check_copy_rows, device="cpu", rows=3, columns=1030)
ROPE = partial(
    checks.check_rope_append,
    device="cpu",
    dtype=torch.float32,
    num_kv_heads=2,
    queries_per_kv=2,
    head_dim=24,
    rotary_dim=16,
    norms=(True, True),
)
DELTA = partial(check_delta_step, device="cpu", shape=Shape(2, 3, 12, 20, 3, True))
DRAFTS = partial(check_drafts, shape=Shape(2, 3, 12, 20, 3, True))
SPREAD = partial(check_rope_append, device="cpu", kv_dtype="q4", head_dim=40)

# name: (file, op, check, right text, wrong text)
MUTANTS = {
    "norm without epsilon": ("elementwise", "rms_norm", RMS_NORM, "/ HIDDEN + eps", "/ HIDDEN"),
    "mean over the padded row": ("elementwise", "rms_norm", RMS_NORM, "axis=0) / HIDDEN", "axis=0) / columns.shape[0]"),
    "a copy reads rows of the target's stride": (
        "row_copies",
        "copy_rows",
        COPY_ROWS,
        "row * source_stride",
        "row * target_stride",
    ),
    "a copy writes past the last column": (
        "row_copies",
        "copy_rows",
        COPY_ROWS,
        "inside = column < columns",
        "inside = column <= columns",
    ),
    "an addition forgets what was there": ("row_copies", "add_rows", ADD_ROWS, "if ADD:", "if not ADD:"),
    "an addition reads the residual at the other stride": (
        "row_copies",
        "add_rows",
        ADD_ROWS,
        "tl.load(target + row * target_stride",
        "tl.load(target + row * source_stride",
    ),
    "a copy leaves out what is behind a block": (
        "row_copies",
        "copy_rows",
        COPY_ROWS,
        "-(-columns // COPY_BLOCK)",
        "1",
    ),
    "layer norm around zero": (
        "small/layer_norm",
        "layer_norm",
        LAYER_NORM,
        "values - tl.sum(values, axis=0) / HIDDEN",
        "values",
    ),
    "layer norm counts what is past the row": (
        "small/layer_norm",
        "layer_norm",
        LAYER_NORM,
        "tl.where(inside, values - tl.sum(values, axis=0) / HIDDEN, 0.0)",
        "(values - tl.sum(values, axis=0) / HIDDEN)",
    ),
    "layer norm without epsilon": ("small/layer_norm", "layer_norm", LAYER_NORM, "/ HIDDEN + eps", "/ HIDDEN"),
    "layer norm without its bias": ("small/layer_norm", "layer_norm", LAYER_NORM, "if HAS_BIAS", "if not HAS_BIAS"),
    "layer norm with a bias that it lacks": (
        "small/layer_norm",
        "layer_norm",
        LAYER_NORM_ALONE,
        "if HAS_BIAS",
        "if True",
    ),
    "gelu without its square": ("small/gelu", "gelu", GELU, "0.044715 * values * values", "0.0"),
    "a gather of one block": ("small/gather", "gather_columns", GATHER, "tl.program_id(1) * BLOCK", "0 * BLOCK"),
    "a gather that is a copy": ("small/gather", "gather_columns", GATHER, "x_stride + sources", "x_stride + columns"),
    "gelu of one block": ("small/gelu", "gelu", GELU, "tl.program_id(1) * BLOCK", "0 * BLOCK"),
    "gelu without its cubic": ("elementwise", "gelu_mul", GELU_MUL, "gate * gate * 0.044715", "0.0"),
    "a norm that writes where it should add": (
        "elementwise",
        "rms_norm",
        RMS_NORM_ADDED,
        "scaled += tl.load",
        "tl.load",
    ),
    "up column off by one": ("elementwise", "silu_mul", SILU_MUL, "source + 16", "source + 15"),
    "rotation turns backwards": ("rope", "rope_append", ROPE, "-sine, sine)", "sine, -sine)"),
    "norm weight of the wrong partner": (
        "rope",
        "rope_append",
        ROPE,
        "_normed(others, norm.weight, partner,",
        "_normed(others, norm.weight, dims,",
    ),
    "k is stored unrotated": (
        "rope",
        "rope_append",
        ROPE,
        "_normed_and_rotated(head, Norm(k_norm, eps, HAS_K_NORM), cos + angle, sin + angle, HEAD_DIM, HEAD_PAD, HALF)",
        "tl.load(head + dims, mask=inside, other=0.0)",
    ),
    "only k is spread": (
        "rope",
        "rope_append",
        SPREAD,
        "turned = _spread(turned, HEAD_PAD, STAGES)\n        target",
        "target",
    ),
    "only q is spread": (
        "rope",
        "rope_append",
        SPREAD,
        "slot, _spread(turned, HEAD_PAD, STAGES),",
        "slot, turned,",
    ),
    "spread without its scale": ("rope", "rope_append", SPREAD, "row * 2.0 ** (-0.5 * STAGES)", "row"),
    "spread without its last stage": (
        "rope",
        "rope_append",
        SPREAD,
        "tl.static_range(STAGES)",
        "tl.static_range(STAGES - 1)",
    ),
    "differences the other way round": (
        "rope",
        "rope_append",
        SPREAD,
        "tl.join(a + b, a - b)",
        "tl.join(a + b, b - a)",
    ),
    "recalled by a state that has not decayed": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "v - decay * tl.sum(",
        "v - tl.sum(",
    ),
    "inputs are not kept": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "tl.store(to + (TAPS - 2) * WIDTH, newest, mask=inside)",
        "tl.debug_barrier()",
    ),
    "kept inputs do not move": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "tl.load(kept + (tap + 1) * WIDTH",
        "tl.load(kept + tap * WIDTH",
    ),
    "inputs of another key head": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "is_key * (KEY_HEADS * KEY_DIM) + head * KEY_DIM",
        "is_key * (KEY_HEADS * KEY_DIM)",
    ),
    "values of the first head": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "unit + 2 * KEY_DIM + value * VALUE_DIM",
        "unit + 2 * KEY_DIM",
    ),
    "a draft that its sequence takes in": ("small/delta_step", "delta_step", DRAFTS, "to = beside", "to = state"),
    "a draft that goes on from in front of the one before": (
        "small/delta_step",
        "delta_step",
        DRAFTS,
        "        state = to\n",
        "",
    ),
    "inputs of a draft that its sequence keeps": (
        "small/delta_step",
        "delta_step",
        DRAFTS,
        "state + matrices, to + matrices",
        "state + matrices, state + matrices",
    ),
    "queries that are not scaled": ("small/delta_step", "delta_step", DELTA, "axis=0) * scale", "axis=0)"),
    "lengths over the padded key": ("small/delta_step", "delta_step", DELTA, "pair % KEY_PAD < KEY_DIM", "pair >= 0"),
    "strengths for decays": ("small/delta_step", "delta_step", DELTA, "gates + VALUE_HEADS + head", "gates + head"),
    "delta norm without epsilon": ("small/delta_step", "delta_step", DELTA, "/ VALUE_DIM + eps", "/ VALUE_DIM"),
    "delta norm over the padded head": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "/ VALUE_DIM + eps",
        "/ COLUMNS + eps",
    ),
    "value heads in the other order": ("small/delta_step", "delta_step", DELTA, "if IS_TILED", "if not IS_TILED"),
    "a later row of a sequence is left out": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "tl.sum(is_own.to(tl.int32), axis=0), 0)",
        "1, 0)",
    ),
    "a later row of a sequence is taken twice": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "tl.sum(is_own.to(tl.int32), axis=0), 0)",
        "tl.sum(is_own.to(tl.int32), axis=0), 1)",
    ),
    "the state of the row's number": (
        "small/delta_step",
        "delta_step",
        DELTA,
        "states + sequence * states_row",
        "states + first * states_row",
    ),
    "slot of another KV head": ("rope", "rope_append", ROPE, "slots_stride + kv_head)", "slots_stride)"),
}
