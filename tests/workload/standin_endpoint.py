"""An endpoint on raw sockets that answers as it is told to, in pieces of any size; and what it has heard."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Answering = Callable[["Heard", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Heard:
    """A request: its line, headers and JSON body, and the number of the connection that it came by."""

    line: str
    headers: dict[str, str]
    body: Any
    connection: int


@dataclass
class Endpoint:
    """heard: all requests in their order. connections: opened so far. most: requests under way at once."""

    url: str = ""
    heard: list[Heard] = field(default_factory=list)
    connections: int = 0
    under_way: int = 0
    most: int = 0


@asynccontextmanager
async def endpoint(answering: Answering) -> AsyncIterator[Endpoint]:
    """Serves until the block ends; a connection closes when `answering` raises ConnectionError."""
    found = Endpoint()
    tasks: list[asyncio.Task[Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        found.connections += 1
        number = found.connections
        try:
            while line := await reader.readline():
                headers = {}
                while (text := (await reader.readline()).decode().strip()) != "":
                    name, _, value = text.partition(":")
                    headers[name.lower()] = value.strip()
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                heard = Heard(line.decode().strip(), headers, json.loads(raw) if raw else None, number)
                found.heard.append(heard)
                found.under_way += 1
                found.most = max(found.most, found.under_way)
                try:
                    await answering(heard, writer)
                    await writer.drain()
                finally:
                    found.under_way -= 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
        await server.wait_closed()


def head(status: int, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def plain(status: int, value: Any, *lines: str) -> bytes:
    """A whole answer in JSON."""
    body = json.dumps(value).encode()
    return head(status, "Content-Type: application/json", f"Content-Length: {len(body)}", *lines) + body


def text(words: str, **more: Any) -> dict[str, Any]:
    """A chunk of a completion."""
    return {"choices": [{"index": 0, "text": words, "finish_reason": None}], **more}


def usage(prompt: int, output: int, cached: int = 0) -> dict[str, Any]:
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
    }


def reciting(parts: int, gap_s: float = 0.0, first_s: float = 0.0) -> Answering:
    """Streams `parts` chunks of a word each, then the usage."""

    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked"))
        await asyncio.sleep(first_s)
        for number in range(parts):
            if number and gap_s:
                await asyncio.sleep(gap_s)
            writer.write(chunk(event(text(f"w{number} "))))
            await writer.drain()
        writer.write(chunk(event({"choices": [], **usage(7, parts, 3)})))
        writer.write(chunk(event("[DONE]")) + chunk(b""))

    return answer
