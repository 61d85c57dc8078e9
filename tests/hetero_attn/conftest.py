"""What several files about whole models share."""

from collections.abc import Iterator

import pytest

from tests.support import toy


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Torch computes with one thread in a test that asks for this, because its tensors are tiny."""
    with toy.one_torch_thread():
        yield
