"""Connections that do not wait for ever, and that tell a crowd at once that there is no room.

The head of a request must arrive within a deadline. A request that has come whole, in the plainest of forms, is shown
to the application before it is parsed: a refusal that holds whatever the body says costs no parser, no task and one
packet. Where a thousand come at once, what each refusal takes is what all others wait.
"""

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import h11
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

HEAD_S = 30.0
HEAD_BYTES = 1 << 16
# What decides about more than whether there is room: these are for the parser and the application.
_UNUSUAL = {b"connection", b"expect", b"origin", b"te", b"transfer-encoding", b"upgrade"}
_ONCE = (b"content-length", b"host")


class Head(NamedTuple):
    """Of a request that has come whole: its path and its headers, their names in small letters."""

    path: str
    headers: list[tuple[bytes, bytes]]


def plain_post(data: bytes) -> Head | None:
    """The head of a POST if some bytes are one, from end to end and with nothing that is not seen every day."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, _, rest = first.partition(b" ")
    path, _, version = rest.partition(b" ")
    if method != b"POST" or version != b"HTTP/1.1" or not path.isascii() or head.count(b"\n") != len(lines):
        return None
    pairs = [line.partition(b":") for line in lines]
    headers = [(name.lower(), value.strip()) for name, _, value in pairs]
    names = [name for name, _ in headers]
    is_plain = all(colon and name == name.strip() for name, colon, _ in pairs)
    if not is_plain or any(names.count(name) != 1 for name in _ONCE):
        return None
    if any(name in _UNUSUAL and (name, value.lower()) != (b"connection", b"keep-alive") for name, value in headers):
        return None
    is_whole = dict(headers)[b"content-length"] == b"%d" % len(body)
    return Head(path.decode(), headers) if is_whole else None


def packet(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """A whole answer as it goes over the wire."""
    lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
    return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (status, STATUS_PHRASES[status], lines, body)


class PatientConnection(H11Protocol):
    """uvicorn's connection, closed when a request's head takes longer than HEAD_S to arrive.

    Its application has a method `on_arrival` beside being callable: it is given a `Head` and what begins the request,
    and returns what is answered at once, or None where it has the request begun, now or a little later.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _behind: bytes | None = None  # what came behind a request that was shown and is not begun
    _is_done = False  # what still comes is read and forgotten: closed with unread bytes, a client loses the answer

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes, those of a request that is let in only when all that came with it and are refused were told."""
        if self._is_done:
            return
        if self._behind is not None:
            self._behind += data
            self.flow.pause_reading()  # no more of it is kept
            return
        is_between = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        head = plain_post(data) if is_between and not self.transport.is_closing() else None
        if head is None:
            self._take(data)
            return
        self._behind = b""
        refused = self.config.app.on_arrival(head, partial(self._begin, data))  # type: ignore[union-attr]
        if refused is not None:
            self._behind = None
            self._refuse(refused)

    def connection_lost(self, exc: Exception | None) -> None:
        """Take back the deadline of a head that will not come."""
        self._forget_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or a head that is larger than what is kept of one."""
        if len(self.conn.trailing_data[0]) <= HEAD_BYTES:
            super().send_400_response(msg)
            return
        body = b"the head is larger than %d bytes; send less in it" % HEAD_BYTES
        plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
        self.transport.write(packet(431, [*plain, (b"connection", b"close")], body))
        self.transport.write_eof()
        self._is_done = True

    def _begin(self, data: bytes) -> None:
        """Have the parser take a request that was shown, and what came behind it: answers go out in that order."""
        data, self._behind = data + (self._behind or b""), None
        self.flow.resume_reading()
        if not self.transport.is_closing():  # else nobody would be told that its client is gone
            self._take(data)

    def _take(self, data: bytes) -> None:
        """Have the parser take bytes; the deadline stands until they make a whole head."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_timer()
        elif self._head_timer is None:
            self._expect_head()

    def _refuse(self, refused: Response) -> None:
        """Answer a request that nothing more has to be known of; the parser never hears of it."""
        answer = [*self.server_state.default_headers, *refused.raw_headers]
        self.transport.write(packet(refused.status_code, answer, bytes(refused.body)))
        self.server_state.total_requests += 1
        self._forget_timer()
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
