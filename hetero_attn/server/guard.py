"""Who may ask: Host, Origin and key are looked at before anything else; addresses are tidied.

A page of a stranger's site reaches a server on loopback through its visitor's browser, directly (the Origin tells) or
by a name that it lets point there (the Host tells). What a page loads without being able to read it, such as a picture,
comes without an Origin; newer browsers say whose page it is (Sec-Fetch-Site).
"""

import hmac
import re
from collections.abc import Callable, Iterable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from hetero_attn.server.connection import Head
from hetero_attn.server.failures import ApiError, response_of
from hetero_attn.server.settings import LOCAL_NAMES, ServerSettings

WITHOUT_KEY = ("/health", "/version")  # and the page with its files
_ASKED_BY_BROWSERS = {b"access-control-allow-methods": b"GET, POST", b"access-control-max-age": b"600"}


class Guarded(Protocol):
    """An ASGI application that can say at once whom it has no room for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

    def on_arrival(self, path: str, begin: Callable[[], None]) -> Response | None:
        """What a POST that has come whole is answered where there is no room for it; None where `begin` is called."""


class Guard:
    """Lets through what is allowed, and answers the rest itself; an ASGI application around another.

    refused: called with the status of every answer that is an error.
    """

    def __init__(self, app: Guarded, settings: ServerSettings, refused: Callable[[int], None]) -> None:
        self._app, self._settings, self._refused = app, settings, refused

    def on_arrival(self, head: Head, begin: Callable[[], None]) -> Response | None:
        """What a POST is answered that may ask and finds no room; None where more of it has to be looked at, for which
        `begin` is called."""
        path = _tidied(head.path)
        try:
            self._check("POST", path, _texts(head.headers))
        except ApiError:
            begin()  # told, and counted, where it is looked at
            return None
        return self._app.on_arrival(path, begin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = scope | {"path": _tidied(scope["path"])}
        headers = _texts(scope["headers"])
        try:
            self._check(scope["method"], scope["path"], headers)
        except ApiError as error:
            self._refused(error.status)
            await response_of(error, scope["path"])(scope, receive, send)
            return
        if (origin := headers.get("origin")) in self._settings.allowed_origins and origin:
            send = _with_headers(send, origin)
            if scope["method"] == "OPTIONS":
                wanted = headers.get("access-control-request-headers", "authorization, content-type")
                allowed = _ASKED_BY_BROWSERS | {b"access-control-allow-headers": wanted.encode("latin-1")}
                await Response(status_code=204, headers={k.decode(): v.decode("latin-1") for k, v in allowed.items()})(
                    scope, receive, send
                )
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: dict[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_known_host(host):
            raise ApiError(
                400, f"the Host {host!r:.80} is not this server's; serve with --allow-host, or ask 127.0.0.1"
            )
        if origin is not None and not self._is_known_origin(origin, host):
            raise ApiError(403, f"pages of {origin!r:.80} may not ask this server; serve with --allow-origin {origin}")
        is_page = path == "/" or path.startswith("/ui/")
        if origin is None and headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_page:
            raise ApiError(403, "other sites' pages may not ask this server; serve with --allow-origin")
        if method == "OPTIONS" and origin in self._settings.allowed_origins:
            return
        if self._settings.api_key and path not in WITHOUT_KEY and not is_page:
            self._check_key(headers)

    def _is_known_host(self, host: str) -> bool:
        name = re.sub(r":\d+$", "", host).lower()
        known = {*LOCAL_NAMES, self._settings.host.lower(), *map(str.lower, self._settings.allowed_hosts)}
        return name in known or (not self._settings.is_local and not self._settings.allowed_hosts)

    def _is_known_origin(self, origin: str, host: str) -> bool:
        return origin.partition("://")[2].lower() == host.lower() or origin in self._settings.allowed_origins

    def _check_key(self, headers: dict[str, str]) -> None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        given: Iterable[str] = (bearer, headers.get("x-api-key", ""), headers.get("api-key", ""))
        key = self._settings.api_key.encode()
        if not any(hmac.compare_digest(each.encode("latin-1", "replace"), key) for each in given):
            raise ApiError(
                401,
                "a key is missing or wrong; send the server's key as Authorization: Bearer KEY, or as x-api-key",
                code="invalid_api_key",
            )


def _tidied(path: str) -> str:
    """A path without double slashes and without one at its end."""
    return re.sub("/{2,}", "/", path).rstrip("/") or "/"


def _texts(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


def _with_headers(send: Send, origin: str) -> Send:
    """A `send` that lets pages of an allowed origin read what is answered."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            allowed = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
            message = message | {"headers": [*message.get("headers", ()), *allowed]}
        await send(message)

    return wrapped
