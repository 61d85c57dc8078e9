"""Tests of drawn examples that each take long: an ordinary run draws few, the run of `matrix` many more."""

import functools
import inspect
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy


def drawn(few: int, many: int, **strategies: SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """In the place of `given`: parametrizes a test by the number of its examples, of which `many` is marked `matrix`."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*, examples: int, **fixtures: object) -> None:
            checks = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
            checks(given(**strategies)(test))(**fixtures)

        parameters = [each for each in inspect.signature(test).parameters.values() if each.name not in strategies]
        added = inspect.Parameter("examples", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = inspect.Signature([*parameters, added])  # type: ignore[attr-defined]
        del run.__wrapped__  # pytest would ask it for its fixtures
        counts = [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.matrix)]
        return pytest.mark.parametrize("examples", counts)(run)

    return decorate
