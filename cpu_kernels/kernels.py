"""CpuKernels: every op of the CPU lane as a method of one object, because the thread team behind them is state."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from cpu_kernels.ahead.builders import build_all
from cpu_kernels.attention import op as attention
from cpu_kernels.attention import rope_op as rope
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
from cpu_kernels.delta import op as delta
from cpu_kernels.linear import expert_op, pack, repack
from cpu_kernels.linear import op as linear
from cpu_kernels.small import elementwise, expert_terms, memory, route
from cpu_kernels.team.arguments import FLAG
from cpu_kernels.team.flags import Flags, check_flag
from cpu_kernels.team.program import Program
from cpu_kernels.team.store import KernelStore
from cpu_kernels.team.team import RecordedOp, Team
from cpu_kernels.team.words import AWAIT, SET
from cpu_kernels.vectors.isa import choose


class CpuKernels:
    """The CPU lane's ops over one thread team: those of `contract.Ops`, which says what each computes, and some more.

    num_threads: threads that work, the caller included; default: the physical cores this process may use.
    pin: tie each member thread to a core of its own (never the caller).
    isa: "avx512", "avx512vnni", "avxvnni", "avx2" or "portable"; default: the best this CPU has.
    cache_dir: where compiled kernels are kept (default: the user's cache directory).
    on_compile(name): called before a kernel is compiled, about a second each, only the first time on a machine.

    All tensors are on the CPU with a contiguous last dimension; wrong shapes, dtypes or contents raise ValueError and
    nothing outside a tensor is ever read. Outputs are written in place. Any thread may call an op; calls take turns.
    An object made before a fork raises RuntimeError in the child. Use as a context manager or call close().
    """

    def __init__(
        self,
        num_threads: int | None = None,
        pin: bool = False,
        isa: str | None = None,
        cache_dir: Path | None = None,
        on_compile: Callable[[str], None] | None = None,
    ):
        chosen = choose(isa)
        self._team = Team(KernelStore(cache_dir, on_compile), chosen, num_threads, pin)
        self._made_flags: Flags | None = None

    def alone(self) -> "CpuKernels":
        """The same ops on whichever thread calls them, alone; its calls and this object's do not wait for each other.

        It shares what is compiled, has no threads, and need not be closed."""
        made = CpuKernels.__new__(CpuKernels)
        made._team, made._made_flags = self._team.alone(), None
        return made

    @property
    def isa(self) -> str:
        """Name of the instruction set path in use."""
        return self._team.isa.name

    @property
    def num_threads(self) -> int:
        """Threads that work on an op, the caller included."""
        return self._team.num_threads

    def close(self) -> None:
        """Stop the threads; ops raise RuntimeError afterwards."""
        self._team.close()

    def __enter__(self) -> "CpuKernels":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def record(self, work: Callable[[], None]) -> Program:
        """The ops that `work` calls, checked and laid out once, to be run again and again without Python between them.

        Nothing is computed now. A run reads and writes the very tensors that `work` used, which must stay alive and in
        place; what they hold may change between runs. `work` must compute with this object's ops alone.
        """
        return Program(self._team, self._team.record(work))

    def prepare(self, work: Callable[[], None]) -> None:
        """Compile the kernels of the ops that `work` calls, several at once, where a call of an op compiles one.

        Nothing is computed. For the first thing that is done with this object: no other thread may call an op
        meanwhile. What cannot be compiled ahead is compiled by the first call.
        """
        missing = self._team.missing(work)
        self._team.locked(lambda store: build_all(store, missing, self.num_threads))

    def record_wait(self, flag: Tensor, value: int) -> None:
        """Inside `record`: the program waits here until a flag, int64 [1], is `value`; RuntimeError elsewhere.

        What the flag's writer wrote before is visible to the ops that follow.
        """
        self._flags()  # loads what sets a flag: while the program waits it holds the team, and nothing can be loaded
        self._team.note(RecordedOp("await_flag", AWAIT, 0, FLAG.filled(address=check_flag(flag), value=value)))

    def record_set(self, flag: Tensor, value: int) -> None:
        """Inside `record`: the program sets a flag here, after all that its ops before have written; RuntimeError
        elsewhere."""
        self._team.note(RecordedOp("set_flag", SET, 0, FLAG.filled(address=check_flag(flag), value=value)))

    def set_flag(self, flag: Tensor, value: int) -> None:
        """Write a flag, int64 [1], after everything that this thread has written; another thread or a GPU may wait for
        it."""
        self._flags().set(flag, value)

    def await_flag(self, flag: Tensor, value: int, timeout_s: float) -> bool:
        """Wait for a flag to be `value`, spinning first; False where it is not after about `timeout_s`.

        What its writer wrote before is visible afterwards. Python's lock is free meanwhile.
        """
        return self._flags().wait(flag, value, timeout_s)

    def _flags(self) -> Flags:
        if self._made_flags is None:
            self._made_flags = self._team.locked(Flags)
        return self._made_flags

    def sweep(self, tensor: Tensor) -> None:
        """Read every byte of a contiguous tensor and do nothing with it: timed, it is the ceiling of every op."""
        memory.sweep(self._team, tensor)

    def pack(self, rows: Tensor, weight_dtype: str, out: Tensor) -> None:
        """Quantise or copy weights into the packed layout.

        rows: [num_blocks * 16, in_features] float32, bfloat16 or float16; out: uint8 [num_blocks, block_bytes],
        written. Raises ValueError if a weight is NaN or infinite.
        """
        pack.pack(self._team, rows, weight_dtype, out)

    def repack(self, rows: Tensor, source_type: str, out: Tensor) -> None:
        """Lay rows of a GGUF file out in the format that holds them without loss; see formats.SOURCE_TYPES.

        rows: uint8 [num_blocks * 16, bytes of a row], as in the file; source_type: the file's name of it, such as
        "Q4_K"; out: uint8 [num_blocks, block_bytes], written, with others' blocks between or without. Raises ValueError
        if a scale is NaN or infinite.
        """
        repack.repack(self._team, rows, source_type, out)

    def unpack_rows(self, weight: Tensor, weight_dtype: str, row_ids: Tensor, out: Tensor) -> None:
        """Some rows of a packed weight as the numbers they stand for: an embedding is gathered so.

        weight: uint8 [num_blocks, block_bytes] of a coded format, or numbers [rows, in_features] of a row-major one;
        row_ids: int64 [count], each below num_blocks * 16 or rows; out: float32 [count, in_features], written.
        """
        repack.unpack_rows(self._team, weight, weight_dtype, row_ids, out)

    def linear(
        self, x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool = False
    ) -> None:
        linear.linear(self._team, x, weight, weight_dtype, bias, out, accumulate)

    def expert_linear(self, x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
        expert_op.expert_linear(self._team, x, picks, weight, weight_dtype, out)

    def route(self, x: Tensor, router: Tensor, scoring: Scoring, into: Routes) -> None:
        route.route(self._team, x, router, scoring, into)

    def combine(self, near: Tensor, far: Tensor, border: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> None:
        route.combine(self._team, near, far, border, places, weights, out)

    def add_expert_bias(self, bias: Tensor, picks: Picks, out: Tensor) -> None:
        expert_terms.add_expert_bias(self._team, bias, picks, out)

    def clamped_silu_mul(self, gate_up: Tensor, alpha: float, limit: float, out: Tensor) -> None:
        expert_terms.clamped_silu_mul(self._team, gate_up, alpha, limit, out)

    def sigmoid_mul(self, gate: Tensor, out: Tensor) -> None:
        expert_terms.sigmoid_mul(self._team, gate, out)

    def scale_rows(self, factors: Tensor, out: Tensor) -> None:
        route.scale_rows(self._team, factors, out)

    def norm_heads(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
        route.norm_heads(self._team, qkv, q_norm, k_norm, eps)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, accumulate: bool = False) -> None:
        elementwise.rms_norm(self._team, x, weight, eps, out, accumulate)

    def copy_rows(self, target: Tensor, source: Tensor) -> None:
        elementwise.copy_rows(self._team, target, source)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
        elementwise.layer_norm(self._team, x, weight, bias, eps, out)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        elementwise.gated(self._team, "silu_mul", gate_up, out)

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        elementwise.gated(self._team, "gelu_mul", gate_up, out)

    def gelu(self, x: Tensor, out: Tensor) -> None:
        elementwise.gelu(self._team, x, out)

    def gather_columns(self, x: Tensor, order: Tensor, out: Tensor) -> None:
        elementwise.gather_columns(self._team, x, order, out)

    def rope_append(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, q: Tensor, pages: Pages, slots: Tensor
    ) -> None:
        rope.rope_append(self._team, qkv, positions, rotation, q, pages, slots)

    def decode_attention(
        self, q: Tensor, pages: Pages, keys: RowKeys, scale: float, into: Partial, cap: float = 0.0
    ) -> None:
        attention.decode_attention(self._team, q, pages, keys, scale, into, cap)

    def prefill_attention(
        self, q: Tensor, pages: Pages, keys: ChunkKeys, scale: float, into: Partial, cap: float = 0.0
    ) -> None:
        attention.prefill_attention(self._team, q, pages, keys, scale, into, cap)

    def delta_step(
        self, projected: Tensor, gates: Tensor, rule: DeltaRule, states: DeltaStates, ids: Tensor, out: Tensor
    ) -> None:
        delta.delta_step(self._team, projected, gates, rule, states, ids, out)

    def add_sinks(self, sinks: Tensor, into: Partial) -> None:
        expert_terms.add_sinks(self._team, sinks, into)

    def merge(self, partials: list[Partial], into: Partial) -> None:
        elementwise.merge(self._team, partials, into)
