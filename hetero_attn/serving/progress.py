"""Progress on stderr for what takes over a second: loading weights, computing a long prompt, planning many times."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from placement import Plan

if TYPE_CHECKING:
    from hetero_attn.models.requantised import Requantised
    from hetero_attn.serving.request import Request

Item = TypeVar("Item")


def loading_bar(plan: Plan, show: bool) -> tqdm:
    """A bar over the bytes of a plan's weights; `update(count)` as they are placed."""
    return tqdm(
        total=plan.workload.weight_bytes,
        desc=f"loading {plan.model}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if show and sys.stderr is not None else True,  # None: only a person sees it
        leave=False,
    )


def bytes_bar(total: int, what: str) -> tqdm:
    """A bar over bytes; `update(count)` as they are done. Only a person sees it."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False)


def compile_note(name: str) -> None:
    """Say that a CPU kernel is being compiled: about a second, once on a machine."""
    _note(f"compiling the CPU kernel {name} for this machine, once")


def prepare_note(name: str) -> None:
    """Say what is made ready on a GPU: seconds where kernels are compiled, once on a machine, else next to none."""
    _note(f"preparing {name}")


def requantised_note(found: "Requantised | None") -> None:
    """Say what it changed to hold a file's codes in another dtype, if anything did."""
    if found is not None:
        _note(found.line())


def drafter_note(name: str) -> None:
    """Say who drafts."""
    _note(f"drafts by {name}")


def _note(text: str) -> None:
    """A line on stderr, past a bar; nothing where stderr is closed."""
    if sys.stderr is not None:
        tqdm.write(text, file=sys.stderr)


class PrefillBar:
    """A bar over the prompt tokens of some requests, shown while any prompt needs more than one chunk.

    It goes away with the last prompt token, before any text is printed.
    """

    def __init__(self, requests: "Sequence[Request]", chunk: int, show: bool) -> None:
        self._requests = requests
        total = sum(len(request.prompt_token_ids) for request in requests)
        is_long = any(len(request.prompt_token_ids) > chunk for request in requests)
        self._bar = tqdm(
            total=total,
            desc="prompt",
            unit="tok",
            disable=not (show and is_long and sys.stderr is not None),
            leave=False,
        )

    def update(self) -> None:
        """Show how far the prompts have come."""
        if self._bar.disable:
            return
        self._bar.update(self._computed() - self._bar.n)
        if self._bar.n >= self._bar.total:
            self._bar.close()

    def _computed(self) -> int:
        return sum(min(request.computed, len(request.prompt_token_ids)) for request in self._requests)

    def close(self) -> None:
        """Take the bar away; idempotent."""
        self._bar.close()


def steps_bar(steps: Sequence[Item], what: str) -> Iterable[Item]:
    """The steps, one after another, under a bar that only a person sees."""
    return tqdm(steps, what, file=sys.stderr, disable=None, leave=False)


def working(what: str) -> AbstractContextManager:
    """Say what takes a while, to a person only."""
    from rich.console import Console

    return Console(stderr=True).status(what)
