"""A small mixture of experts of every family."""

import pytest

from tests.support.models.moe import FAMILIES, make_moe


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return {family: make_moe(tmp_path_factory.mktemp(family), family) for family in FAMILIES}
