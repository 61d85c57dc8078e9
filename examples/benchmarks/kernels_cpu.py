"""How close the CPU kernels come to what this machine's memory and cores can do.

The ceiling comes first: a read-only sweep over the same bytes with the same threads. Then every op, dtype and row
count: bytes or operations per second, and the share of the ceiling where memory is the limit. The repetitions of sweep
and op are interleaved, so that both meet the same neighbours; medians are printed. On a machine that others use, trust
shares, and with --threads 1, where the clock is CPU time, rates too.

    python examples/benchmarks/kernels_cpu.py [--threads N] [--isa NAME] [--ops linear,decode_attention] [--rows 1,512]
        [--dtypes bf16,q4_k] [--kv bf16] [--tokens 16384] [--sequence-rows 1,8] [--quick] [--json] [--out FILE]

With 128 rows or more of fp32 or bf16 the rate of torch's own float32 product is measured beside ours. Ends with one
JSON line; --json prints nothing else.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain, cycle, product
from pathlib import Path

import torch
from whole_model import machine as hardware

from cpu_kernels import CpuKernels, fresh_memory
from cpu_kernels.contract import ChunkKeys, Pages, Partial, RowKeys
from cpu_kernels.formats import pages as kv_layout
from cpu_kernels.formats import unit_bytes
from cpu_kernels.formats import weights as layout

HIDDEN = 2048
ROWS = (1, 2, 4, 8, 16, 64, 512)
COLD_BYTES = 256 << 20  # of all caches that a decode benchmark goes over
STREAM_ROWS = 16  # up to here every call reads weights that no cache holds; above, a few MB are enough
PRODUCT_ROWS = 128
LABELS = ("weight_dtype", "kv_dtype", "rows", "tokens", "q_len", "head_dim", "group_heads")
ATTENTION_SHAPES = (  # head_dim, query heads per KV head, KV heads
    (64, 1, 16),
    (64, 4, 8),
    (64, 8, 8),
    (128, 1, 8),
    (128, 4, 8),
    (128, 8, 4),
    (256, 1, 4),
    (256, 4, 4),
    (256, 8, 2),
)
KV_DTYPES = {"bf16": torch.bfloat16, "q8": torch.int8, "q4": torch.uint8}
KV_TOKENS = (4096, 16384, 65536, 131072)


def memory(size_bytes: int) -> torch.Tensor:
    """Touched memory as the runtime's weights and cache have it: in huge pages where the system grants them."""
    return fresh_memory((size_bytes,), torch.uint8).zero_()


