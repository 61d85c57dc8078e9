"""The two contracts behind a device: the operations of a transformer, and the driver of a GPU or of what stands in for
it.

`cpu_kernels.CpuKernels`, the Triton kernels and `gpu_kernels.reference` all offer `Ops`; `CudaDriver` and
`EmulatedDriver` are drivers, and so are those of the tests.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Ops(Protocol):
    """The operations of one place, shapes and bytes as `gpu_kernels.reference` describes them; `out` is written in
    place."""

    def linear(
        self, x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool = False
    ) -> None:
        """Rows of x times a packed weight."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, accumulate: bool = False) -> None:
        """Root-mean-square norm of each row, written or added."""

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """silu(gate) * up."""

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """gelu(gate) * up, gelu by tanh."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
        """Layer norm of each row, bias None for none."""

    def gelu(self, x: Tensor, out: Tensor) -> None:
        """gelu(x), gelu by tanh."""

    def route(
        self,
        x: Tensor,
        router: Tensor,
        gated: bool,
        normalise: bool,
        ids: Tensor,
        places: Tensor,
        sources: Tensor,
        starts: Tensor,
        weights: Tensor,
    ) -> None:
        """The experts of every row, and all picks sorted by expert."""

    def expert_linear(
        self,
        x: Tensor,
        sources: Tensor | None,
        starts: Tensor,
        first: int,
        weight: Tensor,
        weight_dtype: str,
        out: Tensor,
    ) -> None:
        """Each pick's row of x times its own expert's packed weight."""

    def combine(self, near: Tensor, far: Tensor, border: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> None:
        """Add the weighted outputs of experts to the rows that chose them."""

    def scale_rows(self, factors: Tensor, out: Tensor) -> None:
        """Every row times its factor."""

    def norm_heads(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
        """RMS norm of q over all its heads together, and of k."""

    def rope_append(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        slots: Tensor,
    ) -> None:
        """Norm and rotate q and k; write q, and k and v to their places in the pages."""

    def decode_attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        page_table: Tensor,
        kv_start: Tensor,
        kv_stop: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Attention of one query per sequence over a range of its cache."""

    def prefill_attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        page_table: Tensor,
        kv_start: int,
        kv_stop: int,
        q_start: int,
        window: int,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Causal attention of a chunk of one sequence."""

    def merge(self, outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
        """Merge attention partials over disjoint keys."""


class Driver(Protocol):
    """A GPU's memory, streams and events, with the meaning they have in CUDA. Calls queue work and return.

    kind: "cuda" or "emulated"; name: for messages; ops: over its tensors. A stream runs its work in order; an event is
    a
    point on one. flag: int64 [1] in page-locked host memory.
    """

    @property
    def kind(self) -> str:
        """The kind of device that a plan is made for."""

    @property
    def name(self) -> str:
        """What messages call the device."""

    @property
    def ops(self) -> Any:
        """An `Ops` over tensors of the device, and copy_rows and add_rows."""

    def stream(self, name: str) -> Any:
        """A new in-order queue."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool) -> Tensor:
        """Memory of the device, uninitialised. stays: until the end, whatever the plan."""

    def free(self, tensor: Tensor) -> None:
        """Take back what `allocate` gave."""

    def pin(self, tensor: Tensor) -> bool:
        """Page-lock host memory; False where the system refuses."""

    def unpin(self, tensor: Tensor) -> bool:
        """Undo that; False where it was not page-locked."""

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Same shape and dtype; contiguous, or rows of equal length with a stride; by an engine or a kernel, in the
        stream's order either way."""

    def reaches(self, target: Tensor, source: Tensor, stream: Any) -> bool:
        """Whether kernels of the stream read `source`, in host memory, as fast as it could be copied to the device."""

    def record(self, stream: Any, reuse: Any = None) -> Any:
        """An event after the work queued on the stream so far: a new one, or `reuse`, for which nobody is to wait
        any more but whose waits were queued; those stay what they were."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued on the stream from now on come after the event."""

    def synchronize(self, event: Any) -> None:
        """Block the calling thread until the event."""

    def write_flag(self, stream: Any, flag: Tensor, value: int) -> None:
        """Write a flag once the work queued so far is done."""

    def wait_flag(self, stream: Any, flag: Tensor, value: int, exactly: bool) -> None:
        """Hold the stream until the flag has the value, or, unless `exactly`, a later one."""

    def capture(self, stream: Any) -> AbstractContextManager:
        """A context whose graph's `replay()` queues again what was queued inside."""

    def current(self, stream: Any) -> AbstractContextManager:
        """A context in which this thread's kernels are queued on the stream."""

    def delay(self, stream: Any) -> None:
        """Queue nothing that takes longer than a launch; for measurements."""

    def mark(self, stream: Any) -> Any:
        """A point in time of the stream."""

    def seconds_between(self, mark: Any, later: Any) -> float:
        """Seconds between two marks, both reached."""

    def clear(self) -> None:
        """Bring back what operations keep from call to call."""

    def close(self) -> None:
        """After all queued work has ended, return everything."""
