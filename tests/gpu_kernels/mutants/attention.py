"""Planted bugs of attention, of its split merge and of its partials."""

from __future__ import annotations

from functools import partial

import torch

from gpu_kernels.attention import decode, prefill
from tests.support.kernels import kernel_checks as checks

DECODE = partial(
    checks.check_decode,
    device="cpu",
    dtype=torch.float32,
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
    dtype=torch.float32,
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
    dtype=torch.float32,
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


CAPPED_DECODE, CAPPED_PREFILL = (partial(check, cap=0.7) for check in (DECODE, PREFILL))
CAPPED_WHOLE = partial(WHOLE_BLOCKS, cap=0.7)


def check_counters(op) -> None:
    """Decode attention with counters that are 0 before and must be after; ranges that need some of the splits."""
    arrivals = torch.zeros(6, dtype=torch.int32)

    DECODE(partial(op, arrivals))

    assert not arrivals.any()


def check_unsplit(op) -> None:
    """Decode attention whose programs walk several blocks each."""
    DECODE(partial(op, torch.zeros(0, dtype=torch.int32)))


MERGE = partial(checks.check_merge, device="cpu", parts=3, shape=(3, 2, 16), empty=[1])

# name: (file, op, check, right text, wrong text)
MUTANTS = {
    "decode reads a key past the end": (
        "attention/decode",
        "decode_attention",
        DECODE,
        'scores = tl.where(stored[None, :], scores, float("-inf"))',
        "scores += 0.0",
    ),
    "decode splits overlap by a key": (
        "attention/decode",
        "decode_attention",
        DECODE,
        "tl.minimum(low + split_blocks,",
        "tl.minimum(low + split_blocks + 1,",
    ),
    "decode splits leave a block out": (
        "attention/decode",
        "decode_attention",
        DECODE,
        "(first_block + split * split_blocks,",
        "(first_block + split * split_blocks + tl.minimum(split, 1),",
    ),
    "decode leaves the last block out": (
        "attention/decode",
        "decode_attention",
        DECODE,
        "tl.cdiv(stop, BLOCK_N) - first_block",
        "stop // BLOCK_N - first_block",
    ),
    "decode reads a key before the start": (
        "attention/decode",
        "decode_attention",
        DECODE,
        "stored = (positions >= between[0]) & (positions < between[1])",
        "stored = positions < between[1]",
    ),
    "decode takes the page of another block": (
        "attention/decode",
        "counted_decode_attention",
        check_unsplit,
        "load_page_ids(keys.table, rows, (block + 1) * BLOCK_N,",
        "load_page_ids(keys.table, rows, block * BLOCK_N,",
    ),
    "decode begins with another page": (
        "attention/decode",
        "decode_attention",
        DECODE,
        "load_page_ids(keys.table, rows, low * BLOCK_N,",
        "load_page_ids(keys.table, rows, between[0],",
    ),
    "a program that is not needed arrives": (
        "attention/decode",
        "counted_decode_attention",
        check_counters,
        "if split >= num_splits:",
        "if split > num_splits:",
    ),
    "every program of the grid is waited for": (
        "attention/decode",
        "counted_decode_attention",
        check_counters,
        "== num_splits - 1:",
        "== tl.num_programs(1) - 1:",
    ),
    "the last but one merges": (
        "attention/decode",
        "counted_decode_attention",
        check_counters,
        "== num_splits - 1:",
        "== num_splits - 2:",
    ),
    "the counter is not cleared": (
        "attention/decode",
        "counted_decode_attention",
        check_counters,
        "tl.store(arrivals + pair, 0)",
        "tl.store(arrivals + pair, num_splits)",
    ),
    "all KV heads share a counter": (
        "attention/decode",
        "counted_decode_attention",
        check_counters,
        "tl.atomic_add(arrivals + pair,",
        "tl.atomic_add(arrivals + pair * 0,",
    ),
    "merged heads go to another KV head": (
        "attention/decode",
        "decode_attention",
        DECODE,
        "out += batch * out_row_stride + kv_head * QUERIES_PER_KV * out_head_stride",
        "out += batch * out_row_stride",
    ),
    "decode ignores kv_start": (
        "attention/decode",
        "decode_attention",
        DECODE,
        "first = tl.load(kv_start + batch)",
        "first = tl.load(kv_start + batch) * 0",
    ),
    "values are keys": (
        "attention/decode",
        "decode_attention",
        DECODE,
        "Keys(k_pages, v_pages,",
        "Keys(k_pages, k_pages,",
    ),
    "causal off by one": (
        "attention/prefill",
        "prefill_attention",
        PREFILL,
        "tl.minimum(newest_seen + 1, high)",
        "tl.minimum(newest_seen, high)",
    ),
    "not causal": ("attention/prefill", "prefill_attention", PREFILL, "tl.minimum(newest_seen + 1, high)", "high"),
    "window off by one": (
        "attention/prefill",
        "prefill_attention",
        PREFILL,
        "tl.maximum(newest_seen - window + 1, low)",
        "tl.maximum(newest_seen - window, low)",
    ),
    "window ends early": (
        "attention/prefill",
        "prefill_attention",
        PREFILL,
        "tl.maximum(given[0], oldest - window + 1)",
        "tl.maximum(given[0], oldest - window + 2)",
    ),
    "rows of a group count as places": (
        "attention/prefill",
        "prefill_attention",
        PREFILL,
        "newest_seen = q_start + (first_row + tl.arange(0, ROWS)) // QUERIES",
        "newest_seen = q_start + (first_row + tl.arange(0, ROWS))",
    ),
    "prefill ignores kv_start": (
        "attention/prefill",
        "prefill_attention",
        partial(PREFILL, window=0),
        "tl.maximum(newest_seen - window + 1, low)",
        "newest_seen - window + 1",
    ),
    "the first rows see the window of the last": (
        "attention/prefill",
        "prefill_attention",
        WHOLE_BLOCKS,
        "whole_low = tl.maximum(given[0], newest - window + 1)",
        "whole_low = low",
    ),
    "whole blocks begin before the keys": (
        "attention/prefill",
        "prefill_attention",
        partial(WHOLE_BLOCKS, window=0),
        "tl.cdiv(whole_low, BLOCK_N)",
        "whole_low // BLOCK_N",
    ),
    "whole blocks end after the diagonal": (
        "attention/prefill",
        "prefill_attention",
        WHOLE_BLOCKS,
        "whole_high = tl.minimum(given[1], oldest + 1)",
        "whole_high = tl.minimum(given[1], newest + 1)",
    ),
    "whole blocks end after the keys": (
        "attention/prefill",
        "prefill_attention",
        partial(WHOLE_BLOCKS, stop=205, window=0),
        "whole_high = tl.minimum(given[1], oldest + 1)",
        "whole_high = tl.minimum(given[1] + 31, oldest + 1)",
    ),
    "an edge block is taken twice": (
        "attention/prefill",
        "prefill_attention",
        WHOLE_BLOCKS,
        "block = edge + tl.where(edge < first_whole, 0, num_whole)",
        "block = edge",
    ),
    "an edge block is left out": (
        "attention/prefill",
        "prefill_attention",
        WHOLE_BLOCKS,
        "range(first_block, blocks[1] - num_whole)",
        "range(first_block, blocks[1] - num_whole - 1)",
    ),
    "whole blocks take the page before": (
        "attention/prefill",
        "prefill_attention",
        WHOLE_BLOCKS,
        "load_page_ids(keys.table, rows, (block + 1) * BLOCK_N,",
        "load_page_ids(keys.table, rows, block * BLOCK_N,",
    ),
    "edge blocks take the page after the first": (
        "attention/prefill",
        "prefill_attention",
        WHOLE_BLOCKS,
        "next_block = edge + 1 + tl.where(edge + 1 < first_whole, 0, num_whole)",
        "next_block = edge + 1",
    ),
    "prefill ignores kv_stop": (
        "attention/prefill",
        "prefill_attention",
        partial(PREFILL, stop=60),
        " high = tl.minimum(given[1],",
        " high = tl.minimum(given[1] + 1,",
    ),
    "another KV head": (
        "attention/prefill",
        "prefill_attention",
        PREFILL,
        "kv_head.to(tl.int64) * table_head_stride",
        "(1 - kv_head).to(tl.int64) * table_head_stride",
    ),
    "merge without the maximum's guard": (
        "attention/merge",
        "merge",
        MERGE,
        'safe_maximum = tl.where(maximum == float("-inf"), 0.0, maximum)',
        "safe_maximum = maximum",
    ),
    "merge without normalisation": (
        "attention/merge",
        "merge",
        MERGE,
        "acc / tl.where(total == 0.0, 1.0, total)",
        "acc",
    ),
    "merge forgets a part": ("attention/merge", "merge", MERGE, "tl.static_range(PARTS)", "tl.static_range(1, PARTS)"),
    "merge averages": ("attention/merge", "merge", MERGE, "total += weight", "total += 1.0"),
}

# name: (module that uses it, helper of attention/softmax.py, check of the module's op, right text, wrong text)
SOFTMAX_MUTANTS = {
    "a cap forgets the sign": (decode, "scores_of", CAPPED_DECODE, "tl.where(x < 0.0, -far, far)", "far"),
    "a cap near zero is not the other": (prefill, "scores_of", CAPPED_PREFILL, "near * x", "near"),
    "a cap that scales twice": (
        prefill,
        "take_in",
        CAPPED_PREFILL,
        "LOG2_E if form.CAPPED else form.scale * LOG2_E",
        "form.scale * LOG2_E",
    ),
    "a cap of whole blocks is left out": (prefill, "scores_of", CAPPED_WHOLE, "    if form.CAPPED:", "    if False:"),
    "decode has no guard for an empty range": (
        decode,
        "normalised",
        DECODE,
        "nonzero = tl.where(total == 0.0, 1.0, total)",
        "nonzero = total",
    ),
    "lse in base 2": (
        decode,
        "normalised",
        DECODE,
        "(maximum + tl.log2(nonzero)) * LN_2",
        "(maximum + tl.log2(nonzero))",
    ),
    "maximum is not whole": (
        decode,
        "take_in",
        partial(DECODE, dtype=torch.bfloat16),
        "tl.ceil(tl.max(scores, axis=1) * scale)",
        "tl.max(scores, axis=1) * scale",
    ),
    "scores are not scaled": (prefill, "take_in", PREFILL, "tl.exp2(scores * scale -", "tl.exp2(scores -"),
    "total is not rescaled": (prefill, "take_in", PREFILL, "total = total * correction", "total = total"),
    "sum is not rescaled": (prefill, "take_in", PREFILL, "acc * correction[:, None]", "acc"),
    "no guard for a row without a key": (
        prefill,
        "take_in",
        partial(PREFILL, start=90, window=0),
        'tl.where(new_maximum == float("-inf"), 0.0, new_maximum)',
        "new_maximum",
    ),
}
