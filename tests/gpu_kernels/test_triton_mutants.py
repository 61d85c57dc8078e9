"""Planted bugs: every mutated kernel must fail the check that the right one passes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import kernel_checks as checks
from tests.support import planted
from tests.support.code_pages import check_rope_append

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels import activation, attention, linear_layer
from gpu_kernels.linear_layer import linear

BF16, FP32 = torch.bfloat16, torch.float32
ROOT = Path(attention.__file__).parent


def tiled(multiply, weight_dtype):
    """Few rows by the tile for many, of inputs in their own order."""

    def op(x, weight, weight_dtype, bias, out, accumulate):
        multiply(activation.quantize_activation(x, "own"), weight, weight_dtype, bias, out, accumulate)

    checks.check_linear(op, "cpu", weight_dtype, rows=5, num_blocks=3, in_features=192)


DECODE = partial(
    checks.check_decode,
    device="cpu",
    dtype=FP32,
    num_kv_heads=2,
    queries_per_kv=2,
    head_dim=16,
    page_size=16,
    length=600,
    ranges=[(5, 240), (300, 300), (63, 65)],
)
WHOLE_BLOCKS = partial(
    checks.check_prefill,
    device="cpu",
    dtype=FP32,
    q_len=70,
    num_kv_heads=1,
    queries_per_kv=2,
    head_dim=16,
    page_size=32,
    start=9,
    stop=330,
    q_start=260,
    window=150,
)
PREFILL = partial(
    checks.check_prefill,
    device="cpu",
    dtype=FP32,
    q_len=70,
    num_kv_heads=2,
    queries_per_kv=2,
    head_dim=16,
    page_size=16,
    start=9,
    stop=98,
    q_start=28,
    window=20,
)


def check_counters(op) -> None:
    """Decode attention with counters that are 0 before and must be after; ranges that need some of the splits."""
    arrivals = torch.zeros(6, dtype=torch.int32)

    DECODE(partial(op, arrivals))

    assert not arrivals.any()


def check_unsplit(op) -> None:
    """Decode attention whose programs walk several blocks each."""
    DECODE(partial(op, torch.zeros(0, dtype=torch.int32)))


MERGE = partial(checks.check_merge, device="cpu", parts=3, shape=(3, 2, 16), empty=[1])
GEMV_Q4 = partial(checks.check_linear, device="cpu", weight_dtype="q4", rows=1, num_blocks=2, in_features=2112)
GEMV_Q8 = partial(checks.check_linear, device="cpu", weight_dtype="q8", rows=1, num_blocks=2, in_features=192)
FLAT_Q4 = partial(checks.check_linear, device="cpu", weight_dtype="q4", rows=18, num_blocks=3, in_features=192)
FLAT_Q8 = partial(checks.check_linear, device="cpu", weight_dtype="q8", rows=18, num_blocks=3, in_features=192)
TILE_Q4 = partial(tiled, weight_dtype="q4")
TILE_Q8 = partial(tiled, weight_dtype="q8")
LONG_FLAT_Q4 = partial(checks.check_linear, device="cpu", weight_dtype="q4", rows=3, num_blocks=2, in_features=1088)
DENSE_Q4 = partial(
    checks.check_linear,
    device="cpu",
    weight_dtype="q4",
    rows=70,
    num_blocks=3,
    in_features=100,
    tolerance=checks.DENSE_NMSE,
)
DENSE_Q8 = partial(DENSE_Q4, weight_dtype="q8")
RMS_NORM = partial(checks.check_rms_norm, device="cpu", rows=2, hidden=100)
SILU_MUL = partial(checks.check_silu_mul, device="cpu", rows=2, units=3)
LAYER_NORM = partial(checks.check_layer_norm, device="cpu", rows=2, hidden=100, has_bias=True)
LAYER_NORM_ALONE = partial(checks.check_layer_norm, device="cpu", rows=2, hidden=100, has_bias=False)
GELU = partial(checks.check_gelu, device="cpu", rows=2, features=1100)
GELU_MUL = partial(checks.check_gelu_mul, device="cpu", rows=2, units=3)
RMS_NORM_ADDED = partial(checks.check_rms_norm_added, device="cpu", rows=2, hidden=100)
ADD_ROWS = partial(checks.check_add_rows, device="cpu", rows=3, columns=1030)
COPY_ROWS = partial(checks.check_copy_rows, device="cpu", rows=3, columns=1030)
ROPE = partial(
    checks.check_rope_append,
    device="cpu",
    dtype=FP32,
    num_kv_heads=2,
    queries_per_kv=2,
    head_dim=24,
    rotary_dim=16,
    norms=(True, True),
)
SPREAD = partial(check_rope_append, device="cpu", kv_dtype="q4", head_dim=40)

# name: (file, op, check, right text, wrong text)
MUTANTS = {
    "decode reads a key past the end": (
        "attention",
        "decode_attention",
        DECODE,
        'scores = tl.where(stored[None, :], scores, float("-inf"))',
        "scores += 0.0",
    ),
    "decode splits overlap by a key": (
        "attention",
        "decode_attention",
        DECODE,
        "tl.minimum(low + split_blocks,",
        "tl.minimum(low + split_blocks + 1,",
    ),
    "decode splits leave a block out": (
        "attention",
        "decode_attention",
        DECODE,
        "low = first_block + split * split_blocks",
        "low = first_block + split * split_blocks + tl.minimum(split, 1)",
    ),
    "decode leaves the last block out": (
        "attention",
        "decode_attention",
        DECODE,
        "tl.cdiv(stop, BLOCK_N) - first_block",
        "stop // BLOCK_N - first_block",
    ),
    "decode reads a key before the start": (
        "attention",
        "decode_attention",
        DECODE,
        "stored = (positions >= first) & (positions < stop)",
        "stored = positions < stop",
    ),
    "decode takes the page of another block": (
        "attention",
        "counted_decode_attention",
        check_unsplit,
        "load_page_ids(table, (block + 1) * BLOCK_N, first",
        "load_page_ids(table, block * BLOCK_N, first",
    ),
    "decode begins with another page": (
        "attention",
        "decode_attention",
        DECODE,
        "load_page_ids(table, low * BLOCK_N, first",
        "load_page_ids(table, first, first",
    ),
    "a program that is not needed arrives": (
        "attention",
        "counted_decode_attention",
        check_counters,
        "if split >= num_splits:",
        "if split > num_splits:",
    ),
    "every program of the grid is waited for": (
        "attention",
        "counted_decode_attention",
        check_counters,
        "== num_splits - 1:",
        "== tl.num_programs(1) - 1:",
    ),
    "the last but one merges": (
        "attention",
        "counted_decode_attention",
        check_counters,
        "== num_splits - 1:",
        "== num_splits - 2:",
    ),
    "the counter is not cleared": (
        "attention",
        "counted_decode_attention",
        check_counters,
        "tl.store(arrivals + pair, 0)",
        "tl.store(arrivals + pair, num_splits)",
    ),
    "all KV heads share a counter": (
        "attention",
        "counted_decode_attention",
        check_counters,
        "tl.atomic_add(arrivals + pair,",
        "tl.atomic_add(arrivals + pair * 0,",
    ),
    "merged heads go to another KV head": (
        "attention",
        "decode_attention",
        DECODE,
        "out += batch * out_row_stride + kv_head * QUERIES_PER_KV * out_head_stride",
        "out += batch * out_row_stride",
    ),
    "decode ignores kv_start": (
        "attention",
        "decode_attention",
        DECODE,
        "first = tl.load(kv_start + batch)",
        "first = tl.load(kv_start + batch) * 0",
    ),
    "decode has no guard for an empty range": (
        "attention",
        "decode_attention",
        DECODE,
        "nonzero = tl.where(total == 0.0, 1.0, total)",
        "nonzero = total",
    ),
    "values are keys": (
        "attention",
        "decode_attention",
        DECODE,
        "load_block(k_pages, v_pages,",
        "load_block(k_pages, k_pages,",
    ),
    "lse in base 2": (
        "attention",
        "decode_attention",
        DECODE,
        "(maximum + tl.log2(nonzero)) * LN_2",
        "(maximum + tl.log2(nonzero))",
    ),
    "maximum is not whole": (
        "attention",
        "decode_attention",
        partial(DECODE, dtype=torch.bfloat16),
        "tl.ceil(tl.max(scores, axis=1) * scale)",
        "tl.max(scores, axis=1) * scale",
    ),
    "scores are not scaled": (
        "attention",
        "prefill_attention",
        PREFILL,
        "tl.exp2(scores * scale -",
        "tl.exp2(scores -",
    ),
    "total is not rescaled": ("attention", "prefill_attention", PREFILL, "total = total * correction", "total = total"),
    "sum is not rescaled": ("attention", "prefill_attention", PREFILL, "acc * correction[:, None]", "acc"),
    "no guard for a row without a key": (
        "attention",
        "prefill_attention",
        partial(PREFILL, start=90, window=0),
        'tl.where(new_maximum == float("-inf"), 0.0, new_maximum)',
        "new_maximum",
    ),
    "causal off by one": (
        "attention",
        "prefill_attention",
        PREFILL,
        "tl.minimum(newest_seen + 1, high)",
        "tl.minimum(newest_seen, high)",
    ),
    "not causal": ("attention", "prefill_attention", PREFILL, "tl.minimum(newest_seen + 1, high)", "high"),
    "window off by one": (
        "attention",
        "prefill_attention",
        PREFILL,
        "tl.maximum(newest_seen - window + 1, low)",
        "tl.maximum(newest_seen - window, low)",
    ),
    "window ends early": (
        "attention",
        "prefill_attention",
        PREFILL,
        "tl.maximum(kv_start, oldest - window + 1)",
        "tl.maximum(kv_start, oldest - window + 2)",
    ),
    "rows of a group count as places": (
        "attention",
        "prefill_attention",
        PREFILL,
        "newest_seen = q_start + rows // QUERIES_PER_KV",
        "newest_seen = q_start + rows",
    ),
    "prefill ignores kv_start": (
        "attention",
        "prefill_attention",
        partial(PREFILL, window=0),
        "tl.maximum(newest_seen - window + 1, low)",
        "newest_seen - window + 1",
    ),
    "the first rows see the window of the last": (
        "attention",
        "prefill_attention",
        WHOLE_BLOCKS,
        "whole_low = tl.maximum(kv_start, newest - window + 1)",
        "whole_low = low",
    ),
    "whole blocks begin before the keys": (
        "attention",
        "prefill_attention",
        partial(WHOLE_BLOCKS, window=0),
        "tl.cdiv(whole_low, BLOCK_N)",
        "whole_low // BLOCK_N",
    ),
    "whole blocks end after the diagonal": (
        "attention",
        "prefill_attention",
        WHOLE_BLOCKS,
        "whole_high = tl.minimum(kv_stop, oldest + 1)",
        "whole_high = tl.minimum(kv_stop, newest + 1)",
    ),
    "whole blocks end after the keys": (
        "attention",
        "prefill_attention",
        partial(WHOLE_BLOCKS, stop=205, window=0),
        "whole_high = tl.minimum(kv_stop, oldest + 1)",
        "whole_high = tl.minimum(kv_stop + 31, oldest + 1)",
    ),
    "an edge block is taken twice": (
        "attention",
        "prefill_attention",
        WHOLE_BLOCKS,
        "block = edge + tl.where(edge < first_whole, 0, num_whole)",
        "block = edge",
    ),
    "an edge block is left out": (
        "attention",
        "prefill_attention",
        WHOLE_BLOCKS,
        "range(first_block, stop_block - num_whole)",
        "range(first_block, stop_block - num_whole - 1)",
    ),
    "whole blocks take the page before": (
        "attention",
        "prefill_attention",
        WHOLE_BLOCKS,
        "load_page_ids(table, (block + 1) * BLOCK_N, low",
        "load_page_ids(table, block * BLOCK_N, low",
    ),
    "edge blocks take the page after the first": (
        "attention",
        "prefill_attention",
        WHOLE_BLOCKS,
        "next_block = edge + 1 + tl.where(edge + 1 < first_whole, 0, num_whole)",
        "next_block = edge + 1",
    ),
    "prefill ignores kv_stop": (
        "attention",
        "prefill_attention",
        partial(PREFILL, stop=60),
        " high = tl.minimum(kv_stop,",
        " high = tl.minimum(kv_stop + 1,",
    ),
    "another KV head": (
        "attention",
        "prefill_attention",
        PREFILL,
        "kv_head.to(tl.int64) * table_head_stride",
        "(1 - kv_head).to(tl.int64) * table_head_stride",
    ),
    "merge without the maximum's guard": (
        "attention_merge",
        "merge",
        MERGE,
        'safe_maximum = tl.where(maximum == float("-inf"), 0.0, maximum)',
        "safe_maximum = maximum",
    ),
    "merge without normalisation": (
        "attention_merge",
        "merge",
        MERGE,
        "acc / tl.where(total == 0.0, 1.0, total)",
        "acc",
    ),
    "merge forgets a part": ("attention_merge", "merge", MERGE, "tl.static_range(PARTS)", "tl.static_range(1, PARTS)"),
    "merge averages": ("attention_merge", "merge", MERGE, "total += weight", "total += 1.0"),
    "gemv swaps nibbles": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "packed & 0x0F0F0F0F",
        "(packed >> 4) & 0x0F0F0F0F",
    ),
    "gemv forgets the minima": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "tl.sum(products, axis=1) + offsets",
        "tl.sum(products, axis=1) + 0.0 * offsets",
    ),
    "gemv of q8 keeps the offset": ("quantized_linear", "quantized_linear", GEMV_Q8, "packed ^ -2139062144", "packed"),
    "gemv of q8 uses one scale for both halves": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q8,
        "(other * row_scale[:, None])",
        "(scale * row_scale[:, None])",
    ),
    "gemv reads the inputs of another line": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "lines % 4 * 4 + lines // 4",
        "lines * 2",
    ),
    "gemv warps share a group": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "group = first + step * WARPS + tl.arange(0, WARPS)",
        "group = first + step * WARPS + 0 * tl.arange(0, WARPS)",
    ),
    "a step is left out": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "tl.static_range(UNROLL)",
        "tl.static_range(UNROLL - 1)",
    ),
    "the last group is left out": (
        "quantized_linear",
        "quantized_linear",
        GEMV_Q4,
        "inside = group < num_groups",
        "inside = group < num_groups - 1",
    ),
    "flat swaps nibbles": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q4,
        "tl.join(low_nibbles(packed), high_nibbles(packed))",
        "tl.join(high_nibbles(packed), low_nibbles(packed))",
    ),
    "tile forgets the minima": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q4,
        "acc += row_sum[:, None] * minimum",
        "acc += 0.0 * row_sum[:, None] * minimum",
    ),
    "tile swaps the nibbles": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q4,
        "tl.join(low_nibbles(packed), high_nibbles(packed))",
        "tl.join(high_nibbles(packed), low_nibbles(packed))",
    ),
    "tile multiplies the weights of the step before": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q4,
        "following = step + 1 ",
        "following = step ",
    ),
    "tile of q8 reads the first half twice": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q8,
        "half = 0 if IS_Q4 else following % 2",
        "half = 0",
    ),
    "tile of q8 scales by the other row": (
        "int8_tile",
        "multiply_many_rows",
        TILE_Q8,
        "tl.load(scales + group * scale_stride + row, mask",
        "tl.load(scales + group * scale_stride + (row ^ 1), mask",
    ),
    "flat forgets the minima": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q4,
        "acc += minimum[:, :, None] * row_sum[:, None, :]",
        "acc += 0.0 * minimum[:, :, None] * row_sum[:, None, :]",
    ),
    "flat of q8 keeps the offset": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "signed(packed).reshape",
        "packed.to(tl.int8, bitcast=True).reshape",
    ),
    "flat of q8 uses one scale for both halves": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "_feature_values(header + half * 4,",
        "_feature_values(header,",
    ),
    "flat reads features of another block": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "quad[:, None] // 4",
        "quad[:, None] // 8",
    ),
    "flat orders the scales of a quad otherwise": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "tl.join(_half(words, 0), _half(words, 2)), tl.join(_half(words, 1), _half(words, 3))",
        "tl.join(_half(words, 0), _half(words, 1)), tl.join(_half(words, 2), _half(words, 3))",
    ),
    "flat reads other rows": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "tl.arange(0, ROWS // 8)[None, :] * 8",
        "tl.arange(0, ROWS // 8)[None, :] * 4",
    ),
    "flat takes scales of other rows": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "tl.join(low, high).permute(0, 2, 1)",
        "tl.join(high, low).permute(0, 2, 1)",
    ),
    "flat parts share a group": ("quantized_linear", "quantized_linear", LONG_FLAT_Q4, "warp % PARTS", "warp // PARTS"),
    "flat leaves the last group out": (
        "quantized_linear",
        "quantized_linear",
        LONG_FLAT_Q4,
        "inside = group < num_groups",
        "inside = group < num_groups - 1",
    ),
    "flat leaves a step out": (
        "quantized_linear",
        "quantized_linear",
        LONG_FLAT_Q4,
        "tl.static_range(UNROLL)",
        "tl.static_range(UNROLL - 1)",
    ),
    "flat writes rows past the last": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "(rows_of_tile < rows)",
        "(rows_of_tile < rows + 1)",
    ),
    "flat writes features past the last": (
        "quantized_linear",
        "quantized_linear",
        FLAT_Q8,
        "inside = column < num_blocks * 16",
        "inside = column <= num_blocks * 16",
    ),
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
    "gelu of one block": ("small/gelu", "gelu", GELU, "tl.program_id(1) * BLOCK", "0 * BLOCK"),
    "gelu without its cubic": ("elementwise", "gelu_mul", GELU_MUL, "0.044715 * gate * gate", "0.0"),
    "a norm that writes where it should add": (
        "elementwise",
        "rms_norm",
        RMS_NORM_ADDED,
        "scaled += tl.load",
        "tl.load",
    ),
    "up column off by one": ("elementwise", "silu_mul", SILU_MUL, "source + 16", "source + 15"),
    "rotation turns backwards": ("elementwise", "rope_append", ROPE, "-sine, sine)", "sine, -sine)"),
    "norm weight of the wrong partner": (
        "elementwise",
        "rope_append",
        ROPE,
        "_normed(others, norm, partner,",
        "_normed(others, norm, dims,",
    ),
    "k is stored unrotated": (
        "elementwise",
        "rope_append",
        ROPE,
        "store_row(k_pages, slot, turned,",
        "store_row(k_pages, slot, tl.load(head + dims, mask=inside, other=0.0),",
    ),
    "only k is spread": (
        "elementwise",
        "rope_append",
        SPREAD,
        "turned = _spread(turned, HEAD_PAD, STAGES)\n        target",
        "target",
    ),
    "only q is spread": (
        "elementwise",
        "rope_append",
        SPREAD,
        "turned = _spread(turned, HEAD_PAD, STAGES)\n            store_row",
        "store_row",
    ),
    "spread without its scale": ("elementwise", "rope_append", SPREAD, "row * 2.0 ** (-0.5 * STAGES)", "row"),
    "spread without its last stage": (
        "elementwise",
        "rope_append",
        SPREAD,
        "tl.static_range(STAGES)",
        "tl.static_range(STAGES - 1)",
    ),
    "differences the other way round": (
        "elementwise",
        "rope_append",
        SPREAD,
        "tl.join(a + b, a - b)",
        "tl.join(a + b, b - a)",
    ),
    "slot of another KV head": ("elementwise", "rope_append", ROPE, "slots_stride + kv_head)", "slots_stride)"),
}


def load_mutant(folder: Path, file: str, right: str, wrong: str):
    """The module `file` with every occurrence of `right` replaced, as a new module."""
    return planted.load_mutant(folder, ROOT / f"{file}.py", right, wrong)


@pytest.fixture(autouse=True)
def only_interpreted(device):
    if device != "cpu":
        pytest.skip("mutants run under the interpreter, where a wrong address cannot hurt the device")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives; a right result may lie there otherwise
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    file, op, check, right, wrong = MUTANTS[name]
    mutant = load_mutant(tmp_path, file, right, wrong)

    with pytest.raises(AssertionError):
        check(getattr(mutant, op))


@pytest.mark.parametrize(
    "check,file,op",
    dict.fromkeys((check, file, op) for file, op, check, *_ in MUTANTS.values()),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_right_kernel_passes_every_mutants_check(check, file, op, tmp_path):
    check(getattr(load_mutant(tmp_path, file, "tl", "tl"), op))


# name: (file of a helper, module that uses it, the helper, check of an op, right text, wrong text)
HELPER_MUTANTS = {
    "rounding half up": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(GEMV_Q4, linear),
        "(steps + ROUNDING) - ROUNDING",
        "tl.floor(steps + 0.5)",
    ),
    "zero group divides by zero": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(GEMV_Q4, linear),
        "tl.where(scale == 0.0, 1.0, scale)",
        "scale",
    ),
    "inputs of q4 not reordered": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(FLAT_Q4, linear),
        "high * 32 + quarter * 8 + half * 4 + byte",
        "stored",
    ),
    "inputs of q8 not reordered": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(FLAT_Q8, linear),
        "half * 32 + high * 16 + quarter * 4 + byte",
        "stored",
    ),
    "scales of another row": (
        "activation",
        linear_layer,
        "quantize_activation",
        partial(FLAT_Q8, linear),
        "scales + groups * scale_stride + row",
        "scales + groups * scale_stride + (row ^ 1)",
    ),
    "rounded x without its scale": (
        "activation",
        linear_layer,
        "round_activation",
        partial(DENSE_Q4, linear),
        "steps * scale[:, None]",
        "steps",
    ),
    "rounding reads past a row": (
        "activation",
        linear_layer,
        "round_activation",
        partial(DENSE_Q4, linear),
        "mask=columns < in_features",
        "mask=columns <= in_features",
    ),
    "x is not rounded to int8": (
        "activation",
        linear_layer,
        "round_activation",
        partial(DENSE_Q4, linear),
        "(steps + ROUNDING) - ROUNDING",
        "steps",
    ),
    "dequantising swaps nibbles": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q4, linear),
        "inputs // 4 * 4",
        "(1 - inputs // 4) * 4",
    ),
    "dequantising forgets the minima": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q4, linear),
        "* scale + minimum",
        "* scale",
    ),
    "dequantising has another zero point": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q8, linear),
        "- 128)",
        "- 127)",
    ),
    "dequantising uses one scale for both halves": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q8, linear),
        "span % 2 * 16",
        "0",
    ),
    "dequantising leaves the last span out": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q4, linear),
        "inside = span < num_spans",
        "inside = span < num_spans - 1",
    ),
    "dequantising mixes features": (
        "dequantize",
        linear_layer,
        "dequantize",
        partial(DENSE_Q4, linear),
        "(block * 16 + four * 4 + one)",
        "(block * 16 + four + one * 4)",
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", HELPER_MUTANTS)
def test_mutant_of_a_helper_is_caught(name, tmp_path, monkeypatch):
    file, user, helper, check, right, wrong = HELPER_MUTANTS[name]
    check()
    monkeypatch.setattr(user, helper, getattr(load_mutant(tmp_path, file, right, wrong), helper))

    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    "right,wrong",
    [
        ("weights = tl.exp(part_lse - new_maximum[None, :])", "weights = tl.where(present[:, None], 1.0, 0.0)"),
        ("splits < num_splits", "splits < num_splits - 1"),
        ("total = total * correction", "total = total"),
        ("acc * correction[:, None]", "acc"),
        ("(first + splits) * QUERIES_PER_KV", "splits * QUERIES_PER_KV"),
        ("live = heads < QUERIES_PER_KV", "live = heads < HEADS"),
    ],
    ids=[
        "splits are averaged",
        "the last split is dropped",
        "total is not rescaled",
        "sum is not rescaled",
        "splits of another KV head",
        "heads of another KV head",
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutant_of_the_split_merge_is_caught(right, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "MERGE_ITEMS", 1)  # in several steps
    monkeypatch.setattr(torch, "empty", torch.zeros)  # NaN written where it must not be would look like the guards
    check = partial(DECODE, queries_per_kv=3)
    check(attention.decode_attention)
    monkeypatch.setattr(attention, "merge_splits", load_mutant(tmp_path, "attention_merge", right, wrong).merge_splits)

    with pytest.raises(AssertionError):
        check(attention.decode_attention)
