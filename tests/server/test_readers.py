"""Clients that ask and do not read, or go away: each costs itself, and nobody else."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from served import CANARY, COMPLETIONS, Served, head, served

ECHO = {**CANARY, "n": 8, "prompt": [7] * 800, "max_tokens": 400, "ignore_eos": True, "temperature": 1.0,
        "echo": True, "logprobs": 5}  # fmt: skip
"""Its first event, an echo, is more than a connection's buffers hold."""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = ("--set", "stall_timeout_s=1", "--set", "max_stream_bytes=15000")
    with served("--max-num-seqs", "16", "--kv-cache-memory-bytes", "400000000", *limits) as running:
        yield running


@contextlib.contextmanager
def unread(server: Served, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A stream of this request, of which nothing is read; this side keeps as little of it as it can."""
    raw = json.dumps({**body, "stream": True}).encode()
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.settimeout(10)
        link.connect(("127.0.0.1", server.port))
        link.sendall(head(f"Content-Length: {len(raw)}") + raw)
        yield link


def cut_offs(server: Served) -> list[str]:
    """Why readers have been let go, so far."""
    return [json.loads(line)["cut_off"] for line in [*server.log] if '"cut_off"' in line]


def is_cut(link: socket.socket) -> bool:
    """Whether the connection ends in the middle of the stream."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := link.recv(65536):
            received += part
    return received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received


@pytest.mark.parametrize("limit", ["time", "size"])
def test_34_a_reader_that_does_not_read_is_cut_off(sound: Served, limit: str) -> None:
    """Others go on meanwhile. With slow steps too little comes to be too much: then it is time that ends it."""
    before = len(cut_offs(sound))
    with sound.slowed(1000 if limit == "time" else 0), unread(sound, ECHO) as link:
        give_up = time.monotonic() + 30
        while len(cut_offs(sound)) == before:
            assert sound.post(COMPLETIONS, {**CANARY, "max_tokens": 1}).status_code == 200
            assert time.monotonic() < give_up
        sound.settled()
        assert cut_offs(sound)[before:] == [limit]
        assert is_cut(link)


def seconds_of(server: Served, tokens: int) -> float:
    """A short request beside whatever else runs."""
    began = time.monotonic()
    assert server.post(COMPLETIONS, {**CANARY, "max_tokens": tokens, "ignore_eos": True}).status_code == 200
    return time.monotonic() - began


@pytest.mark.slow
def test_34_a_hundred_readers_that_do_not_read() -> None:
    """Each costs the server a bounded piece of memory until it is cut off; a step for others takes what it takes with
    a hundred who read."""
    asked = {**CANARY, "max_tokens": 1900, "ignore_eos": True, "logprobs": 1}  # more than all buffers on the way hold
    limits = ("--set", "stall_timeout_s=3", "--set", "max_stream_bytes=15000")
    options = ("--max-num-seqs", "102", "--kv-cache-memory-bytes", "1000000000", *limits)
    with served(*options) as server, contextlib.ExitStack() as held:
        server.canary()
        alone_bytes = resident_bytes(server.process.pid)
        readers = [held.enter_context(unread(server, asked)) for _ in range(100)]
        server.busy(100)
        beside_s, most_bytes = [], 0
        give_up = time.monotonic() + 400
        while len(cut_offs(server)) < 100:
            beside_s.append(seconds_of(server, 4))
            most_bytes = max(most_bytes, resident_bytes(server.process.pid))
            assert time.monotonic() < give_up, (len(cut_offs(server)), server.info())
        server.settled(20)
        assert all(is_cut(link) for link in readers)
        assert most_bytes - alone_bytes < 100 * (1 << 20)
        with_readers_s = crowd_s(server, {**asked, "max_tokens": 400, "stream": True})
        assert median(beside_s) < 3 * with_readers_s, (beside_s, with_readers_s)
        server.canary()


def crowd_s(server: Served, asked: dict[str, Any]) -> float:
    """The median time of a short request beside a hundred streams that are read."""
    with ThreadPoolExecutor(100) as pool:
        url = server.url + COMPLETIONS
        streams = [pool.submit(httpx.post, url, json=asked, timeout=300) for _ in range(100)]
        server.busy(60)  # some may end before the last has begun
        found = [seconds_of(server, 4) for _ in range(8)]
        assert all(one.result().status_code == 200 for one in streams)
    return median(found)


def resident_bytes(process: int) -> int:
    """Memory of a process, without its children."""
    return 4096 * int(Path(f"/proc/{process}/statm").read_text().split()[1])


def ask(server: Served, body: dict[str, Any]) -> socket.socket:
    """A connection on which this has been asked."""
    raw = json.dumps(body).encode()
    link = socket.create_connection(("127.0.0.1", server.port))
    link.sendall(head(f"Content-Length: {len(raw)}") + raw)
    return link


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_33_whoever_leaves_is_forgotten(sound: Served, stream: bool, when: str) -> None:
    """Half of them run and half wait. In steps of 20 ms all are gone within a second's worth of steps."""
    with sound.slowed(20):
        links = [ask(sound, {**CANARY, "max_tokens": 1800, "ignore_eos": True, "stream": stream}) for _ in range(32)]
        if when == "in the middle":
            sound.busy(16)
        for link in links:
            link.close()
        steps = sound.info()["engine"]["steps"]
        sound.settled()
        assert sound.info()["engine"]["steps"] - steps < 63  # 50, and those between two beats


def test_33_a_thousand_leave_at_once(sound: Served) -> None:
    """Most were refused, some wait, some run."""
    with sound.slowed(20):
        links = [ask(sound, {**CANARY, "max_tokens": 1800, "ignore_eos": True, "stream": True}) for _ in range(1000)]
        sound.busy(16)
        for link in links:
            link.close()
        sound.settled()


def test_33_whoever_leaves_while_a_schema_is_compiled_is_forgotten(sound: Served) -> None:
    words = [f"{number:05}" for number in range(1500)]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": words}}}
    body = {"model": "ridgeline", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8}
    raw = json.dumps({**body, "response_format": form}).encode()
    links = []
    for _ in range(4):
        link = socket.create_connection(("127.0.0.1", sound.port))
        link.sendall(head(f"Content-Length: {len(raw)}").replace(b"/v1/completions", b"/v1/chat/completions") + raw)
        links.append(link)
    sound.until(lambda info: info["admitted"] >= 1)
    for link in links:
        link.close()
    sound.settled()
    form["json_schema"]["schema"] = {"enum": ["x"]}
    answer = sound.post("/v1/chat/completions", {**body, "response_format": form})
    assert json.loads(answer.json()["choices"][0]["message"]["content"]) == "x"


def test_33_whoever_leaves_in_the_drain_is_not_waited_for() -> None:
    with served("--max-num-seqs", "4", "--drain-timeout", "600") as server:
        server.fault("slow", 100)
        link = ask(server, {**CANARY, "max_tokens": 1800, "ignore_eos": True})
        server.busy()
        server.process.send_signal(signal.SIGTERM)
        while server.client.get("/ready").status_code == 200:
            time.sleep(0.005)
        link.close()
        assert server.process.wait(120) == 0  # its request would take 180 s
