"""What replays a case of another project's suite on the server of a model that knows tools and thinking."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.support.suite.extras import MISSING_OF_SERVER

collect_ignore_glob = ["test_*.py"] if MISSING_OF_SERVER else []
KEY = "the-key"


@pytest.fixture(scope="package")
def guarded(tooled) -> Iterator:
    """A client of the same model behind a key, without a socket."""
    from starlette.testclient import TestClient

    from hetero_attn.server.app import make_app
    from hetero_attn.server.service import Service
    from hetero_attn.server.settings import ServerSettings

    service = Service(lambda: None, ServerSettings(api_key=KEY))
    service.driver = tooled.service.driver
    with TestClient(make_app(service), base_url="http://localhost") as client:
        yield client
    service.close()


@pytest.fixture
def replay(tooled, guarded) -> Iterator[Callable]:
    """Sends a case and checks what comes back."""
    import httpx

    from tests.support.server.replayed import Case, Reply
    from tests.support.server.scripted import saying

    def ask(case: Case) -> Reply:
        headers = dict(case.headers)
        client = open_client
        if case.key is not None:
            client = guarded
            headers |= {"authorization": f"Bearer {case.key}"} if case.key else {}
        scripted = contextlib.nullcontext([]) if case.says is None else saying(tooled.llm, case.says)
        with scripted as prompts:
            if case.body is None:
                answer = client.get(case.path, headers=headers)
            elif isinstance(case.body, bytes):
                answer = client.post(case.path, content=case.body, headers=headers)
            else:
                answer = client.post(case.path, json=case.body, headers=headers)
        return Reply(answer, prompts, lambda: ask(case))

    def run(case: Case) -> None:
        reply = ask(case)
        assert reply.answer.status_code == case.status, reply.text
        if case.error is not None:
            assert case.error in reply.error
        if case.check is not None:
            assert case.check(reply), (reply.text, reply.prompts)

    with httpx.Client(base_url=tooled.url, timeout=60, trust_env=False) as open_client:
        yield run
