"""Measure one machine's CPU lane with the runtime's own kernels: the numbers that the planner works with.

Every rate is what an op reaches, not what a data sheet says: bytes of weights or cache a second with one row, operations
a second by row count, on buffers larger than the last-level cache and, apart from that, on a small one that stays in it.
Medians of repetitions, because machines are shared. The GPU, the bus and both sides at once: placement.gpu_profiler.
"""

import statistics
import time
from collections.abc import Callable

import torch

from cpu_kernels import CpuKernels, fresh_memory
from cpu_kernels.kv_layout import is_quantised, row_items, token_bytes
from cpu_kernels.layout import BLOCK_FEATURES, WEIGHT_DTYPES, block_bytes
from placement.fingerprint import cpu_name, last_level_cache_bytes, machine_fingerprint
from placement.hardware import WEIGHT_BYTES, HardwareProfile
from placement.rates import KV_BITS, AttentionRate, DtypeRates, RowRate, ThreadRate, beside_memory

# Many times what a few cores get of a last-level cache, so that none of it is found again; where the cache is larger
# than that (servers have some of 300 MiB), CACHES of it.
SWEEP_BYTES = 256 << 20
ATTENTION_BYTES = 96 << 20  # of K and V: still three such caches, and there are many shapes
CACHES = 8  # with 3, a third of the reads still came from the cache: 210 GB/s where DRAM gives 156
CACHED_BYTES = 4 << 20
BETWEEN_BYTES = 16 << 20  # weights that pass through the cache between two small operations
IN_FEATURES = 2048
ROW_COUNTS = (1, 2, 4, 5, 8, 16, 17, 32, 64, 65, 128, 512)
MANY_WEIGHTS = 16 << 20  # weights of the linear with many rows
SMALL_LINEAR = 512  # inputs of one that is mostly activations
KV_HEADS = 8
PREFILL_ROWS = 256
HEADS_PER_GROUP = (1, 4, 8)
HEAD_DIMS = (64, 128)
KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8, "q4": torch.uint8}
PAGE_TOKENS = 64
REPETITIONS = 9
# Bytes of a packed weight, and of a page of codes: as bfloat16, float32 or a float16 scale they are finite numbers of
# ordinary size, which is all that timing asks of them.
WEIGHT_BYTE = 0x3C
CLEARLY_SLOWER = 0.95  # of the best one-row rate: a larger count below this is left out
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
        dram = max(rate.sweep_bytes_per_s for rate in sweep if rate.threads == threads)
        few = DtypeRates(*(dram * share_of_sweep(ops, dtype, on_progress) for dtype in WEIGHT_DTYPES))
        activations = activation_s(ops, on_progress)
        rows = row_rates(ops, few, activations, on_progress)
        attention = attention_rates(ops, dram, on_progress)
        cached = cached_rates(ops, on_progress)
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
        cpu_cache_bytes=last_level_cache_bytes(),
        cpu_cached_bytes_per_s=cached,
        cpu_rows=rows,
        cpu_activation_s=activations,
        cpu_attention=attention,
        logits_s_per_token=logits_s(),
        thread_sweep=sweep,
        fingerprint=machine_fingerprint(max_threads),
    )


def beyond_caches(least_bytes: int) -> int:
    """The size of a buffer of which a pass finds nothing in the cache that the pass before left there."""
    return max(least_bytes, CACHES * last_level_cache_bytes())


