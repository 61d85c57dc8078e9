"""Measure one machine's CPU lane with the runtime's own kernels: the numbers that the planner works with.

Every rate is what an op reaches, not what a data sheet says: bytes of weights or cache a second with one row, operations
a second by row count, on buffers larger than the last-level cache and, apart from that, on a small one that stays in it.
Medians of repetitions, because machines are shared. The GPU, the bus and both sides at once: placement.gpu_profiler.
"""

import statistics
import time
from collections.abc import Callable

import torch

from cpu_kernels import CpuKernels, advise_huge_pages
from cpu_kernels.layout import BLOCK_FEATURES, WEIGHT_DTYPES, block_bytes
from placement.fingerprint import cpu_name, machine_fingerprint
from placement.hardware import WEIGHT_BYTES, HardwareProfile
from placement.rates import AttentionRate, DtypeRates, RowRate, ThreadRate

SWEEP_BYTES = 96 << 20  # three times the largest last-level cache that a few cores share
CACHE_SIZES = (4 << 20, 8 << 20, 16 << 20, 32 << 20, 64 << 20)
IN_FEATURES = 2048
ROW_COUNTS = (1, 2, 4, 5, 8, 16, 17, 32, 64, 65, 128, 512)
MANY_WEIGHTS = 16 << 20  # weights of the linear with many rows
KV_HEADS = 8
PREFILL_ROWS = 256
HEADS_PER_GROUP = (1, 4, 8)
HEAD_DIMS = (64, 128)
KV_DTYPES = (torch.float32, torch.bfloat16)
PAGE_TOKENS = 64
REPETITIONS = 9
# Bytes of a packed weight: as bfloat16, float32 or a float16 scale they are finite numbers of ordinary size, which is all
# that timing asks of them.
WEIGHT_BYTE = 0x3C
ENOUGH_FASTER = 1.03  # a thread must gain this much, or the smaller count is kept
CALLS = 100  # of a small op, timed together

Progress = Callable[[str], None]


def measure(
    max_threads: int, dram_bytes: int, on_progress: Progress = lambda what: None, threads: int | None = None
) -> HardwareProfile:
    """Measure the CPU lane with the thread count that serves it best; takes some ten seconds.

    max_threads: physical cores to try. dram_bytes: host memory that a plan may use. threads: measure with this count
    and sweep none. on_progress(what) is called before each measurement.
    """
    counts = thread_counts(max_threads) if threads is None else (threads,)
    sweep = thread_sweep(counts, on_progress)
    threads = best_threads(sweep)
    with CpuKernels(threads) as ops:
        few = DtypeRates(*(few_rows(ops, dtype, on_progress) for dtype in WEIGHT_DTYPES))
        rows = row_rates(ops, few, on_progress)
        attention = attention_rates(ops, on_progress)
        cache_bytes, cached = cache_rates(ops, few, on_progress)
        on_progress("small operations")
        call_s, recorded_s = calls(ops)
        small = small_rate(ops)
    most = max(attention, key=lambda rate: rate.ops_per_s)
    return HardwareProfile(
        name=cpu_name(),
        source="measured",
        cores=threads,
        dram_bytes=dram_bytes,
        dram_bytes_per_s=max(
            max(rate.sweep_bytes_per_s for rate in sweep), *(few.of(dtype) for dtype in WEIGHT_DTYPES)
        ),
        cpu_linear_bytes_per_s=few,
        cpu_ops_per_s=DtypeRates(*(max(rate.ops_per_s.of(dtype) for rate in rows) for dtype in WEIGHT_DTYPES)),
        cpu_attention_bytes_per_s=statistics.median(rate.bytes_per_s for rate in attention),
        cpu_attention_ops_per_s=most.ops_per_s,
        cpu_call_s=call_s,
        cpu_recorded_call_s=recorded_s,
        cpu_small_bytes_per_s=small,
        cpu_cache_bytes=cache_bytes,
        cpu_cached_bytes_per_s=cached,
        cpu_rows=rows,
        cpu_attention=attention,
        logits_s_per_token=logits_s(),
        thread_sweep=sweep,
        fingerprint=machine_fingerprint(max_threads),
    )


