"""Planted bugs of attention, of its split merge and of its partials."""

from __future__ import annotations

from functools import partial

import torch

from tests.support import kernel_checks as checks

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
    "a cap forgets the sign": ("attention", "decode_attention", CAPPED_DECODE, "tl.where(x < 0.0, -far, far)", "far"),
    "a cap near zero is not the other": ("attention", "prefill_attention", CAPPED_PREFILL, "near * x", "near"),
    "a cap that scales twice": (
        "attention",
        "prefill_attention",
        CAPPED_PREFILL,
        "LOG2_E if CAPPED else scale * LOG2_E",
        "scale * LOG2_E",
    ),
    "a cap of whole blocks is left out": (
        "attention",
        "prefill_attention",
        CAPPED_WHOLE,
        "    if CAPPED:",
        "    if False:",
    ),
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
}
