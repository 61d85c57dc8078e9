"""A Triton driver that compiles kernels for a GPU and launches nothing: what queueing costs, and what is launched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_BYTES = 227 << 10


class Launches:
    """What was launched: how many kernels, and with `keep` the arguments of each."""

    def __init__(self, keep: bool) -> None:
        self.count = 0
        self.kept: list[tuple[Any, ...]] | None = [] if keep else None

    def add(self, arguments: tuple[Any, ...]) -> None:
        """Count one launch, called with grid, stream, function, metadata, hooks and the kernel's arguments."""
        self.count += 1
        if self.kept is not None:
            self.kept.append(arguments)


def _launcher_of(launches: Launches) -> type:
    class CudaLauncher:
        """Triton's launcher, with its signature and without a driver; hooks are called as it calls them."""

        def __init__(self, src: Any, metadata: Any) -> None:
            pass

        def __call__(self, gridX, gridY, gridZ, stream, function, *args) -> None:
            if (enter := args[2]) is not None:
                enter(args[1])
            launches.add((gridX, gridY, gridZ, stream, function, *args))

    return CudaLauncher


@contextmanager
def silent_triton(
    architecture: int, keep: bool = False, launcher_of: Callable[[Launches], type] = _launcher_of
) -> Iterator[Launches]:
    """Within this, kernels are compiled for `architecture`, each has a number for its handle, and none runs."""
    launches, handles, active = Launches(keep), itertools.count(1), driver._active
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES},
        load_binary=lambda *arguments: (1, next(handles), 32, 0, 1024),
    )
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: f"silent {id(launches)}", get_current_stream=lambda device: 1,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32), launcher_cls=launcher_of(launches),
        utils=utils,
    ))  # fmt: skip
    try:
        yield launches
    finally:
        driver._active = active
