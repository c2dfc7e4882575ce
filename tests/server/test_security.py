"""Keys on every path, prefixes apart by key, nothing secret in logs or answers, one listener."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import CANARY, Served, children, served
from test_inputs import is_refusal

from ridgeline.server.edge import Edge
from ridgeline.server.errors import ApiError
from ridgeline.server.settings import ServerSettings

KEYS = ("first-secret-1", "second-secret-2")
SECRET_PROMPT = "def my_very_secret_function():"
PATHS = (
    "/", "/metrics", "/v1/models", "/version", "/server_info", "/openapi.json", "/nowhere", "//v1/models",
    "/v1%2fmodels", "/V1/models", "/invocations", "/health/", "/health/../v1/models", "/ready/x", "/debug/fault",
    "/%68ealth", "/health?x=/v1/models/../",
)  # fmt: skip


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--api-key", KEYS[0], faults=False, environment={"RIDGELINE_API_KEYS": KEYS[1]}) as running:
        yield running


def test_9_only_two_paths_are_open(server: Served) -> None:
    for path in PATHS[:-1]:
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            answer = server.raw(f"{method} {path} HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 401 "), (method, path, answer[:200])
    for target in ("http://127.0.0.1/v1/models", "http://health/health", "/health/x", "/HEALTH"):
        answer = server.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 401 "), (target, answer[:100])
    for path in ("/health", "/ready", PATHS[-1]):
        assert server.client.get(path).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        None, "", "Bearer", "Bearer x", "Bearer FIRST-SECRET-1", "Basic first-secret-1", "first-secret-1",
        "Bearer  first-secret-1", "Bearer first-secret-1x", "Bearer first-secret-",
        "Bearer first-secret-1,second-secret-2", "Bearer " + "k" * 30_000,
    ],
)  # fmt: skip
def test_8_wrong_keys_get_one_answer(server: Served, value: str | None) -> None:
    answer = server.client.get("/v1/models", headers={} if value is None else {"authorization": value})
    error = is_refusal(answer, 401, code="invalid_api_key")
    assert error == is_refusal(server.client.get("/v1/models"), 401)


def test_8_a_token_of_ten_megabytes(server: Served) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
    answer = server.raw(head + b"k" * 10_000_000 + b"\r\n\r\n")
    assert answer[9:12] in (b"401", b"431", b"")  # or closed before it was all sent


def test_8_the_time_tells_nothing_of_a_key() -> None:
    """A wrong key that begins as a right one takes as long as any other, taken turn about."""

    async def unreachable(*_: object) -> None:
        raise AssertionError

    edge = Edge(unreachable, ServerSettings(api_keys=KEYS), lambda *_: None)
    took: dict[str, list[int]] = {"first-secret-2": [], "zzzzzzzzzzzzzz": []}
    for _ in range(4000):
        for key, times in took.items():
            scope = {"headers": [(b"authorization", b"Bearer " + key.encode())]}
            began = time.perf_counter_ns()
            with contextlib.suppress(ApiError):
                edge._authorized(scope)
            times.append(time.perf_counter_ns() - began)
    near, far = map(statistics.median, took.values())
    assert abs(near - far) < 0.1 * far


def test_8_two_keys_at_once_are_none(server: Served) -> None:
    headers = [("authorization", f"Bearer {key}") for key in ("x", KEYS[0])]
    is_refusal(server.client.get("/v1/models", headers=headers), 401)


@pytest.mark.parametrize("key", KEYS)
def test_right_keys_open(server: Served, key: str) -> None:
    assert server.post("/v1/completions", CANARY, headers=bearer(key)).status_code == 200
    assert server.client.get("/metrics", headers=bearer(key)).status_code == 200


def cached(server: Served, prompt: str, key: str, **more: str) -> int:
    body = {**CANARY, "prompt": prompt, **more}
    usage = server.post("/v1/completions", body, headers=bearer(key)).json()["usage"]
    found: int = usage["prompt_tokens_details"]["cached_tokens"]
    return found


def test_prefixes_are_a_keys_own(server: Served) -> None:
    """Who has another key cannot tell from the cache what was asked."""
    prompt = "value = 1\n" * 60
    assert cached(server, prompt, KEYS[0]) == 0
    assert cached(server, prompt, KEYS[0]) > 0
    assert cached(server, prompt, KEYS[1]) == 0
    assert cached(server, prompt, KEYS[1], cache_salt="mine") == 0
    assert cached(server, prompt, KEYS[1], cache_salt="mine") > 0


def test_logs_and_errors_tell_nothing(server: Served) -> None:
    body = {**CANARY, "prompt": SECRET_PROMPT, "user": "someone-in-particular"}
    server.post("/v1/completions", body, headers=bearer(KEYS[0]))
    refused = server.post("/v1/completions", {**body, "n": 0}, headers=bearer(KEYS[0]))
    server.post("/v1/completions", body, headers=bearer("wrong-key"))
    log = "".join(server.log)
    assert "/v1/completions" in log
    for secret in (*KEYS, SECRET_PROMPT, "someone-in-particular", "wrong-key"):
        assert secret not in log
        assert secret not in refused.text
    info = server.client.get("/server_info", headers=bearer(KEYS[0]))
    assert not any(key in info.text for key in KEYS)


def test_the_engine_never_sees_the_keys(server: Served) -> None:
    for pid in children(server.process.pid):
        for part in ("environ", "cmdline"):
            text = Path(f"/proc/{pid}/{part}").read_bytes()
            assert not any(key.encode() in text for key in KEYS)


def listeners(pid: int) -> list[str]:
    """Local addresses that a process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1])
    return found


def test_one_listener_on_loopback(server: Served) -> None:
    assert listeners(server.process.pid) == [f"0100007F:{server.port:04X}"]
    for pid in children(server.process.pid):
        assert listeners(pid) == []


def test_the_http_process_has_no_torch(server: Served) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "llguidance" not in maps


def test_no_pickle_and_no_eval_in_the_tree() -> None:
    root = Path(__file__).parents[2] / "src" / "ridgeline"
    for path in [*(root / "server").rglob("*.py"), *(root / "engine").rglob("*.py"), *(root / "text").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for word in ("import pickle", "cloudpickle", "marshal", " eval(", " exec(", "multiprocessing", "yaml.load"):
            assert word not in text, f"{path}: {word}"


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "ridgeline.cli.main", "serve", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot listen")
    assert "Traceback" not in done.stderr
