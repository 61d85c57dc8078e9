"""Compile several kernels at once: numba compiles one at a time in a process, so other processes take their share.

Each of them runs worker.py, which reads a kernel a line, compiles it into the store's folder and answers
with a line. They take from one queue, so that a kernel of five seconds holds up nobody. What they do not manage is
compiled by whoever needs it, as if they had never been.
"""

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from cpu_kernels.team.store import KernelStore

WORKER = f"{__package__}.worker"
Kernel = tuple  # (module, factory, *parameters), as KernelStore.address takes it


def build_all(store: KernelStore, kernels: Sequence[Kernel], processes: int) -> None:
    """Compile kernels that the store misses, in so many processes at once where what they compile can be kept."""
    if processes > 1 and store.keeps and sys.executable:
        build_beside(kernels, store.parent, processes - 1, store.build, store.say)
    else:
        for kernel in kernels:
            store.build(kernel)


def build_beside(
    kernels: Sequence[Kernel],
    cache_dir: Path | None,
    helpers: int,
    build: Callable[[Kernel], None],
    on_handed: Callable[[Kernel], None] = lambda kernel: None,
) -> None:
    """Compile kernels here, by `build`, and in up to `helpers` other processes, which keep them in `cache_dir`.

    build(kernel) is called on this thread for those that are compiled here; what it raises is raised. on_handed(kernel)
    is called, on other threads, for those that another process begins.
    """
    queue = deque(kernels)

    def left() -> Iterator[Kernel]:
        while queue:
            with suppress(IndexError):  # another thread took the last one
                yield queue.popleft()

    threads = [
        threading.Thread(target=_serve_helper, args=(left(), cache_dir, on_handed), name=f"hetero-attn-build-{number}")
        for number in range(min(helpers, len(kernels) - 1))
    ]
    for thread in threads:
        thread.start()
    try:
        for kernel in left():
            build(kernel)
    finally:
        queue.clear()
        for thread in threads:
            thread.join()


def _serve_helper(kernels: Iterator[Kernel], cache_dir: Path | None, on_handed: Callable[[Kernel], None]) -> None:
    """Hand kernels to one process until none is left or the process has failed."""
    package = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", WORKER, "" if cache_dir is None else str(cache_dir)]
    environment, pipe, nowhere = os.environ | {"PYTHONPATH": paths}, subprocess.PIPE, subprocess.DEVNULL
    try:
        with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=nowhere, text=True) as process:
            for kernel in kernels:
                on_handed(kernel)
                process.stdin.write(f"{json.dumps([_plain(part) for part in kernel])}\n")
                process.stdin.flush()
                if not process.stdout.readline():
                    return
    except OSError:  # no process, or a broken pipe: what was to be built there is built where it is needed
        return


def _plain(part: object) -> object:
    """A parameter as JSON has it: an instruction set by its name."""
    return part if isinstance(part, str | int) else {"isa": str(part)}
