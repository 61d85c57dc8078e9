"""Ops and torch calls of a simulated machine: what each reads and writes is told to the race checker."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hetero_attn.tools.timeline.recorded_ops import tensors_in
from tests.support.gpu.race_checker import MixedMemoryError
from tests.support.kernels.contract_ops import OPS

if TYPE_CHECKING:
    from tests.support.gpu.simulated_gpu import SimulatedDriver, Stream

WRITTEN = {"q", "pages", "out", "into", "target"}  # of rope_append, and of every other operation its results
ONLY_READ = {"decode_attention": {"q", "pages"}, "prefill_attention": {"q", "pages"}}
READ_TOO = (
    "add_rows",
    "combine",
    "scale_rows",
    "norm_heads",
    "add_expert_bias",
    "add_sinks",
    "sigmoid_mul",
    "delta_step",
)  # what they write
OTHERS_WRITTEN = {"norm_heads": {"qkv"}, "delta_step": {"states", "out"}}
CHECKED_OPS = {*OPS, "add_rows", "pack"}


class PickedReads(list):
    """What a call over experts is given, of whose weights it reads those that have picks: `now()`, when it runs."""

    def __init__(self, tensors: list, picks: Any, weight: torch.Tensor) -> None:
        super().__init__(tensors)
        self._picks, self._weight = picks, weight

    def now(self) -> list:
        """The tensors, with the weights of experts that have picks in the place of all."""
        with _disable_current_modes():
            first, counts = self._picks.first, self._picks.starts.diff().tolist()
            busy = [row for row, count in zip(self._weight, counts[first:], strict=False) if count]
        return [*(tensor for tensor in self if tensor is not self._weight), *busy]


class CheckedOps:
    """A module or object of operations; every call goes to `launch(name, work, reads, writes)`."""

    def __init__(self, ops: Any, launch: Callable[..., None]) -> None:
        self._ops = ops
        self._launch = launch

    def rounded_norm(self, x: Any, weight: Any, eps: float, out: Any, fmt: str) -> Any:
        """The norm, and x itself as the reference rounds it."""
        self.rms_norm(x, weight, eps, out)
        return out

    def rounded_gated(self, gate_up: Any, out: Any, activation: str, fmt: str) -> Any:
        """The activation, and x itself as the reference rounds it."""
        getattr(self, activation)(gate_up, out)
        return out

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        if name not in CHECKED_OPS:
            return operation
        signature = inspect.signature(operation)

        def call(*arguments: Any, **named: Any) -> None:
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            writes, reads = [], []
            for parameter, value in bound.arguments.items():
                tensors = tensors_in(value)
                written = parameter in OTHERS_WRITTEN.get(name, WRITTEN - ONLY_READ.get(name, set()))
                (writes if written else reads).extend(tensors)
            if bound.arguments.get("accumulate") or name in READ_TOO:
                reads += writes
            if name == "expert_linear":
                reads = PickedReads(reads, bound.arguments["picks"], bound.arguments["weight"])
            self._launch(name, lambda: operation(*arguments, **named), reads, writes)

        return call


class CheckedHostOps(CheckedOps):
    """The CPU kernels, each call checked; closing it leaves the kernels, which several runs may share, open."""

    def close(self) -> None:
        """The kernels' owner closes them."""


def checked_host_ops(ops: Any, driver: SimulatedDriver) -> CheckedHostOps:
    """The CPU kernels, each call checked as an access of the running thread and refused GPU memory."""

    def launch(name: str, work: Callable[[], Any], reads: list, writes: list) -> None:
        for tensor in (*reads, *writes):
            if tensor.numel() and driver.checker.on_device(tensor):
                raise MixedMemoryError(f"{name} on the CPU was given GPU memory {tuple(tensor.shape)}")
        driver.run_host(name, reads, writes)
        with _disable_current_modes():
            work()

    checked = CheckedHostOps(ops, launch)
    checked.set_flag = driver.set_flag
    checked.await_flag = driver.await_flag
    return checked


class TorchCalls(TorchDispatchMode):
    """Plain torch calls: on host memory an access of this thread, on GPU memory a kernel of the stream."""

    def __init__(self, driver: SimulatedDriver, stream: Stream) -> None:
        super().__init__()
        self._driver = driver
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = [
            named[argument.name]
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        operands = tensors_in((args, tuple(kwargs.values())))
        on_device = [tensor for tensor in operands if self._driver.checker.on_device(tensor)]
        if on_device and written:
            self._driver.launch(self._stream, str(func), lambda: func(*args, **kwargs), operands, written)
            return args[0]
        result = func(*args, **kwargs)
        results = tensors_in(result)
        shared = {tensor.untyped_storage().data_ptr() for tensor in operands}
        is_view = not written and all(tensor.untyped_storage().data_ptr() in shared for tensor in results)
        if on_device and not is_view:
            raise MixedMemoryError(f"{func} would make a tensor of GPU memory outside of the arena")
        if not is_view or not results:
            self._driver.run_host(str(func), operands, written)
        return result


def filled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with every bit set: NaN in every floating-point type."""
    tensor.view(torch.uint8).fill_(255)
    return tensor
