"""torch itself kept out of a step: its own threads, and an autocast of the caller's."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

from hetero_attn.devices import Device


def torch_at_rest(device: Device | None) -> AbstractContextManager[None]:
    """What a thread needs around a step: its kernels go to the compute stream, and torch's own pool is kept out.

    The pool's idle threads spin on the cores of the thread team; beside one, a copy of the logits took 4 ms. An
    autocast of the caller's would round our products, so it is off inside. Where all that is so, nothing is done.
    """
    is_at_rest = device is None and torch.get_num_threads() == 1 and not _autocasts()
    return nullcontext() if is_at_rest else _brought_to_rest(device)


@contextmanager
def _brought_to_rest(device: Device | None) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _without_autocast(), nullcontext() if device is None else device.current():
            yield
    finally:
        torch.set_num_threads(threads)


def _without_autocast() -> AbstractContextManager:
    enabled = _autocasts()
    if not enabled:
        return nullcontext()
    off = ExitStack()
    for device in enabled:
        off.enter_context(torch.autocast(device, enabled=False))
    return off


def _autocasts() -> list[str]:
    """The kinds of device for which the caller's autocast is on."""
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