def thread_counts(max_threads: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the maximum."""
    counts = {1 << power for power in range(max_threads.bit_length()) if 1 << power <= max_threads}
    return tuple(sorted(counts | {max_threads}))


def best_threads(sweep: tuple[ThreadRate, ...]) -> int:
    """The largest count whose one-row linear is not clearly slower than the best one's.

    Where memory is the limit one row gains nothing from more cores, but prompts and attention over many heads do.
    """
    best = max(rate.linear_bytes_per_s for rate in sweep)
    return max(rate.threads for rate in sweep if rate.linear_bytes_per_s >= best * CLEARLY_SLOWER)


def thread_sweep(counts: tuple[int, ...], on_progress: Progress) -> tuple[ThreadRate, ...]:
    """A one-row q4 linear and a plain read of the same bytes with every thread count."""
    weight, rates = packed("q4", beyond_caches(SWEEP_BYTES)), []
    for threads in counts:
        on_progress(f"{threads} threads")
        with CpuKernels(threads) as ops:
            linear = seconds(linear_call(ops, weight, "q4", 1))
            sweep = seconds(lambda ops=ops: ops.sweep(weight))
        rates.append(ThreadRate(threads, weight.numel() / linear, weight.numel() / sweep))
    return tuple(rates)


def share_of_sweep(ops: CpuKernels, dtype: str, on_progress: Progress = lambda what: None) -> float:
    """Rate of a one-row linear that is larger than the cache, as a share of a plain read of the same bytes.

    Turn by turn: where others use the same memory its speed changes within seconds, this share does not.
    """
    on_progress(f"linear {dtype}, one row")
    weight = packed(dtype, beyond_caches(SWEEP_BYTES))
    return turn_by_turn(linear_call(ops, weight, dtype, 1), lambda: ops.sweep(weight))


def turn_by_turn(work: Callable[[], object], yardstick: Callable[[], object]) -> float:
    """Median of the yardstick's time over that of `work`, measured in turns."""
    return statistics.median(measured / worked for measured, worked in turns(work, yardstick))


def turns(work: Callable[[], object], yardstick: Callable[[], object]) -> list[tuple[float, float]]:
    """Seconds of the yardstick and of `work` just after it, several times, warmed up."""
    found = []
    for _ in range(2 * REPETITIONS + 1):
        times = []
        for call in (yardstick, work):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        found.append((times[0], times[1]))
    return found[1:]


def activation_s(ops: CpuKernels, on_progress: Progress) -> DtypeRates:
    """Seconds of a linear per activation, in or out, of a row: rounding them, writing them.

    From a wide and a small linear, whose times are operations / rate + rows * (inputs + outputs) * this.
    """
    found = []
    for dtype in WEIGHT_DTYPES:
        on_progress(f"linear {dtype}, small and wide")
        wide, small = packed(dtype, int(MANY_WEIGHTS * WEIGHT_BYTES[dtype])), packed(dtype, 0, SMALL_LINEAR)
        times = [seconds(linear_call(ops, weight, dtype, PREFILL_ROWS)) / PREFILL_ROWS for weight in (wide, small)]
        (work, values), (less, fewer) = (shape(weight, dtype) for weight in (wide, small))
        found.append(max(0.0, (times[1] * work - times[0] * less) / (fewer * work - values * less)))
    return DtypeRates(*found)


def row_rates(ops: CpuKernels, few: DtypeRates, activations: DtypeRates, on_progress: Progress) -> tuple[RowRate, ...]:
    """Operations a second by row count, activations apart; one row is what `few_rows` measured."""
    times: dict[str, list[float]] = {}
    for dtype in WEIGHT_DTYPES:
        on_progress(f"linear {dtype} by rows")
        # Few rows read the weight from memory, so it must not fit in the cache; many reuse it while they compute.
        large = packed(dtype, beyond_caches(SWEEP_BYTES))
        small = packed(dtype, int(MANY_WEIGHTS * WEIGHT_BYTES[dtype]))
        one_row = linear_call(ops, large, dtype, 1)
        times[dtype] = [large.numel() / few.of(dtype) / shape(large, dtype)[0]]
        for rows in ROW_COUNTS[1:]:
            weight = large if rows < 32 else small
            work, values = shape(weight, dtype)
            call = linear_call(ops, weight, dtype, rows)
            # While memory decides, time is known as a multiple of one row's, whatever else uses the memory now.
            taken = seconds(call) if rows >= 8 else large.numel() / few.of(dtype) / turn_by_turn(call, one_row)
            times[dtype].append(max(0.5 * taken, taken - rows * values * activations.of(dtype)) / work)
    return tuple(
        RowRate(rows, DtypeRates(*(rows / times[dtype][i] for dtype in WEIGHT_DTYPES)))
        for i, rows in enumerate(ROW_COUNTS)
    )


def cached_rates(ops: CpuKernels, on_progress: Progress) -> DtypeRates:
    """Weight bytes a second of one row when they stay in the cache."""
    on_progress("linears in the cache")
    cached = []
    for dtype in WEIGHT_DTYPES:
        weight = packed(dtype, CACHED_BYTES)
        cached.append(weight.numel() / recorded_seconds(ops, linear_call(ops, weight, dtype, 1), CALLS))
    return DtypeRates(*cached)


def attention_rates(ops: CpuKernels, dram: float, on_progress: Progress) -> tuple[AttentionRate, ...]:
    """Attention over a cache in DRAM, one row and many, by cache dtype, head sharing and head size."""
    rates = []
    for kv_dtype in KV_DTYPES:
        for head_dim in HEAD_DIMS:
            on_progress(f"attention over {kv_dtype}, heads of {head_dim}")
            sizes = beyond_caches(ATTENTION_BYTES), CACHED_BYTES
            pages, cached = (kv_pages(kv_dtype, head_dim, size) for size in sizes)
            for heads in HEADS_PER_GROUP:
                near_s = recorded_seconds(ops, decode_call(ops, cached, heads, head_dim), CALLS // 10)
                near = 2 * cached[0].nbytes / near_s
                decode = decode_rate(ops, pages, heads, head_dim, dram, near)
                many = prefill_rates(ops, pages, heads, head_dim)
                rates.append(AttentionRate(KV_BITS[kv_dtype], heads, head_dim, decode, *many, near))
    return tuple(rates)


def kv_pages(kv_dtype: str, head_dim: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V pages of `size` bytes together and their table, int32 [KV_HEADS, pages]."""
    count = max(1, size // (PAGE_TOKENS * token_bytes(kv_dtype, head_dim) * KV_HEADS)) * KV_HEADS
    dims, value = (count, PAGE_TOKENS, row_items(kv_dtype, head_dim)), WEIGHT_BYTE if is_quantised(kv_dtype) else 0.1
    k_pages, v_pages = (host_full(dims, KV_DTYPES[kv_dtype], value) for _ in range(2))
    return k_pages, v_pages, torch.arange(count, dtype=torch.int32).view(-1, KV_HEADS).T.contiguous()


def decode_rate(
    ops: CpuKernels, pages: tuple, heads_per_group: int, head_dim: int, dram: float, cached: float
) -> float:
    """Bytes of K and V a second with one row, where a plain read reaches `dram` and the kernel `cached` from the cache;
    measured beside plain reads of them, for memory may be faster or slower meanwhile."""
    k_pages, v_pages, _ = pages
    read = k_pages.nbytes + v_pages.nbytes
    work = decode_call(ops, pages, heads_per_group, head_dim)
    found = turns(work, lambda: (ops.sweep(k_pages), ops.sweep(v_pages)))
    return statistics.median(beside_memory(read / worked, read / swept, dram, cached) for swept, worked in found)


def decode_call(ops: CpuKernels, pages: tuple, heads_per_group: int, head_dim: int) -> Callable[[], None]:
    """A call of `decode_attention` with one row over every page, ready to be timed or recorded."""
    k_pages, v_pages, table = pages
    heads, tables = KV_HEADS * heads_per_group, table[None]
    q, out, lse = torch.randn(1, heads, head_dim), torch.empty(1, heads, head_dim), torch.empty(1, heads)
    start, stop = (torch.full((1,), tokens, dtype=torch.int32) for tokens in (0, table.shape[1] * PAGE_TOKENS))
    return lambda: ops.decode_attention(q, k_pages, v_pages, tables, start, stop, 0.1, out, lse)


def prefill_rates(ops: CpuKernels, pages: tuple, heads_per_group: int, head_dim: int) -> tuple[float, float]:
    """Operations a second over tokens before a chunk, and how many keys more than it sees the chunk itself costs a row:
    a chunk alone and with as many tokens before it."""
    k_pages, v_pages, table = pages
    heads, rows = KV_HEADS * heads_per_group, min(PREFILL_ROWS, table.shape[1] * PAGE_TOKENS // 2)
    q, out, lse = torch.randn(rows, heads, head_dim), torch.empty(rows, heads, head_dim), torch.empty(rows, heads)

    def taken(before: int) -> float:
        keys = before + rows
        return seconds(lambda: ops.prefill_attention(q, k_pages, v_pages, table, 0, keys, before, 0, 0.1, out, lse))

    alone, both = taken(0), taken(rows)
    a_key = 4 * head_dim * heads * rows
    rate = a_key * rows / max(both - alone, 0.2 * both)
    return rate, max(0.0, alone * rate / a_key - (rows + 1) / 2)


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
    """Activation bytes a second, in and out, through two norms, the rotary embedding and the gated activation of a
    layer, each after weights have passed through the cache as they do between them."""
    rows, hidden, heads, head_dim = PREFILL_ROWS, 1024, 16, 64
    x, weight, normed = torch.randn(rows, hidden), torch.ones(hidden), torch.empty(rows, hidden)
    gate_up, activated = torch.randn(rows, 7 * hidden), torch.empty(rows, 7 * hidden // 2)
    qkv, q = torch.randn(rows, KV_HEADS, (heads // KV_HEADS + 2) * head_dim), torch.empty(rows, heads, head_dim)
    pages = [torch.zeros(KV_HEADS * rows, 1, head_dim, dtype=torch.bfloat16) for _ in range(2)]
    angles, positions = torch.ones(rows, head_dim // 2), torch.arange(rows)
    slots = torch.arange(rows * KV_HEADS).view(rows, KV_HEADS)
    between = host_full((BETWEEN_BYTES,), torch.uint8, WEIGHT_BYTE)
    rope = (qkv, positions, angles, angles, None, None, 1e-6, q, *pages, slots)

    def cold(work: Callable[[], None]) -> float:
        times = []
        for _ in range(REPETITIONS + 1):
            ops.sweep(between)
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    taken = 2 * cold(lambda: ops.rms_norm(x, weight, 1e-6, normed)) + cold(lambda: ops.rope_append(*rope))
    taken += cold(lambda: ops.silu_mul(gate_up, activated))
    moved = 2 * (x.nbytes + normed.nbytes) + qkv.nbytes + q.nbytes + gate_up.nbytes + activated.nbytes
    return moved / taken


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


def packed(dtype: str, total_bytes: int, square: int | None = None) -> torch.Tensor:
    """A packed weight, uint8 [blocks, block_bytes], of about this size and IN_FEATURES inputs; or a square one."""
    row_bytes = block_bytes(dtype, square or IN_FEATURES)
    total_bytes = row_bytes * square // BLOCK_FEATURES if square else total_bytes
    return host_full((max(1, total_bytes // row_bytes), row_bytes), torch.uint8, WEIGHT_BYTE)


def host_full(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> torch.Tensor:
    """Host memory in large pages, as the runtime keeps weights and caches, every page of it touched."""
    return fresh_memory(shape, dtype).fill_(value)


def inputs_of(weight: torch.Tensor, dtype: str) -> int:
    """Input features of a packed weight of this module."""
    return IN_FEATURES if weight.shape[1] == block_bytes(dtype, IN_FEATURES) else SMALL_LINEAR


def shape(weight: torch.Tensor, dtype: str) -> tuple[int, int]:
    """Operations of one row (multiplications plus additions), and its activations, in and out."""
    inputs, outputs = inputs_of(weight, dtype), weight.shape[0] * BLOCK_FEATURES
    return 2 * inputs * outputs, inputs + outputs


def linear_call(ops: CpuKernels, weight: torch.Tensor, dtype: str, rows: int) -> Callable[[], None]:
    """A call of `linear` over a packed weight, ready to be timed or recorded."""
    x, out = torch.randn(rows, inputs_of(weight, dtype)), torch.empty(rows, weight.shape[0] * BLOCK_FEATURES)
    return lambda: ops.linear(x, weight, dtype, None, out)
