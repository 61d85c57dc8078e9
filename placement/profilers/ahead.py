"""Compile the kernels that the measurements call before the first of them: several at once, by several processes.

One after another, each by the measurement that needs it first, they took three quarters of the time of a profile.
"""

from collections.abc import Sequence

from cpu_kernels import CpuKernels
from cpu_kernels.formats.weights import block_bytes
from placement.profilers.cpu_attention import (
    PREFILL_HEADS,
    Cache,
    all_shapes,
    decode_call,
    kv_pages,
    pages_of_many,
    prefill_call,
)
from placement.profilers.cpu_linear import IN_FEATURES, MANY_ROWS, ROW_COUNTS, linear_call, packed
from placement.profilers.cpu_small import small_calls
from placement.profilers.timing import Progress, host_memory

LITTLE = 1 << 20  # bytes: a page of keys and one of values for each head, whatever their dtype
COMPILING = "compiling"  # how the progress of what is no measurement begins


def compile_all(processes: int, formats: Sequence[str], caches: Sequence[Cache], on_progress: Progress) -> None:
    """Compile what these weight formats and caches need and is not kept from an earlier start; on_progress(what) is
    called for each kernel."""
    with CpuKernels(processes, on_compile=lambda name: on_progress(f"{COMPILING} {name}")) as ops:
        ops.prepare(lambda: call_all(ops, formats, caches))


def call_all(ops: CpuKernels, formats: Sequence[str], caches: Sequence[Cache] = ()) -> None:
    """Every operation that is measured, over tensors that are as small as may be: kernels depend on dtypes, row counts
    and shapes of heads, not on sizes."""
    memory, of_caches = host_memory(LITTLE), all_shapes(caches)
    # The kernels that take longest first, so that no process waits long for another's last one.
    for kv_dtype, shapes in reversed(of_caches.items()):
        for heads, head_dim in shapes:
            decode_call(ops, kv_pages(kv_dtype, head_dim, memory), heads, head_dim)()
    for kv_dtype, shapes in reversed(of_caches.items()):
        for head_dim in sorted({head_dim for _, head_dim in shapes}):
            prefill_call(ops, pages_of_many(kv_dtype, head_dim, memory), PREFILL_HEADS, head_dim, 2, 0)()
    for dtype in reversed(formats):
        weight = packed(dtype, memory[: block_bytes(dtype, IN_FEATURES)])
        for rows in (*ROW_COUNTS, MANY_ROWS):
            linear_call(ops, weight, dtype, rows)()
        ops.sweep(weight)
    for call in small_calls(ops, 2)[0]:
        call()
