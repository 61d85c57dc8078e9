"""One server for the tests that do not disturb it; where the server's packages are missing, a line says so instead."""

import importlib.util
from collections.abc import Iterator

import pytest

MISSING = [
    name for name in ("starlette", "uvicorn", "prometheus_client", "httpx") if importlib.util.find_spec(name) is None
]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why no server was tested."""
    if MISSING:
        terminalreporter.line(f"tests/server is skipped: {', '.join(MISSING)} not installed (extra test-tools)")


@pytest.fixture(scope="package")
def server() -> Iterator:
    """A `RunningServer` of the shipped model."""
    from tests.support.http_server import RunningServer

    with RunningServer() as running:
        yield running


@pytest.fixture
def http(server) -> Iterator:
    """A client of it."""
    import httpx

    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client
