"""One server for the tests that do not disturb it."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.http_server import RunningServer


@pytest.fixture(scope="package")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client
