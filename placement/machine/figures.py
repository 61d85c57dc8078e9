"""The figures of one machine: the rates that the cost model needs, and what follows from them alone.

Rates are effective ones (what a good kernel reaches), in bytes or operations per second; an operation is one
multiplication or one addition. A rate of 0 for `h2d_bytes_per_s` means that there is no GPU.
"""

from dataclasses import dataclass, field

from placement.machine.ranges import check_ranges
from placement.machine.rates import (
    NO_RATES,
    AttentionRate,
    CopyRate,
    DtypeRates,
    RowRate,
    ThreadRate,
    int8_rows_by_rates,
)
from placement.plan.workload import STAGING_PIECE_BYTES

# Of the CPUs, what others may use while a machine is measured before its rates are in doubt: on two cores a fifth of
# one.
MOST_BUSY_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates of one machine, read by name; raises ValueError for values that no machine has.

    source: "measured" or where the public figures come from. cores: threads that the CPU lane uses.
    cpu_linear_bytes_per_s, cpu_ops_per_s: weight bytes and operations of a linear on all cores.
    cpu_cached_bytes_per_s: weight bytes when all that a step reads stays in a cache of cpu_cache_bytes; 0 is unknown.
    cpu_slowdown_while_copying, cpu_attention_slowdown_while_copying: CPU rate while PCIe copies run, as a share of the
    rate alone (1 = not slowed). copy_slowdown_while_computing: the other way round, copies while the CPU lane reads
    DRAM.
    handover_s: activations to the CPU, wake-up and result back, without their bytes. launch_overhead_s: one GPU kernel;
    cpu_activation_s: a linear's own time per activation, in or out, of a row;
    cpu_call_s: one call of the CPU kernel team; cpu_recorded_call_s: the same in a recorded step, 0 is as a call;
    cpu_small_bytes_per_s: activations through norms and such, 0 is the DRAM rate; step_overhead_s: Python once per
    step,
    cached_step_overhead_s: the same when a step's weights leave it in the cache;
    layer_overhead_s: Python around a layer of a step that is not recorded; gpu_layer_overhead_s: Python queueing a
    layer of a prompt on a GPU, four products and all around them, beside the GPU's own work; gpu_product_overhead_s:
    each product more, of a large linear or of a streamed piece, 0 is a quarter of the layer's;
    logits_s_per_token: choosing a token, per entry of the vocabulary.
    gpu_int8_ops_per_s: products of many rows over q8 and q4 weights in int8, 0 is unknown; without gpu_rows, gpu_flops
    has those in bf16.
    gpu_q8_int8_rows, gpu_q4_int8_rows: the most rows for which int8 was measured to be faster, 0 is not measured.
    overlap, prompt_overlap: share of what GPU, CPU and bus can do side by side that they do, in decode and in a prompt;
    overlap_source: on which machine that was seen.
    gpu_context_bytes: GPU memory that the driver takes for itself. unified_memory: GPU and CPU share one DRAM.
    streams_in_decode: whether streaming weights was seen to bring a step of one row more than it takes from the CPU
    lane, which reads the same memory. Prompts stream in any case.
    cpu_rows, gpu_rows: linears by token rows, ascending; they replace the two-rate estimate where there are any.
    cpu_attention: by cache dtype and head sharing, likewise. h2d_pageable_bytes_per_s, d2h_pageable_bytes_per_s,
    copies,
    thread_sweep: measured for people, not used by the cost model.
    staging_piece_bytes: of the weights that are streamed at a time.
    busy_share: of the CPUs, what other programs used while this was measured.
    fingerprint: (key, value) pairs by which a measured profile is recognised as stale or foreign.
    """

    name: str
    source: str
    cores: int
    dram_bytes: int
    dram_bytes_per_s: float
    cpu_linear_bytes_per_s: DtypeRates
    cpu_ops_per_s: DtypeRates
    cpu_attention_bytes_per_s: float
    cpu_attention_ops_per_s: float
    h2d_bytes_per_s: float = 0.0
    d2h_bytes_per_s: float = 0.0
    gpu_memory_bytes: int = 0
    gpu_bytes_per_s: float = 0.0
    gpu_flops: DtypeRates = NO_RATES
    gpu_attention_ops_per_s: float = 0.0
    handover_s: float = 0.0
    cpu_slowdown_while_copying: float = 1.0
    copy_slowdown_while_computing: float = 1.0
    launch_overhead_s: float = 0.0
    cpu_call_s: float = 5e-6
    step_overhead_s: float = 0.0
    gpu_context_bytes: int = 0
    overlap: float = 1.0
    prompt_overlap: float = 1.0
    overlap_source: str = ""
    unified_memory: bool = False
    streams_in_decode: bool = True
    cpu_cache_bytes: int = 0
    cpu_cached_bytes_per_s: DtypeRates = NO_RATES
    cpu_attention_slowdown_while_copying: float = 1.0
    cpu_activation_s: DtypeRates = NO_RATES
    cpu_recorded_call_s: float = 0.0
    cpu_small_bytes_per_s: float = 0.0
    layer_overhead_s: float = 0.0
    gpu_layer_overhead_s: float = 0.0
    gpu_product_overhead_s: float = 0.0
    gpu_int8_ops_per_s: float = 0.0
    gpu_q8_int8_rows: int = 0
    gpu_q4_int8_rows: int = 0
    cached_step_overhead_s: float = 0.0
    logits_s_per_token: float = 0.0
    h2d_pageable_bytes_per_s: float = 0.0
    d2h_pageable_bytes_per_s: float = 0.0
    cpu_rows: tuple[RowRate, ...] = ()
    gpu_rows: tuple[RowRate, ...] = ()
    cpu_attention: tuple[AttentionRate, ...] = ()
    copies: tuple[CopyRate, ...] = ()
    thread_sweep: tuple[ThreadRate, ...] = ()
    staging_piece_bytes: int = STAGING_PIECE_BYTES
    busy_share: float = 0.0
    fingerprint: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.has_gpu and not (
            self.gpu_bytes_per_s > 0 and self.d2h_bytes_per_s > 0 and self.gpu_attention_ops_per_s > 0
        ):
            raise ValueError(
                f"hardware profile {self.name}: a GPU (h2d_bytes_per_s > 0) needs positive d2h_bytes_per_s, "
                "gpu_bytes_per_s and gpu_attention_ops_per_s"
            )
        check_ranges(self)
        for name in ("cpu_rows", "gpu_rows"):
            rows = [rate.rows for rate in getattr(self, name)]
            if rows != sorted(set(rows)) or (rows and rows[0] < 1):
                raise ValueError(f"hardware profile {self.name}: {name} must have ascending row counts, got {rows}")

    @property
    def has_gpu(self) -> bool:
        """Whether the profile describes a GPU lane."""
        return self.h2d_bytes_per_s > 0

    @property
    def int8_rows(self) -> dict[str, int]:
        """The most rows that the GPU is to multiply in int8, by weight format: measured, else from the rates."""
        measured = {"q8": self.gpu_q8_int8_rows, "q4": self.gpu_q4_int8_rows}
        rates = self.gpu_int8_ops_per_s, self.gpu_flops.bf16, self.gpu_bytes_per_s
        return {name: rows or int8_rows_by_rates(name, *rates) for name, rows in measured.items()}

    def gpu_ops_per_s(self, dtype: str, rows: float) -> float:
        """Operations a second of a linear of many rows, in int8 or in bf16 as `int8_rows` says."""
        if self.gpu_int8_ops_per_s and rows <= self.int8_rows.get(dtype, 0):
            return self.gpu_int8_ops_per_s
        return self.gpu_flops.of(dtype)

    @property
    def is_of_a_busy_machine(self) -> bool:
        """Whether others used so much of the CPUs meanwhile that the rates may be too low."""
        return self.busy_share > MOST_BUSY_SHARE

    def overlap_of(self, q_len: int) -> float:
        """The overlap of lanes in a pass of so many rows a sequence."""
        return self.overlap if q_len == 1 else self.prompt_overlap

    @property
    def sweep_bytes_per_s(self) -> float:
        """What a plain read of memory reaches with the threads in use; some kernels read a little faster."""
        sweeps = [rate.sweep_bytes_per_s for rate in self.thread_sweep if rate.threads == self.cores]
        return sweeps[0] if sweeps else self.dram_bytes_per_s

    def most_ops(self, dtype: str) -> float:
        """Operations a second of a linear of the most favourable row count."""
        return max((rate.ops_per_s.of(dtype) for rate in self.cpu_rows), default=self.cpu_ops_per_s.of(dtype))
