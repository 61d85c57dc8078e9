"""Launches of Triton kernels whose compiled form is known already, at a third of what Triton's own way costs in Python.

`JITFunction.run` binds, specialises, hashes and looks up at every launch, 9 to 28 us; the launch itself takes 3. A
`KeptKernel` keeps each compiled form under what Triton specialises on: dtype and alignment of tensors, ones, multiples
of 16 and width of integers, and every constant. A call that was seen before goes straight to the form's own launcher.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton.runtime.driver import driver

# Releases whose launcher takes its arguments as `_launch` gives them; with others every launch is Triton's own.
KNOWN_RELEASES = ("3.6.",)
INT32 = 1 << 31


class KeptKernel:
    """A kernel of `triton.jit`, launched as `kernel[grid](*arguments, **constants)`: constants by name, all else not."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._forms: dict[tuple, tuple[Any, tuple]] = {}
        self._names = getattr(function, "arg_names", ())
        self._plain = frozenset(index for index, parameter in enumerate(getattr(function, "params", ()))
                                if parameter.do_not_specialize)
        self._keeps = hasattr(function, "device_caches") and triton.__version__.startswith(KNOWN_RELEASES)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid) if self._keeps else self.function[grid]

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = driver.active.get_current_device()
        key = (device, *constants.values(), *map(_facts, arguments, map(self._plain.__contains__, range(len(arguments)))))
        form = self._forms.get(key)
        if form is None or _is_watched():
            compiled = self.function[grid](*arguments, **constants)
            rest = tuple(constants[name] for name in self._names[len(arguments):] if name in constants)
            if len(arguments) + len(rest) == len(self._names):
                self._forms[key] = compiled, rest
            return
        compiled, rest = form
        grid = (*grid, 1, 1)
        compiled.run(grid[0], grid[1], grid[2], driver.active.get_current_stream(device), compiled.function,
                     compiled.packed_metadata, None, None, None, *arguments, *rest)


def _is_watched() -> bool:
    """Whether a profiler wants to be told of launches, which Triton's own way does."""
    knobs = triton.knobs.runtime
    return bool(knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls)


def kept(function: Any) -> KeptKernel:
    """Decorates what `triton.jit` made."""
    return KeptKernel(function)


def _facts(value: Any, plain: bool) -> Any:
    """What Triton makes a difference for in an argument; plain: that it was told not to specialise on."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int):
        wide = not -INT32 <= value < INT32
        return wide if plain else (wide, value == 1, value % 16 == 0)
    if isinstance(value, tuple):
        return tuple(_facts(item, plain) for item in value)
    return type(value)
