"""Short limits, so that each is reached at once: queue, deadlines, body, headers."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from served import CANARY, COMPLETIONS, Served, events, head, served
from test_inputs import is_refusal

LONG = {**CANARY, "max_tokens": 1800, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = ("max_queued=4", "max_body_bytes=100000", "max_body_chunks=200", "body_timeout_s=1",
              "header_timeout_s=1", "queue_timeout_s=2")  # fmt: skip
    options = [part for limit in limits for part in ("--set", limit)]
    with served("--max-num-seqs", "4", "--request-timeout", "4", *options) as running:
        yield running


@pytest.fixture(autouse=True)
def _sound(sound: Served) -> None:
    """Every test here leaves the server as it was."""


def many(server: Served, count: int, body: dict[str, Any]) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: server.post(COMPLETIONS, body), range(count)))


def test_3_a_body_over_the_limit(server: Served) -> None:
    body = json.dumps({**CANARY, "prompt": "x" * 200_000}).encode()
    is_refusal(server.client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 413,
               code="content_too_large")  # fmt: skip

    def chunks() -> Iterator[bytes]:
        for at in range(0, len(body), 10_000):
            yield body[at : at + 10_000]

    with contextlib.suppress(httpx.TransportError):  # it may still be sending when the door closes
        answer = server.client.post(COMPLETIONS, content=chunks(), headers={"content-type": "application/json"})
        is_refusal(answer, 413, code="content_too_large")


def status_of(raw: bytes) -> int:
    assert raw.startswith(b"HTTP/1.1 "), raw[:100]
    first, _, rest = raw.partition(b"\r\n\r\n")
    assert b"Traceback" not in raw
    if b"application/json" in first:
        assert set(json.loads(rest.split(b"HTTP/1.1")[0])["error"]) == {"message", "type", "param", "code"}
    return int(raw[9:12])


def test_3_very_many_chunks(server: Served) -> None:
    raw = server.raw(head("Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 5000)
    assert status_of(raw) == 413


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "5, 6"])
def test_3_lengths_that_are_none(server: Served, length: str) -> None:
    assert status_of(server.raw(head(f"Content-Length: {length}") + b"{}")) == 400


@pytest.mark.parametrize("junk", [b"\x00\x01\x02\r\n\r\n", b"hello\r\n\r\n", b"GET /\r\n\r\n"])
def test_what_is_no_http_is_refused(server: Served, junk: bytes) -> None:
    assert status_of(server.raw(junk)) == 400


def test_7_large_and_many_headers(server: Served) -> None:
    assert status_of(server.raw(head("X-Big: " + "a" * 8_000_000))) == 431
    assert status_of(server.raw(head("X-Big: " + "a" * 80_000))) == 431
    assert status_of(server.raw(head(*(f"X-{number}: a" for number in range(10_000))))) == 431
    assert status_of(server.raw(head(*(f"X-{number}: a" for number in range(200)), "Content-Length: 0"))) == 431


def test_7_slow_headers_and_bodies(server: Served) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost")
        assert link.recv(100) == b""
    assert time.monotonic() - began < 8  # it would be 10 by default
    raw = server.raw(head("Content-Length: 100") + b"{")
    assert status_of(raw) == 408


def test_31_a_burst_is_refused_at_once(server: Served) -> None:
    """Ten times the seats at once: whoever is let in gets the answer that it gets alone."""
    lines = len(server.log)
    with server.slowed(20):
        answers = many(server, 40, {**CANARY, "ignore_eos": True})
    counts = {status: sum(one.status_code == status for one in answers) for status in (200, 429)}
    assert sum(counts.values()) == 40
    assert counts[200] >= 8
    for answer in answers:
        if answer.status_code == 429:
            is_refusal(answer, 429, code="server_overloaded")
            assert int(answer.headers["retry-after"]) >= 1
    assert {one.json()["choices"][0]["text"] for one in answers if one.status_code == 200} == {server.canary()}
    took = [found["seconds"] for line in server.log[lines:] if (found := json.loads(line)).get("status") == 429]
    assert statistics.median(took) < 0.05


def test_more_outputs_than_ever_fit(server: Served) -> None:
    is_refusal(server.post(COMPLETIONS, {**CANARY, "n": 9}), 400, "n")


def test_32_a_deadline_in_the_queue_and_one_while_running(server: Served) -> None:
    with server.slowed(20):
        answers = many(server, 8, LONG)
    queued = [one for one in answers if one.status_code == 503]
    late = [one for one in answers if one.status_code == 504]
    assert (len(queued), len(late)) == (4, 4)
    for one in queued:
        is_refusal(one, 503, code="queue_timeout")
        assert one.headers["retry-after"]
    for one in late:
        is_refusal(one, 504, code="request_timeout")


def test_32_a_deadline_in_the_middle_of_a_stream(server: Served) -> None:
    with server.slowed(20):
        parts = events(server.post(COMPLETIONS, {**LONG, "stream": True}).text)
    assert parts[-1]["error"]["code"] == "request_timeout"
    assert parts[0]["choices"][0]["text"]


def test_connections_that_say_nothing_are_let_go(server: Served) -> None:
    links = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(50)]
    assert all(link.recv(1) == b"" for link in links)
    for link in links:
        link.close()