def thread_counts(max_threads: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the maximum."""
    counts = {1 << power for power in range(max_threads.bit_length()) if 1 << power <= max_threads}
    return tuple(sorted(counts | {max_threads}))


def best_threads(sweep: tuple[ThreadRate, ...]) -> int:
    """The smallest count that no larger one beats by more than a few per cent."""
    best = sweep[0]
    for rate in sweep[1:]:
        if rate.linear_bytes_per_s > best.linear_bytes_per_s * ENOUGH_FASTER:
            best = rate
    return best.threads


def thread_sweep(counts: tuple[int, ...], on_progress: Progress) -> tuple[ThreadRate, ...]:
    """A one-row q4 linear and a plain read of the same bytes with every thread count."""
    weight, rates = packed("q4", SWEEP_BYTES), []
    for threads in counts:
        on_progress(f"{threads} threads")
        with CpuKernels(threads) as ops:
            linear = seconds(linear_call(ops, weight, "q4", 1))
            sweep = seconds(lambda ops=ops: ops.sweep(weight))
        rates.append(ThreadRate(threads, weight.numel() / linear, weight.numel() / sweep))
    return tuple(rates)


def few_rows(ops: CpuKernels, dtype: str, on_progress: Progress = lambda what: None) -> float:
    """Weight bytes a second of a one-row linear that is larger than the cache."""
    on_progress(f"linear {dtype}, one row")
    weight = packed(dtype, SWEEP_BYTES)
    return weight.numel() / seconds(linear_call(ops, weight, dtype, 1))


def row_rates(ops: CpuKernels, few: DtypeRates, on_progress: Progress) -> tuple[RowRate, ...]:
    """Operations a second by row count; one row is what `few_rows` measured."""
    times: dict[str, list[float]] = {}
    for dtype in WEIGHT_DTYPES:
        on_progress(f"linear {dtype} by rows")
        # Few rows read the weight from memory, so it must not fit in the cache; many reuse it while they compute.
        large, small = packed(dtype, SWEEP_BYTES), packed(dtype, int(MANY_WEIGHTS * WEIGHT_BYTES[dtype]))
        times[dtype] = [1 / operations(large, dtype, 1) * large.numel() / few.of(dtype)]
        for rows in ROW_COUNTS[1:]:
            weight = large if rows < 32 else small
            times[dtype].append(seconds(linear_call(ops, weight, dtype, rows)) / operations(weight, dtype, 1))
    return tuple(
        RowRate(rows, DtypeRates(*(rows / times[dtype][i] for dtype in WEIGHT_DTYPES)))
        for i, rows in enumerate(ROW_COUNTS)
    )


def cache_rates(ops: CpuKernels, few: DtypeRates, on_progress: Progress) -> tuple[int, DtypeRates]:
    """The largest size that is read clearly faster than DRAM, and one-row rates on the smallest; 0 where none is."""
    on_progress("last-level cache")
    rates = {}
    for size in CACHE_SIZES:
        weight = packed("bf16", size)
        rates[size] = weight.numel() / recorded_seconds(ops, linear_call(ops, weight, "bf16", 1), CALLS // 10)
    fast = rates[CACHE_SIZES[0]]
    kept = [size for size, rate in rates.items() if rate > (fast * few.bf16) ** 0.5]
    if fast < 1.2 * few.bf16:
        return 0, few
    cached = []
    for dtype in WEIGHT_DTYPES:
        weight = packed(dtype, CACHE_SIZES[0])
        cached.append(weight.numel() / recorded_seconds(ops, linear_call(ops, weight, dtype, 1), CALLS))
    return max(kept, default=0), DtypeRates(*cached)


def attention_rates(ops: CpuKernels, on_progress: Progress) -> tuple[AttentionRate, ...]:
    """Attention over a cache in DRAM, one row and many, by cache dtype, head sharing and head size."""
    rates = []
    for dtype in KV_DTYPES:
        for head_dim in HEAD_DIMS:
            on_progress(f"attention over {str(dtype).removeprefix('torch.')}, heads of {head_dim}")
            pages = kv_pages(dtype, head_dim)
            for heads in HEADS_PER_GROUP:
                decode = decode_rate(ops, pages, heads, head_dim)
                rates.append(
                    AttentionRate(
                        8 * dtype.itemsize, heads, head_dim, decode, prefill_rate(ops, pages, heads, head_dim)
                    )
                )
    return tuple(rates)


def kv_pages(dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V pages of SWEEP_BYTES together, so that no cache holds them, and their table, int32 [KV_HEADS, pages]."""
    page_bytes = 2 * PAGE_TOKENS * head_dim * dtype.itemsize
    count = max(1, SWEEP_BYTES // (page_bytes * KV_HEADS)) * KV_HEADS
    k_pages, v_pages = (host_full((count, PAGE_TOKENS, head_dim), dtype, 0.1) for _ in range(2))
    return k_pages, v_pages, torch.arange(count, dtype=torch.int32).view(-1, KV_HEADS).T.contiguous()


def decode_rate(ops: CpuKernels, pages: tuple, heads_per_group: int, head_dim: int) -> float:
    """Bytes of K and V a second with one row."""
    k_pages, v_pages, table = pages
    heads = KV_HEADS * heads_per_group
    q, out, lse = torch.randn(1, heads, head_dim), torch.empty(1, heads, head_dim), torch.empty(1, heads)
    start, stop = (torch.full((1,), tokens, dtype=torch.int32) for tokens in (0, table.shape[1] * PAGE_TOKENS))
    taken = seconds(lambda: ops.decode_attention(q, k_pages, v_pages, table[None], start, stop, 0.1, out, lse))
    return (k_pages.nbytes + v_pages.nbytes) / taken


def prefill_rate(ops: CpuKernels, pages: tuple, heads_per_group: int, head_dim: int) -> float:
    """Operations a second of a chunk that attends to itself and as much before it."""
    k_pages, v_pages, table = pages
    heads, rows = KV_HEADS * heads_per_group, min(PREFILL_ROWS, table.shape[1] * PAGE_TOKENS // 2)
    keys = 2 * rows
    q, out, lse = torch.randn(rows, heads, head_dim), torch.empty(rows, heads, head_dim), torch.empty(rows, heads)
    taken = seconds(lambda: ops.prefill_attention(q, k_pages, v_pages, table, 0, keys, keys - rows, 0, 0.1, out, lse))
    return 4 * head_dim * heads * rows * (keys - rows // 2) / taken


def calls(ops: CpuKernels) -> tuple[float, float]:
    """Seconds of the smallest op, called from Python and recorded."""
    x, weight, out = torch.randn(1, 64), torch.ones(64), torch.empty(1, 64)

    def call() -> None:
        ops.rms_norm(x, weight, 1e-6, out)

    def many() -> None:
        for _ in range(CALLS):
            call()

    return seconds(many) / CALLS, recorded_seconds(ops, call, CALLS)


def small_rate(ops: CpuKernels) -> float:
    """Activation bytes a second, in and out, through the gated activation."""
    gate_up, out = torch.randn(PREFILL_ROWS, 8192), torch.empty(PREFILL_ROWS, 4096)
    return (gate_up.nbytes + out.nbytes) / seconds(lambda: ops.silu_mul(gate_up, out))


def logits_s(vocab_size: int = 128_256) -> float:
    """Seconds per entry of the vocabulary to copy a row of logits and find its maximum."""
    logits = torch.randn(1, vocab_size)
    return seconds(lambda: int(logits.clone()[0].argmax())) / vocab_size


def recorded_seconds(ops: CpuKernels, work: Callable[[], None], count: int = 1) -> float:
    """Median time of `work` in a recorded program of `count` of it.

    Many in one program keep the whole team awake, as in a step. `work` keeps the tensors alive that a program only
    knows by address.
    """

    def many() -> None:
        for _ in range(count):
            work()

    return seconds(ops.record(many).run) / count


def seconds(work: Callable[[], object], repetitions: int | None = None) -> float:
    """Median time of one call, warmed up."""
    work()
    times = []
    for _ in range(repetitions or REPETITIONS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def packed(dtype: str, total_bytes: int) -> torch.Tensor:
    """A packed weight, uint8 [blocks, block_bytes], of about this size and IN_FEATURES inputs."""
    row_bytes = block_bytes(dtype, IN_FEATURES)
    return host_full((max(1, total_bytes // row_bytes), row_bytes), torch.uint8, WEIGHT_BYTE)


def host_full(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> torch.Tensor:
    """Host memory in large pages, as the runtime keeps weights and caches, every page of it touched."""
    tensor = torch.empty(shape, dtype=dtype)
    advise_huge_pages(tensor)
    return tensor.fill_(value)


def operations(weight: torch.Tensor, dtype: str, rows: int) -> int:
    """Multiplications plus additions of a linear over a packed weight."""
    return 2 * rows * weight.shape[0] * BLOCK_FEATURES * IN_FEATURES


def linear_call(ops: CpuKernels, weight: torch.Tensor, dtype: str, rows: int) -> Callable[[], None]:
    """A call of `linear` over a packed weight, ready to be timed or recorded."""
    x, out = torch.randn(rows, IN_FEATURES), torch.empty(rows, weight.shape[0] * BLOCK_FEATURES)
    return lambda: ops.linear(x, weight, dtype, None, out)
