"""CpuKernels: every op of the CPU lane as a method of one object, because the thread team behind them is state."""

from collections.abc import Callable
from pathlib import Path

import torch

from cpu_kernels.ahead.builders import build_all
from cpu_kernels.attention import op as attention
from cpu_kernels.attention import rope_op as rope
from cpu_kernels.linear import expert_op, pack, repack
from cpu_kernels.linear import op as linear
from cpu_kernels.small import elementwise, memory, route
from cpu_kernels.team.arguments import FLAG
from cpu_kernels.team.flags import Flags, check_flag
from cpu_kernels.team.program import Program
from cpu_kernels.team.store import KernelStore
from cpu_kernels.team.team import RecordedOp, Team
from cpu_kernels.team.words import AWAIT, SET
from cpu_kernels.vectors.isa import choose


class CpuKernels:
    """The CPU lane's ops over one thread team.

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

    def record_wait(self, flag: torch.Tensor, value: int) -> None:
        """Inside `record`: the program waits here until a flag, int64 [1], is `value`; RuntimeError elsewhere.

        What the flag's writer wrote before is visible to the ops that follow.
        """
        self._flags()  # loads what sets a flag: while the program waits it holds the team, and nothing can be loaded
        self._team.note(RecordedOp("await_flag", AWAIT, 0, FLAG.filled(address=check_flag(flag), value=value)))

    def record_set(self, flag: torch.Tensor, value: int) -> None:
        """Inside `record`: the program sets a flag here, after all that its ops before have written; RuntimeError
        elsewhere."""
        self._team.note(RecordedOp("set_flag", SET, 0, FLAG.filled(address=check_flag(flag), value=value)))

    def set_flag(self, flag: torch.Tensor, value: int) -> None:
        """Write a flag, int64 [1], after everything that this thread has written; another thread or a GPU may wait for
        it."""
        self._flags().set(flag, value)

    def await_flag(self, flag: torch.Tensor, value: int, timeout_s: float) -> bool:
        """Wait for a flag to be `value`, spinning first; False where it is not after about `timeout_s`.

        What its writer wrote before is visible afterwards. Python's lock is free meanwhile.
        """
        return self._flags().wait(flag, value, timeout_s)

    def _flags(self) -> Flags:
        if self._made_flags is None:
            self._made_flags = self._team.locked(Flags)
        return self._made_flags

    def sweep(self, tensor: torch.Tensor) -> None:
        """Read every byte of a contiguous tensor and do nothing with it: timed, it is the ceiling of every op."""
        memory.sweep(self._team, tensor)

    def pack(self, rows: torch.Tensor, weight_dtype: str, out: torch.Tensor) -> None:
        """Quantise or copy weights into the packed layout.

        rows: [num_blocks * 16, in_features] float32, bfloat16 or float16; out: uint8 [num_blocks, block_bytes],
        written. Raises ValueError if a weight is NaN or infinite.
        """
        pack.pack(self._team, rows, weight_dtype, out)

    def repack(self, rows: torch.Tensor, source_type: str, out: torch.Tensor) -> None:
        """Lay rows of a GGUF file out in the format that holds them without loss; see formats.SOURCE_TYPES.

        rows: uint8 [num_blocks * 16, bytes of a row], as in the file; source_type: the file's name of it, such as
        "Q4_K"; out: uint8 [num_blocks, block_bytes], written. Raises ValueError if a scale is NaN or infinite.
        """
        repack.repack(self._team, rows, source_type, out)

    def unpack_rows(self, weight: torch.Tensor, weight_dtype: str, row_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Some rows of a packed weight as the numbers they stand for: an embedding is gathered so.

        weight: uint8 [num_blocks, block_bytes] of a coded format; row_ids: int64 [count], each below num_blocks * 16;
        out: float32 [count, in_features], written.
        """
        repack.unpack_rows(self._team, weight, weight_dtype, row_ids, out)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_dtype: str,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        accumulate: bool = False,
    ) -> None:
        """out = x W^T + bias, or out += that.

        x: float32 [rows, in_features], rounded inside to bf16 (bf16) or to int8 per group of 64 (q8, q4);
        weight: uint8 [num_blocks, block_bytes]; weight_dtype: "fp32", "bf16", "q8" or "q4";
        bias: float32 [num_blocks * 16] or None; out: float32 [rows, num_blocks * 16], written.
        """
        linear.linear(self._team, x, weight, weight_dtype, bias, out, accumulate)

    def expert_linear(
        self,
        x: torch.Tensor,
        sources: torch.Tensor | None,
        starts: torch.Tensor,
        first: int,
        weight: torch.Tensor,
        weight_dtype: str,
        out: torch.Tensor,
    ) -> None:
        """out = x W^T for every pick of some experts, each with its expert's W; picks are sorted as `route` says.

        x: float32 [rows, in_features], rounded as in `linear`; sources: int32 [picks], the row of x of each pick, None
        where it is the pick's own; starts: int32 [all experts + 1], where each expert's picks begin; first: the expert
        of weight[0]; weight: uint8 [experts, blocks, block_bytes]; out: float32 [picks, blocks * 16], written for the
        picks of these experts and for no other. Contents of sources and starts are trusted.
        """
        expert_op.expert_linear(self._team, x, sources, starts, first, weight, weight_dtype, out)

    def route(
        self,
        x: torch.Tensor,
        router: torch.Tensor,
        gated: bool,
        normalise: bool,
        ids: torch.Tensor,
        places: torch.Tensor,
        sources: torch.Tensor,
        starts: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Choose the experts of every row by x router^T, and sort all choices by expert.

        x: float32 [rows, hidden]; router: float32 [experts, hidden], one more row where it is gated, zeros to a
        multiple of 16 rows. Written: ids int32 [rows, k], the k highest scores of a row, of equal ones the lower id,
        ascending; weights float32 [rows, k + 1], the softmax over all experts at these, divided by their sum if
        `normalise`, then sigmoid of the gate's product, 1 without one; starts int32 [experts + 1]; places int32
        [rows, k], where each pick is among all, sorted by expert, then by row; sources int32 [rows * k], the row of the
        pick at each place.
        """
        route.route(self._team, x, router, gated, normalise, ids, places, sources, starts, weights)

    def combine(
        self,
        near: torch.Tensor,
        far: torch.Tensor,
        border: torch.Tensor,
        places: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """out[r] += sum over j, ascending, of weights[r, j] * the output of its pick places[r, j].

        near, far: float32 [rows * k, features], outputs by place: those before border, int32 [1], from near, others
        from far; places int32 [rows, k]; weights float32 [rows, k]; out: float32 [rows, features], written.
        """
        route.combine(self._team, near, far, border, places, weights, out)

    def scale_rows(self, factors: torch.Tensor, out: torch.Tensor) -> None:
        """out[r] *= factors[r]. factors: float32 [rows, 1]; out: float32 [rows, features], written."""
        route.scale_rows(self._team, factors, out)

    def norm_heads(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, eps: float) -> None:
        """RMS norm of q over all its heads together, and of k, in place.

        qkv: float32 [rows, num_kv_heads, unit_features] as in `rope_append`, written; q_norm: float32 [num_heads *
        head_dim]; k_norm: float32 [num_kv_heads * head_dim].
        """
        route.norm_heads(self._team, qkv, q_norm, k_norm, eps)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, accumulate: bool = False
    ) -> None:
        """out = x * weight / sqrt(mean(x^2) + eps), or out += that.

        x, out: float32 [rows, hidden]; weight: float32 [hidden].
        """
        elementwise.rms_norm(self._team, x, weight, eps, out, accumulate)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor
    ) -> None:
        """out = (x - mean(x)) * weight / sqrt(mean((x - mean(x))^2) + eps) + bias.

        x, out: float32 [rows, hidden]; weight, bias: float32 [hidden], bias None for none.
        """
        elementwise.layer_norm(self._team, x, weight, bias, eps, out)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """out = silu(gate) * up.

        gate_up: float32 [rows, units * 32], a unit is 16 gate columns, then their 16 up columns; out: float32
        [rows, units * 16], written.
        """
        elementwise.gated(self._team, "silu_mul", gate_up, out)

    def gelu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """out = gelu(gate) * up, gelu in its form by tanh; shapes as in silu_mul."""
        elementwise.gated(self._team, "gelu_mul", gate_up, out)

    def gelu(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = gelu(x), gelu in its form by tanh. x, out: float32 [rows, features]."""
        elementwise.gelu(self._team, x, out)

    def rope_append(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Norm and rotate q and k of new tokens; q to `q`, k and v into their cache slots.

        qkv: float32 [rows, num_kv_heads, unit_features], per group its query heads | k | v | padding;
        positions: int64 [rows]; cos, sin: float32 [max_positions, rotary_dim / 2], pairs (i, i + rotary_dim / 2), later
        dims pass through; q_norm, k_norm: float32 [head_dim] or None (per-head RMS norm with eps before rotation);
        q: float32 [rows, num_heads, head_dim], written; k_pages, v_pages: [num_pages, page_size,
        row_items] of the KV dtype (formats/pages.py), written at slots: int64 [rows, num_kv_heads], page * page_size +
        offset. For q8 and q4, q and k are also multiplied by the Hadamard matrix of formats/pages.py: such a q is for
        attention over such pages alone.
        """
        rope.rope_append(self._team, qkv, positions, cos, sin, q_norm, k_norm, eps, q, k_pages, v_pages, slots)

    def decode_attention(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        page_table: torch.Tensor,
        kv_start: torch.Tensor,
        kv_stop: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """One query row per sequence over positions [kv_start, kv_stop) of its cache.

        q: float32 [batch, num_heads, head_dim], rounded inside to the KV dtype, bf16 for q8 and q4; k_pages, v_pages:
        [num_pages, page_size, row_items] of the KV dtype (formats/pages.py); page_table: int32 [batch, num_kv_heads,
        max_pages], logical page -> page;
        kv_start, kv_stop: int32 [batch]; out: float32 [batch, num_heads, head_dim] and lse: float32 [batch, num_heads]
        (natural log), written. Query head h reads KV head h // (num_heads // num_kv_heads); empty: (0, -inf).
        """
        attention.decode_attention(self._team, q, k_pages, v_pages, page_table, kv_start, kv_stop, scale, out, lse)

    def prefill_attention(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        page_table: torch.Tensor,
        kv_start: int,
        kv_stop: int,
        q_start: int,
        window: int,
        scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Causal attention of q_len rows of one sequence; row i is position q_start + i.

        Key j is visible to row i iff kv_start <= j < kv_stop, j <= q_start + i and (window == 0 or
        j > q_start + i - window). q, out: float32 [q_len, num_heads, head_dim]; page_table: int32
        [num_kv_heads, max_pages]; lse: float32 [q_len, num_heads]; the rest as in decode_attention.
        """
        attention.prefill_attention(
            self._team, q, k_pages, v_pages, page_table, kv_start, kv_stop, q_start, window, scale, out, lse
        )

    def merge(self, outs: list[torch.Tensor], lses: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge attention partials of disjoint key ranges; any number, in any order.

        outs: float32 [..., head_dim] each; lses: float32 [...] each; out, lse: like one of them, written.
        """
        elementwise.merge(self._team, outs, lses, out, lse)
