"""Launches that go past Triton's own Python: a variant of a kernel is looked up by Triton once, then called directly.

`JITFunction.run` binds arguments by name, inspects each, makes a text of all options and reads the environment, at
every launch; prompts waited for that more than for the GPU. What selects a variant is little: the constants, whether a
number is 1 or a multiple of 16, whether a pointer is a multiple of 16, and the types. Here the key is finer: constants,
the numbers themselves, dtypes, and the alignment of every pointer where not all are aligned.

The first launch with a key is Triton's, which checks and compiles, and returns the compiled variant; later ones call
its launcher. Where a variant cannot be had, or is not called as known, every launch is Triton's: under the
interpreter, while kernels are only compiled, while launch hooks are set, and with a Triton that works otherwise.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

ALIGNED = 16  # bytes: what Triton tells pointers apart by
Nest = Callable[[tuple], tuple]
LAUNCHER_PARAMETERS = ["self", "gridX", "gridY", "gridZ", "stream", "function", "args"]


class Shape:
    """Constants of a kernel and options of its launch; made once for each set of them, so told apart by identity."""

    __slots__ = ("constants",)

    def __init__(self, **constants: Any) -> None:
        self.constants = constants


class Variant(NamedTuple):
    """A compiled kernel: its launcher, what that is given before the arguments, and the constants, which come last."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


class Kernel:
    """A decorator over `triton.jit` for a kernel whose parameters are: tensors, plain numbers, strides, constants.

    Plain numbers select no variant: floats, and ints named in `do_not_specialize`. Strides are any other ints. With
    meta tensors, which have no memory, a launch compiles its variant for the current device and does nothing else.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._variants: dict[tuple, Variant] = {}
        self._is_direct = isinstance(function, JITFunction)  # else Triton interprets it

    def launch(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        strides: tuple[int, ...],
        shape: Shape,
        by_address: bool = True,
        nest: Nest = tuple,
    ) -> None:
        """Launch on the current CUDA stream; arguments in the order of the kernel's parameters.

        by_address: every tensor is in memory of the device, so that its address is the device's. nest: gives the
        arguments of a kernel that takes tuples; one nest for one shape.
        """
        if not self._is_direct:
            self.function[grid](*nest((*tensors, *numbers, *strides)), **shape.constants)
            return
        active, hooks = driver.active, knobs.runtime
        device = active.get_current_device()
        pointers, bits = [tensor.data_ptr() for tensor in tensors], 0
        for pointer in pointers:
            bits |= pointer
        alignments = None if bits % ALIGNED == 0 else tuple(pointer % ALIGNED == 0 for pointer in pointers)
        key = (shape, strides, alignments, device, *[tensor.dtype for tensor in tensors])
        variant = self._variants.get(key)
        if tensors[0].is_meta:  # of the same key as tensors at hand: their addresses must not reach a kept variant
            if variant is None:
                self.function.warmup(*nest((*tensors, *numbers, *strides)), grid=grid, **shape.constants)
            return
        if variant is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            self._launch_by_triton(grid, nest((*tensors, *numbers, *strides)), shape, key)
            return
        variant.run(
            *grid,
            active.get_current_stream(device),
            variant.function,
            variant.metadata,
            None,
            None,
            None,
            *nest((*(pointers if by_address else tensors), *numbers, *strides)),
            *variant.constants,
        )

    def _launch_by_triton(self, grid: tuple[int, int, int], arguments: tuple, shape: Shape, key: tuple) -> None:
        compiled = self.function[grid](*arguments, **shape.constants)
        if getattr(compiled, "_run", None) is not None:  # launched, not only compiled
            if self._is_known(compiled):
                constants = tuple(shape.constants[name] for name in self.function.arg_names[len(arguments) :])
                self._variants[key] = Variant(compiled.run, compiled.function, compiled.packed_metadata, constants)
            else:
                self._is_direct = False
                warnings.warn(
                    "this release of Triton launches kernels in a way that is not known here: every launch "
                    "goes through its own Python, so prompts are slower",
                    stacklevel=2,
                )

    def _is_known(self, compiled: Any) -> bool:
        """Whether the launcher takes what Triton 3.6's does: grid, stream, function, metadata, hooks, all
        parameters."""
        parameters = [*inspect.signature(type(compiled.run).__call__).parameters]
        return (
            parameters == LAUNCHER_PARAMETERS
            and hasattr(compiled, "packed_metadata")
            and [*compiled.src.signature] == self.function.arg_names
        )
