"""The addresses of a server, and what stands around each: one place where an error becomes an answer."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hetero_attn.server.failures import as_api_error, response_of
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


def make_app(service: Service) -> ASGIApp:
    """The application that answers for a service."""

    def failed(request: Request, error: Exception) -> Response:
        service.metrics.refused(as_api_error(error).status)
        return response_of(error, request.url.path)

    def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Any]]:
        async def answer(request: Request) -> Any:
            try:
                return await handler(service, request)
            except ClientGone:
                return Response(status_code=499)
            except Exception as error:
                return failed(request, error)

        return answer

    def with_room(handler: Handler) -> Handler:
        async def answer(service: Service, request: Request) -> Any:
            service.check_room()  # a full queue is told before anything of the body is read
            return await handler(service, request)

        return answer

    known = [(method, path, with_room(handler)) for method, path, handler in COMPUTED]
    known += (*TOLD, *(PAGE if service.settings.has_page else ()))
    routes = [Route(path, endpoint(handler), methods=[method]) for method, path, handler in known]
    return Guard(Starlette(routes=routes, exception_handlers={HTTPException: failed}), service.settings)
