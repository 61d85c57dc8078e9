"""The addresses of a server, and what stands around each: one place where an error becomes an answer."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hetero_attn.server.failures import ApiError, as_api_error, response_of
from hetero_attn.server.guard import Guard
from hetero_attn.server.page import files, report
from hetero_attn.server.protocols import chat, completions, messages, ollama, responses, system
from hetero_attn.server.service import Service
from hetero_attn.server.sse import ClientGone

Handler = Callable[[Service, Request], Awaitable[Any]]
Routes = tuple[tuple[str, str, Handler], ...]
COMPUTED: Routes = (  # these take a place in the queue
    ("POST", "/v1/chat/completions", chat.chat_completions),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/responses", responses.responses),
    ("POST", "/v1/messages", messages.messages),
    ("POST", "/api/chat", ollama.chat),
    ("POST", "/api/generate", ollama.generate),
)
TOLD: Routes = (
    ("POST", "/v1/messages/count_tokens", messages.count_tokens),
    ("GET", "/api/tags", ollama.tags),
    ("POST", "/api/show", ollama.show),
    ("GET", "/api/version", ollama.version),
    ("POST", "/v1/embeddings", system.embeddings),
    ("GET", "/v1/models", system.models),
    ("GET", "/v1/models/{name:path}", system.model),
    ("POST", "/tokenize", system.tokenize),
    ("POST", "/detokenize", system.detokenize),
    ("GET", "/tokenizer_info", system.tokenizer_info),
    ("GET", "/metrics", system.metrics),
    ("GET", "/hetero/report", report.report),
    ("GET", "/hetero/plan", report.curve),
    ("POST", "/hetero/resize", report.resize),
    ("GET", "/health", system.health),
    ("GET", "/version", system.server_version),
)
PAGE: Routes = (("GET", "/", files.page), ("GET", "/ui/{name}", files.part))


def make_app(service: Service) -> Guard:
    """The application that answers for a service."""

    def failed(request: Request, error: Exception) -> Response:
        service.metrics.refused(as_api_error(error).status)
        return response_of(error, request.url.path)

    async def failed_in_routing(request: Request, error: Exception) -> Response:
        answer = failed(request, error)  # what is no coroutine gets a thread of its own
        answer.headers.update(getattr(error, "headers", None) or {})  # the methods that an address takes
        return answer

    def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Any]]:
        async def answer(request: Request) -> Any:
            try:
                return await handler(service, request)
            except ClientGone:
                return Response(status_code=499)
            except Exception as error:
                return failed(request, error)

        return answer

    known = [*COMPUTED, *TOLD, *(PAGE if service.settings.has_page else ())]
    routes = [Route(path, endpoint(handler), methods=[method]) for method, path, handler in known]
    known_routes = Starlette(routes=routes, exception_handlers={HTTPException: failed_in_routing})
    return Guard(Door(known_routes, service), service.settings, service.metrics.refused)


class Door:
    """Tells those who ask for an answer that the queue is full, before anything more of them is looked at: where a
    thousand come at once, what each refusal takes is what all others wait. An ASGI application around another."""

    _paths = frozenset(path for _, path, _ in COMPUTED)

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._let_in: deque[Callable[[], None]] = deque()
        self._arriving = 0  # requests that have come and whose tasks have not begun
        self._told: tuple[object, Response] = None, Response()  # the last refusal, and what it said

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse one request, or pass it on."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if is_post and (refusal := self._refusal(scope["path"])) is not None:
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def on_arrival(self, path: str, begin: Callable[[], None]) -> Response | None:
        """What a POST that has come whole is answered where there is no room for it. Else it is begun, one such request
        in a turn of the event loop: of many that come together those that are refused are told first."""
        refusal = self._refusal(path)
        if refusal is None and path in self._paths:
            self._arriving += 1
            self._let_in.append(begin)
            if len(self._let_in) == 1:
                asyncio.get_running_loop().call_soon(self._begin_next)
        elif refusal is None:
            begin()
        return refusal

    def _begin_next(self) -> None:
        loop, begin = asyncio.get_running_loop(), self._let_in.popleft()
        if self._let_in:  # before one is begun, which may fail
            loop.call_soon(self._begin_next)
        loop.call_soon(self._begun)  # just before its task looks for room: it does not stand in its own way
        begin()

    def _begun(self) -> None:
        self._arriving -= 1

    def _refusal(self, path: str) -> Response | None:
        if path not in self._paths:
            return None
        try:
            self._service.check_room(arriving=self._arriving)
        except ApiError as error:
            self._service.metrics.refused(error.status)
            told = path, error.message, error.retry_after_s
            if told != self._told[0]:  # many are told the same, and to write it is half of what one takes
                self._told = told, response_of(error, path)
            return self._told[1]
        return None
