"""uvicorn's HTTP/1.1 connection with our limits and our errors.

Knows bytes of a connection. It must not know what is asked for. Whatever is malformed gets a JSON error and a closed
connection; who sends headers too slowly gets a closed connection.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ridgeline.server.errors import ApiError, invalid
from ridgeline.server.settings import ServerSettings


class _Connection(h11.Connection):
    """Counts the chunks of a body: each costs more than its bytes."""

    def __init__(self, max_header_bytes: int, max_chunks: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self._max_chunks = max_chunks
        self._chunks = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if type(event) is h11.Data:
            self._chunks += 1
            if self._chunks > self._max_chunks:
                raise h11.RemoteProtocolError("too many chunks", error_status_hint=413)
        elif type(event) is h11.Request:
            self._chunks = 0
        return event


class LimitedProtocol(H11Protocol):
    """A connection of a server. `limits` is set by whoever configures uvicorn, on a subclass of its own."""

    limits: ClassVar[ServerSettings] = ServerSettings()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hint = 400
        self.conn = _Connection(self.limits.max_header_bytes, self.limits.max_body_chunks)
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._unset_header_timer()
            self._lend_abort()
        elif self.conn.their_state is h11.IDLE and self._header_timer is None:
            self._await_headers()  # the next request of a kept connection has begun

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete and self.scope is self.cycle.scope:
            self._lend_abort()

    def _lend_abort(self) -> None:
        """Answers may cut the connection off (server/answers.py)."""
        scope: Any = self.scope
        scope.setdefault("extensions", {"abort": self.transport.abort})

    def _await_headers(self) -> None:
        self._unset_header_timer()
        self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._too_slow)

    def _unset_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What h11 could not read: too much of it, or malformed."""
        size = self.conn.trailing_data[0]
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # its application hears of it, and answers nothing
            self.cycle.message_event.set()
            error = ApiError(413, "the body is too large, or has too many chunks", None, "content_too_large")
        elif len(size) >= self.limits.max_header_bytes:
            error = ApiError(431, "the headers are too large", None, "headers_too_large")
        else:
            error = invalid(None, "the request is not valid HTTP", "invalid_http")
        body = error.encoded()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        try:
            output = self.conn.send(h11.Response(status_code=error.status, headers=headers, reason=b""))
            output += self.conn.send(h11.Data(data=body))
            output += self.conn.send(h11.EndOfMessage())
        except h11.LocalProtocolError:
            self.transport.abort()
            return
        self.transport.write(output)
        self.transport.close()
