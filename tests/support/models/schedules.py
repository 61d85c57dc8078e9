"""Requests that come while others run, and steps in which something is planted to fail."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hetero_attn import LLM, SamplingParams
from hetero_attn.serving.request import Request


def scheduled(llm: LLM, arrivals: Iterable[tuple[Sequence[int], int, SamplingParams]]) -> list[Request]:
    """The requests of prompts that come one after another, each followed by so many steps, all of them ended."""
    requests = []
    for prompt, steps, params in arrivals:
        requests.append(llm.add(prompt, params))
        for _ in range(steps):
            llm.step()
    while llm.step():
        pass
    return requests


class Failing:
    """Makes calls fail: of every `period` calls of all that it wraps, one before and one behind what it does."""

    def __init__(self, period: int, behind: int) -> None:
        self._period, self._behind, self._calls = period, behind, 0

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, which fails in its turn."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            self._calls += 1
            if self._calls % self._period == 1:
                raise OSError("planted before")
            result = call(*arguments, **options)
            if self._calls % self._period == self._behind:
                raise OSError("planted behind")
            return result

        return wrapped


def steps_through_failures(llm: LLM, requests: Sequence[Request]) -> int:
    """Step until all requests have ended, again after every failure; how many there were."""
    failures = 0
    while any(request.finish_reason is None for request in requests):
        try:
            llm.step()
        except OSError:
            failures += 1
    return failures