def random_weight(weight_dtype: str, size_bytes: int) -> torch.Tensor:
    """Packed weight of about this size: one packed stretch of normal weights, repeated; of a form of files bytes that
    are ordinary numbers as codes and as scales."""
    block = unit_bytes(weight_dtype, HIDDEN)
    blocks = max(1, size_bytes // block)
    if weight_dtype not in layout.WEIGHT_DTYPES:
        return memory(blocks * block).fill_(0x3C).view(blocks, block)
    with CpuKernels(1) as ops:
        sample = torch.empty(4, block, dtype=torch.uint8)
        ops.pack(torch.randn(64, HIDDEN), weight_dtype, sample)
    weight = memory(blocks * block).view(blocks, block)
    for first in range(0, blocks, 4):
        weight[first : first + 4] = sample[: min(4, blocks - first)]
    return weight


def interleaved(calls: list[Callable[[], None]], repetitions: int, threads: int) -> list[float]:
    """Median seconds of each call; every repetition runs all of them, after one warm-up."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions + 1):
        for call, measured in zip(calls, times):
            start = clock()
            call()
            if repetition:
                measured.append(clock() - start)
    return [statistics.median(measured) for measured in times]


def result(op: str, seconds: float, sweep_s: float, size_bytes: int, operations: float, **labels: object) -> dict:
    """One row of the table and of the JSON."""
    return {
        "op": op,
        **labels,
        "ms": round(1e3 * seconds, 4),
        "gb_per_s": round(size_bytes / seconds / 1e9, 2),
        "ceiling_gb_per_s": round(size_bytes / sweep_s / 1e9, 2),
        "share_of_ceiling": round(sweep_s / seconds, 3),
        "gop_per_s": round(operations / seconds / 1e9, 1),
    }


def linears(ops: CpuKernels, dtypes: tuple[str, ...], rows: tuple[int, ...], size_bytes: int, repetitions: int):
    """linear of every dtype and row count; all dtypes of a row count share their repetitions."""
    weights = {name: random_weight(name, size_bytes) for name in dtypes}
    for count in rows:
        used = {name: w if count <= STREAM_ROWS else w[: max(1, len(w) // 8)] for name, w in weights.items()}
        x = torch.randn(count, HIDDEN)
        calls = []
        for name, weight in used.items():
            out = torch.empty(count, 16 * len(weight))
            calls.append(lambda weight=weight: ops.sweep(weight))
            calls.append(lambda name=name, weight=weight, x=x, out=out: ops.linear(x, weight, name, None, out))
        times = interleaved(calls, repetitions if count <= STREAM_ROWS else max(3, repetitions // 3), ops.num_threads)
        for index, (name, weight) in enumerate(used.items()):
            operations = 2 * count * HIDDEN * 16 * len(weight)
            labels = {"weight_dtype": name, "rows": count}
            row = result("linear", times[2 * index + 1], times[2 * index], weight.nbytes, operations, **labels)
            if name in ("fp32", "bf16") and count >= PRODUCT_ROWS:
                row["share_of_torch_fp32"] = share_of_product(ops, weight, name, repetitions)
            yield row


def share_of_product(ops: CpuKernels, weight: torch.Tensor, name: str, repetitions: int) -> float:
    """Rate of `linear` over that of torch's float32 product of the same shape and threads, turn by turn."""
    x, plain = torch.randn(PRODUCT_ROWS, HIDDEN), torch.randn(16 * len(weight), HIDDEN)
    out, before = torch.empty(PRODUCT_ROWS, 16 * len(weight)), torch.get_num_threads()
    torch.set_num_threads(ops.num_threads)
    calls = [lambda: torch.mm(x, plain.T, out=out), lambda: ops.linear(x, weight, name, None, out)]
    product_s, linear_s = interleaved(calls, repetitions, ops.num_threads)
    torch.set_num_threads(before)
    return round(product_s / linear_s, 3)


def random_cache(kv_dtype: str, pages: int, head_dim: int) -> torch.Tensor:
    """K and V pages of random numbers, [2, pages, 64, row_items]; scales of codes are all alike."""
    items, item_bytes = kv_layout.row_items(kv_dtype, head_dim), kv_layout.ITEM_BYTES[kv_dtype]
    cache = memory(2 * pages * 64 * items * item_bytes).view(KV_DTYPES[kv_dtype]).view(2, pages, 64, items)
    if kv_dtype == "bf16":
        return cache.normal_()
    codes = 64 * kv_layout.code_bytes(kv_dtype, head_dim)
    page_bytes = cache.view(torch.uint8).view(2, pages, -1)
    page_bytes.random_(0, 256)
    scale = torch.tensor([0.01], dtype=torch.bfloat16).view(torch.uint8)
    page_bytes[..., codes:] = scale.repeat((page_bytes.shape[-1] - codes) // 2)
    return cache


def copy_of(cache: torch.Tensor) -> torch.Tensor:
    """The same cache once more, in memory of the same kind."""
    return memory(cache.nbytes).view(cache.dtype).view(cache.shape).copy_(cache)


def in_order(pages: int, kv_heads: int) -> torch.Tensor:
    """Page table int32 [kv_heads, pages of a head] as the runtime fills it: a token's heads side by side."""
    return torch.arange(pages, dtype=torch.int32).view(-1, kv_heads).T.contiguous()


def decodes(
    ops: CpuKernels, tokens: tuple[int, ...], dtypes: tuple[str, ...], counts: tuple[int, ...], repetitions: int
):
    """decode_attention of rows of one sequence over caches of every dtype, length and head shape, each beside its own
    sweep.

    The last of `counts` rows sees all keys, each before it one less, as drafts that are checked do. Calls go over
    several caches in turn, as a step goes over its layers', so that none lies in the CPU's own cache.
    """
    for kv_dtype, (head_dim, queries_per_kv, kv_heads), kv_len in product(dtypes, ATTENTION_SHAPES, tokens):
        pages, num_heads, scale = kv_len // 64 * kv_heads, kv_heads * queries_per_kv, head_dim**-0.5
        cache = random_cache(kv_dtype, pages, head_dim)
        copies = 1 if repetitions == 1 else -(-COLD_BYTES // cache.nbytes)
        turns = cycle([cache, *(copy_of(cache) for _ in range(copies - 1))])
        table = in_order(pages, kv_heads)

        def sweep(turns=turns) -> None:
            ops.sweep(next(turns))

        def of_rows(count: int, turns=turns, table=table, kv_len=kv_len, shape=(num_heads, head_dim), scale=scale):
            stop = torch.arange(kv_len - count + 1, kv_len + 1, dtype=torch.int32)
            keys = RowKeys(table.repeat(count, 1, 1), torch.zeros(count, dtype=torch.int32), stop)
            q, into = torch.randn(count, *shape), Partial(torch.empty(count, *shape), torch.empty(count, shape[0]))
            return lambda: ops.decode_attention(q, Pages(*next(turns)), keys, scale, into)

        sweep_s, *decode_s = interleaved([sweep, *map(of_rows, counts)], repetitions, ops.num_threads)
        for count, seconds in zip(counts, decode_s, strict=True):
            labels = {"kv_dtype": kv_dtype, "tokens": kv_len, "head_dim": head_dim, "group_heads": queries_per_kv}
            labels |= {"rows": count} if count > 1 else {}
            operations = 4 * count * num_heads * kv_len * head_dim
            yield result("decode_attention", seconds, sweep_s, cache.nbytes, operations, **labels)


def prefills(ops: CpuKernels, q_len: int, dtypes: tuple[str, ...]):
    """prefill_attention of a prompt of `q_len`."""
    for kv_dtype, (head_dim, queries_per_kv, kv_heads) in product(dtypes, ATTENTION_SHAPES):
        pages, num_heads = -(-q_len // 64) * kv_heads, kv_heads * queries_per_kv
        cache = random_cache(kv_dtype, pages, head_dim)
        table = in_order(pages, kv_heads)
        q, lse = torch.randn(q_len, num_heads, head_dim), torch.empty(q_len, num_heads)
        keys, into = ChunkKeys(table, 0, q_len, 0), Partial(torch.empty_like(q), lse)
        arguments = (q, Pages(*cache), keys, head_dim**-0.5, into)
        (prefill_s,) = interleaved([lambda given=arguments: ops.prefill_attention(*given)], 3, ops.num_threads)
        labels = {"kv_dtype": kv_dtype, "q_len": q_len, "head_dim": head_dim, "group_heads": queries_per_kv}
        operations = 4 * num_heads * q_len * (q_len + 1) / 2 * head_dim
        yield result("prefill_attention", prefill_s, prefill_s, 0, operations, **labels)


def elementwise(ops: CpuKernels, repetitions: int):
    """The small ops of one decode step, and packing; sizes of a layer with hidden size 2048."""
    x, out, weight = torch.randn(1, HIDDEN), torch.empty(1, HIDDEN), torch.ones(HIDDEN)
    gate_up, down = torch.randn(1, 16384), torch.empty(1, 8192)
    rows = torch.randn(1024, HIDDEN)
    packed = {name: torch.empty(64, layout.block_bytes(name, HIDDEN), dtype=torch.uint8) for name in ("q8", "q4")}
    calls = {
        "rms_norm": (lambda: ops.rms_norm(x, weight, 1e-5, out), x.nbytes),
        "silu_mul": (lambda: ops.silu_mul(gate_up, down), gate_up.nbytes),
        "pack_q8": (lambda: ops.pack(rows, "q8", packed["q8"]), rows.nbytes),
        "pack_q4": (lambda: ops.pack(rows, "q4", packed["q4"]), rows.nbytes),
    }
    times = interleaved([call for call, _ in calls.values()], repetitions, ops.num_threads)
    for (name, (_, size)), seconds in zip(calls.items(), times):
        yield result(name, seconds, seconds, size, 0)


def line(row: dict) -> str:
    """A row of the table."""
    labels = " ".join(f"{key}={row[key]}" for key in LABELS if key in row)
    text = f"{row['op']:18s} {labels:42s} {row['ms']:10.3f} ms"
    if row["share_of_ceiling"] < 1 or row["op"] in ("linear", "decode_attention"):
        text += f" {row['gb_per_s']:7.1f} of {row['ceiling_gb_per_s']:5.1f} GB/s = {row['share_of_ceiling']:4.2f}"
    text += f" {row['gop_per_s']:8.0f} GOP/s" if row["gop_per_s"] else ""
    share = row.get("share_of_torch_fp32")
    return text if share is None else f"{text}, {share:4.2f} of torch's fp32"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads, the caller included (default: physical cores)")
    parser.add_argument("--isa", help="instruction set path (default: the best of this CPU)")
    parser.add_argument("--ops", default="linear,decode_attention,prefill_attention,elementwise", help="of these")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="row counts of linear")
    parser.add_argument("--dtypes", default="bf16,q8,q4", help="weight dtypes of linear")
    parser.add_argument("--kv", help="cache dtypes of attention (default: all, with --quick bf16)")
    parser.add_argument("--tokens", default=",".join(map(str, KV_TOKENS)), help="cache lengths of decode attention")
    parser.add_argument("--sequence-rows", default="1", help="rows of one sequence in decode attention")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--quick", action="store_true", help="small weights, few repetitions: a smoke test")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args()
    say = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    lengths = tuple(map(int, options.tokens.split(",")))
    size, tokens, q_len, repetitions = (2 << 20, (256,), 64, 1) if options.quick else (128 << 20, lengths, 512, 15)
    dtypes = tuple((options.kv or ("bf16" if options.quick else ",".join(KV_DTYPES))).split(","))
    wanted = options.ops.split(",")
    with CpuKernels(options.threads, isa=options.isa, on_compile=lambda name: say(f"compiling {name}")) as ops:
        machine = {
            **hardware(ops.num_threads),
            "isa": ops.isa,
            **{name: version(name) for name in ("numba", "llvmlite", "torch")},
        }
        say(" ".join(f"{key}={value}" for key, value in machine.items()))
        buffer = memory(size)
        (sweep_s,) = interleaved([lambda: ops.sweep(buffer)], repetitions, ops.num_threads)
        say(f"ceiling: read-only sweep of {size >> 20} MiB {size / sweep_s / 1e9:.1f} GB/s")
        rows = []
        counts, beside = (tuple(map(int, given.split(","))) for given in (options.rows, options.sequence_rows))
        measured = {
            "linear": linears(ops, tuple(options.dtypes.split(",")), counts, size, repetitions),
            "decode_attention": decodes(ops, tokens, dtypes, beside, repetitions),
            "prefill_attention": prefills(ops, q_len, dtypes),
            "elementwise": elementwise(ops, repetitions),
        }
        for row in chain.from_iterable(measured[name] for name in wanted):
            rows.append(row)
            say(line(row))
    record = {"machine": machine, "sweep_gb_per_s": round(size / sweep_s / 1e9, 2), "results": rows}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
