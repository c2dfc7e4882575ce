"""The load generator's own client: framing of answers however they are cut, kept connections, broken ones."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standin_endpoint import Heard, chunk, endpoint, event, head, plain

from ridgeline.core.errors import InvalidArgument
from ridgeline.workload.http import Address, Client, HttpError, events


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 10))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:8000", Address("127.0.0.1", 8000)),
        ("http://127.0.0.1:8000/", Address("127.0.0.1", 8000)),
        ("https://example.org/proxy/", Address("example.org", 443, True, "/proxy")),
        ("http://[::1]:81", Address("::1", 81)),
    ],
)
def test_addresses(url: str, found: Address) -> None:
    assert Address.of(url) == found
    assert Address.of(str(found)) == found


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:x", "http://a/?b", "http://a:99999"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidArgument, match="base_url"):
        Address.of(url)


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=40), framing=st.sampled_from(["chunked", "length", "close"])
)
def test_events_are_the_same_however_an_answer_is_cut(cuts: list[int], framing: str) -> None:
    """Pieces of any size, in chunks of any size: the same events."""
    told = [{"n": number, "text": "é\u2028" * number} for number in range(6)]
    body = b": a comment\r\n\r\n" + b"".join(event(one).replace(b"\n\n", b"\r\n\r\n") for one in told) + event("[DONE]")
    pieces, at = [], 0
    while at < len(body):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(body[at : at + size])
        at += size
    if framing == "chunked":
        whole = head(200, "transfer-encoding: Chunked") + b"".join(map(chunk, pieces)) + b"0\r\nX-Trailer: 1\r\n\r\n"
    elif framing == "length":
        whole = head(200, f"Content-Length: {len(body)}") + body
    else:
        whole = head(200) + body

    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        size = cuts[0]
        for at in range(0, len(whole), size):
            writer.write(whole[at : at + size])
            await asyncio.sleep(0)
        if framing == "close":
            raise ConnectionError

    async def ask() -> tuple[list[bytes], int]:
        async with endpoint(answer) as found, Client(Address.of(found.url)) as client:
            for _ in range(2):
                answered = await client.ask("GET", "/")
                got = [one async for one in events(answered)]
                answered.close()
            return got, found.connections

    got, connections = run(ask())
    assert [one.decode() for one in got] == [event(one)[6:-2].decode() for one in [*told, "[DONE]"]]
    assert connections == (2 if framing == "close" else 1)


def test_requests_and_plain_answers() -> None:
    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(head(100) + plain(418, {"got": heard.body}, "X-Thing: a: b"))

    async def ask() -> None:
        async with (
            endpoint(answer) as found,
            Client(Address.of(found.url + "/under"), {"Authorization": "Bearer k"}) as client,
        ):
            answered = await client.ask("POST", "/v1/x", b'{"a": 1}', {"X-More": "2"})
            assert (answered.status, answered.headers["x-thing"]) == (418, "a: b")
            assert await answered.read() == b'{"got": {"a": 1}}'
            answered.close()
            heard = found.heard[0]
            assert heard.line == "POST /under/v1/x HTTP/1.1"
            assert heard.headers["authorization"] == "Bearer k"
            assert heard.headers["content-type"] == "application/json"
            assert heard.headers["x-more"] == "2"
            assert heard.headers["host"] == found.url.removeprefix("http://")

    run(ask())


def test_a_kept_connection_that_was_closed_meanwhile_is_replaced() -> None:
    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(plain(200, {}))
        await writer.drain()
        raise ConnectionError  # without having said so

    async def ask() -> None:
        async with endpoint(answer) as found, Client(Address.of(found.url)) as client:
            for _ in range(3):
                answered = await client.ask("GET", "/")
                await answered.read()
                answered.close()
                await asyncio.sleep(0.02)
            assert (found.connections, len(found.heard)) == (3, 3)

    run(ask())


def test_an_answer_that_is_left_is_a_connection_that_closes() -> None:
    gone = asyncio.Event()

    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, "Transfer-Encoding: chunked"))
        try:
            for _ in range(500):
                writer.write(chunk(b"x" * 1000))
                await writer.drain()
                await asyncio.sleep(0.005)
        except ConnectionError:
            gone.set()
            raise

    async def ask() -> None:
        async with endpoint(answer) as found, Client(Address.of(found.url)) as client:
            answered = await client.ask("GET", "/")
            async for _ in answered.pieces():
                break
            answered.close()
            await asyncio.wait_for(gone.wait(), 5)

    run(ask())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 2",
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\n" + b"A: " + b"b" * 400_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"A%d: b\r\n" % number for number in range(300)) + b"\r\n",
    ],
)
def test_answers_that_break_are_one_kind_of_error(raw: bytes) -> None:
    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        raise ConnectionError

    async def ask() -> None:
        async with endpoint(answer) as found, Client(Address.of(found.url)) as client:
            with pytest.raises(HttpError):
                await whole(client)

    run(ask())


async def whole(client: Client) -> bytes:
    answered = await client.ask("GET", "/")
    try:
        return await answered.read()
    finally:
        answered.close()


def test_nobody_there() -> None:
    async def ask() -> None:
        async with endpoint(lambda heard, writer: asyncio.sleep(0)) as found:
            url = found.url
        async with Client(Address.of(url)) as client:
            with pytest.raises(HttpError, match=r"no connection .Connection refused"):
                await client.ask("GET", "/")

    run(ask())
