"""The files of the page: a conversation, and beside it what the model does. No build step, nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hetero_attn.server.failures import ApiError
from hetero_attn.server.service import Service

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def page(service: Service, request: Request) -> Any:
    """Answer `/` with the page that shows a chat and the lanes."""
    return _file("index.html")


async def part(service: Service, request: Request) -> Any:
    """A file that the page loads."""
    return _file(request.path_params["name"])


def _file(name: str) -> Response:
    known = {each.name: each for each in (files("hetero_attn.server.page") / "static").iterdir()}
    kind = KINDS.get(name.rpartition(".")[2])
    if kind is None or name not in known:
        raise ApiError(404, "there is nothing at this address")
    return Response(known[name].read_bytes(), media_type=f"{kind}; charset=utf-8", headers=HEADERS)
