"""A client of HTTP/1.1 for load: many requests at once, answers read piece by piece as they come.

Knows sockets and the protocol's framing. It must not know what is asked or answered. Built on asyncio alone: what a
client spends on a piece of an answer is taken from the server that it measures, where both share a machine.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

from ridgeline.core.errors import InvalidArgument, RidgelineError

MOST_LINE_BYTES = 64 << 10
MOST_HEADERS = 256
PIECE_BYTES = 64 << 10


class HttpError(RidgelineError):
    """No answer, or one that is not HTTP."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is. path: what stands before every path that is asked for, without a slash at its end."""

    host: str
    port: int
    secure: bool = False
    path: str = ""

    @classmethod
    def of(cls, url: str) -> Address:
        """InvalidArgument for what is no http:// or https:// URL."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InvalidArgument("base_url", f"{url!r} is no address such as http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if secure else 80), secure, parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.path}"


@dataclass(slots=True, eq=False)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False

    def close(self) -> None:
        self.writer.close()


@dataclass(eq=False)
class Answer:
    """Status and headers (lower case) of an answer whose body is still to be read; close it, or read it to its end."""

    status: int
    headers: Mapping[str, str]
    _client: Client
    _connection: _Connection
    _whole: bool = field(default=False)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. HttpError if it breaks off."""
        reader = self._connection.reader
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := _size(await reader.readuntil(b"\n")):
                    piece = await reader.readexactly(size + 2)
                    yield piece[:-2]
                while (await reader.readuntil(b"\n")).strip():
                    pass
                self._whole = True
            elif "content-length" in self.headers:
                left = int(self.headers["content-length"])
                while left:
                    piece = await reader.read(min(left, PIECE_BYTES))
                    if not piece:
                        raise HttpError("the answer broke off")
                    left -= len(piece)
                    yield piece
                self._whole = True
            else:
                while piece := await reader.read(PIECE_BYTES):
                    yield piece
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError) as error:
            raise HttpError(f"the answer broke off ({type(error).__name__})") from None

    async def read(self, most: int = 1 << 20) -> bytes:
        """The body, at most so many bytes of it."""
        found = bytearray()
        async for piece in self.pieces():
            found += piece
            if len(found) >= most:
                break
        return bytes(found[:most])

    def close(self) -> None:
        """Done with: the connection serves again if the body was read, and is closed if not."""
        keep = self._whole and self.headers.get("connection", "").lower() != "close"
        self._client.give_back(self._connection, keep)


class Client:
    """Connections to one server, kept while they are of use; as many at once as there are requests."""

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        self.address = address
        self.headers = {"Host": f"{address.host}:{address.port}", "Accept": "*/*", **(headers or {})}
        self._context = ssl.create_default_context() if address.secure else None
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request and wait for the answer's head. HttpError if there is none.

        A kept connection that the server has closed meanwhile is replaced once; a request is never sent twice on
        a connection that had begun to answer.
        """
        sent = dict(self.headers)
        if body is not None:
            sent |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        sent |= headers or {}
        lines = [f"{method} {self.address.path}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        while True:
            connection = self._idle.pop() if self._idle else await self._connect()
            fresh = not connection.used
            connection.used = True
            try:
                connection.writer.write(head + (body or b""))
                await connection.writer.drain()
                status, found = await _head(connection.reader)
            except (OSError, asyncio.IncompleteReadError) as error:
                connection.close()
                if fresh:
                    raise HttpError(f"no answer ({type(error).__name__})") from None
                continue
            except BaseException:
                connection.close()
                raise
            return Answer(status, found, self, connection)

    async def _connect(self) -> _Connection:
        address = self.address
        try:
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=self._context, limit=max(MOST_LINE_BYTES, 4 * PIECE_BYTES)
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error) or type(error).__name__
            raise HttpError(f"no connection ({reason})") from None
        return _Connection(reader, writer)

    def give_back(self, connection: _Connection, keep: bool) -> None:
        """A connection that is not needed any more."""
        if keep:
            self._idle.append(connection)
        else:
            connection.close()

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers. HttpError for what is no head of HTTP/1."""
    try:
        while True:
            line = await reader.readuntil(b"\n")
            words = line.split(None, 2)
            if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
                raise HttpError("the answer is not HTTP/1.1")
            headers: dict[str, str] = {}
            while field_line := (await reader.readuntil(b"\n")).strip():
                name, _, value = field_line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
                if len(headers) > MOST_HEADERS:
                    raise HttpError("the answer has too many headers")
            status = int(words[1])
            if status >= 200:  # 100 Continue and the like come before the answer
                return status, headers
    except asyncio.LimitOverrunError:
        raise HttpError("the answer has a header that is too long") from None


def _size(line: bytes) -> int:
    return int(line.split(b";")[0], 16)


async def events(answer: Answer) -> AsyncIterator[bytes]:
    """The data of each server-sent event of an answer, as soon as its line is there.

    (One line of data an event, which is what OpenAI's streams have. A last line without its newline counts.)
    """
    rest = b""
    async for piece in answer.pieces():
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()
