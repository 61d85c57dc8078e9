"""Models of every form of file, each made when it is first asked for."""

import pytest

from tests.support.quantised.int4_cases import INT4_CASES
from tests.support.quantised.int4_models import make_int4
from tests.support.quantised.scaled_cases import SCALED_CASES
from tests.support.quantised.scaled_models import make_scaled


@pytest.fixture(scope="session")
def int4_models(tmp_path_factory):
    """Folder with `int4` and `plain` by case."""
    made = {}

    def make(case):
        if case not in made:
            write, config, each, more = INT4_CASES[case]
            made[case] = make_int4(tmp_path_factory.mktemp("model"), write, config, each, **more)
        return made[case]

    return make


@pytest.fixture(scope="session")
def scaled_models(tmp_path_factory):
    """Folder with `scaled` and `plain` by case."""
    made = {}

    def make(case):
        if case not in made:
            writers, config, shape, _ = SCALED_CASES[case]
            made[case] = make_scaled(tmp_path_factory.mktemp("model"), writers, config, **shape)
        return made[case]

    return make
