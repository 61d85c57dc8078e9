"""One server for the tests that do not disturb it; where the server's packages are missing, none of them is run."""

from collections.abc import Iterator

import pytest

from tests.support.suite.extras import MISSING_OF_SERVER

collect_ignore_glob = ["test_*.py"] if MISSING_OF_SERVER else []


@pytest.fixture(scope="package")
def server() -> Iterator:
    """A `RunningServer` of the shipped model."""
    from tests.support.server.http_server import RunningServer

    with RunningServer() as running:
        yield running


@pytest.fixture
def http(server) -> Iterator:
    """A client of it."""
    import httpx

    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="package")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A server of a model whose template knows tools and thinking."""
    from tests.support.server.http_server import RunningServer
    from tests.support.server.scripted import load_with, model_with

    folder = model_with(tmp_path_factory.mktemp("model") / "tooled")
    with RunningServer(lambda: load_with(folder, context=1024)) as running:
        yield running
