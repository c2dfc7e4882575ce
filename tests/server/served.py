"""A server in processes of its own, as users run it, for tests to talk to."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

COMPLETIONS = "/v1/completions"
CANARY = {"model": "ridgeline", "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0}
START_S = 240.0
"""Far more than a start takes: other work on the machine may slow it down."""


class Served:
    """`ridgeline serve` with these options; ready when made."""

    def __init__(self, *options: str, faults: bool = True, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "ridgeline.cli.main", "serve", "--port", "0", *options]
        if faults:
            command.append("--allow-faults")
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        self.log: list[str] = []
        self.log_closes = False
        self._listening = threading.Event()
        self.port = 0
        threading.Thread(target=self._read, daemon=True).start()
        if not self._listening.wait(START_S):
            self.kill()
            raise AssertionError("no port: " + "".join(self.log))
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for raw in self.process.stderr:
            if self.log_closes:
                self.process.stderr.close()
                return
            line = raw.decode("utf-8", "replace")
            self.log.append(line)
            if '"message": "listening"' in line:
                self.port = json.loads(line)["port"]
                self._listening.set()
        self._listening.set()

    def wait_ready(self, seconds: float = START_S, **headers: str) -> float:
        """Seconds until /ready was 200."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/ready").status_code == 200:
                    return time.monotonic() - began
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError("not ready: " + "".join(self.log[-20:]))

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        if body is not None:
            more["json"] = body
        return self.client.post(path, **more)

    def raw(self, data: bytes, seconds: float = 60.0) -> bytes:
        """What the server answers to these bytes, until it closes or says nothing for long."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as link:
            with contextlib.suppress(OSError):
                link.sendall(data)
            received = b""
            with contextlib.suppress(OSError):
                while part := link.recv(65536):
                    received += part
        return received

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get("/server_info").json()
        return found

    def canary(self) -> str:
        """Greedy text of a fixed prompt."""
        answer = self.post(COMPLETIONS, CANARY)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def until(self, holds: Callable[[dict[str, Any]], bool], seconds: float = 60.0) -> dict[str, Any]:
        """Wait for /server_info of which this holds."""
        limit = time.monotonic() + seconds
        while not holds(info := self.info()):
            assert time.monotonic() < limit, info
            time.sleep(0.02)
        return info

    def busy(self, requests: int = 1) -> dict[str, Any]:
        """Wait until the engine has so many requests and has computed some of their tokens."""
        begun = self.info().get("engine", {}).get("steps", 0)

        def holds(info: dict[str, Any]) -> bool:
            engine = info.get("engine", {"requests": 0, "steps": 0})
            fresh = engine["steps"] < begun  # the engine was replaced meanwhile
            return engine["requests"] >= requests and (engine["steps"] >= begun + 3 or (fresh and engine["steps"] >= 3))

        return self.until(holds)

    def settled(self, seconds: float = 30.0) -> None:
        """Nothing is left behind: no request, no block held, no place taken. The limit is for machines that do more."""

        def holds(info: dict[str, Any]) -> bool:
            engine = info["engine"]
            return not engine["requests"] and not engine["referenced_blocks"] and not info["admitted"]

        self.until(holds, seconds)

    def fault(self, kind: str, value: int = 0) -> None:
        assert self.post(f"/debug/fault?kind={kind}&value={value}").status_code == 200

    @functools.cached_property
    def usual_canary(self) -> str:
        """The canary's text when it was first asked for."""
        return self.canary()

    @contextlib.contextmanager
    def slowed(self, milliseconds: int) -> Iterator[None]:
        """Steps take longer by this."""
        self.fault("slow", milliseconds)
        try:
            yield
        finally:
            self.fault("slow", 0)

    def stop(self, seconds: float = 120.0) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.client.close() if hasattr(self, "client") else None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def served(*options: str, ready: bool = True, **more: Any) -> Iterator[Served]:
    server = Served(*options, **more)
    try:
        if ready:
            server.wait_ready()
        yield server
    finally:
        server.kill()


def head(*lines: str) -> bytes:
    """A POST of a completion up to its body."""
    return "\r\n".join(
        (f"POST {COMPLETIONS} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines, "", "")
    ).encode()


def events(text: str) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must end as streams end."""
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def children(pid: int) -> list[int]:
    """Processes below one (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(path.parent.name))
    return found
