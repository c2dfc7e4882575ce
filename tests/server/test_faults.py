"""What happens when the engine goes wrong: one bad request, a dead process, a hung one, the end."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import CANARY, Served, children, events, served
from test_inputs import cpu_s, is_refusal

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = {"type": "array", "items": {"enum": ["one", "two"]}, "minItems": 3, "maxItems": 3}
SMALL = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", "200000000")
POISON = 3000
"""A token that steps will not survive."""
SLOW = {**CANARY, "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = ("watchdog_s=2", "backoff_s=0.05", "max_restarts=100", "ready_silence_s=0.8")
    with served(*SMALL, *(part for limit in limits for part in ("--set", limit))) as running:
        yield running


def at_once(server: Served, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: server.post(COMPLETIONS, body), bodies))


@pytest.mark.parametrize("place", [0, 3, 6])
def test_36_a_request_that_fails_fails_alone(sound: Served, place: int) -> None:
    """Six good ones beside it finish with the tokens that they always have."""
    good = [{**CANARY, "prompt": f"def f{number}(x):", "max_tokens": 20} for number in range(6)]
    want = [one.json()["choices"][0]["text"] for one in at_once(sound, good)]
    sound.fault("token", POISON)
    bad = {**CANARY, "prompt": [0, 5, POISON, 7]}
    answers = at_once(sound, [*good[:place], bad, *good[place:]])
    is_refusal(answers.pop(place), 500, code="internal_error")
    assert [one.status_code for one in answers] == [200] * 6
    assert [one.json()["choices"][0]["text"] for one in answers] == want
    assert sound.info()["restarts"] == 0 or place  # the process lives on
    if place == 6:
        samples = at_once(sound, [{**bad, "n": 3, "temperature": 1.0}, good[0]])
        is_refusal(samples[0], 500, code="internal_error")
        assert samples[1].json()["choices"][0]["text"] == want[0]


@pytest.mark.parametrize("kind", ["raise", "memory"])
def test_38_a_step_that_fails_once_changes_nothing(sound: Served, kind: str) -> None:
    bodies = [
        {**CANARY, "prompt": f"def g{number}(x):", "max_tokens": 24, "echo": True, "logprobs": 1} for number in range(5)
    ]
    want = [one.json()["choices"] for one in at_once(sound, bodies)]
    sound.fault(kind, 2)
    answers = at_once(sound, bodies)
    assert [one.status_code for one in answers] == [200] * 5
    for have, wanted in zip(answers, want):
        assert have.json()["choices"][0]["text"] == wanted[0]["text"]
        assert have.json()["choices"][0]["logprobs"]["tokens"] == wanted[0]["logprobs"]["tokens"]


def test_36_a_grammar_that_fails_fails_alone(sound: Served) -> None:
    """One of three with a schema, beside one without."""
    chat = {"model": "ridgeline", "messages": [{"role": "user", "content": "a"}], "max_tokens": 30, "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": WORDS}}}  # fmt: skip
    want = sound.post(CHAT, chat).json()["choices"][0]["message"]["content"]
    sound.fault("grammar", 1)
    with ThreadPoolExecutor(4) as pool:
        plain = pool.submit(sound.canary)
        answers = list(pool.map(lambda _: sound.post(CHAT, chat), range(3)))
        assert plain.result() == sound.usual_canary
    (bad,) = [one for one in answers if one.status_code != 200]
    is_refusal(bad, 500, code="internal_error")
    assert [one.json()["choices"][0]["message"]["content"] for one in answers if one is not bad] == [want] * 2


def restarted(server: Served, before: int) -> None:
    server.until(lambda info: info["restarts"] > before)
    server.wait_ready()


def test_37_a_killed_engine_is_replaced(sound: Served) -> None:
    """Who has been told something hears of it; who has not notices nothing."""
    want = sound.post(COMPLETIONS, SLOW).json()["choices"][0]["text"]
    sound.fault("slow", 20)
    before = sound.info()["restarts"]
    streamed: list[str] = []

    begun = threading.Event()

    def stream() -> None:
        with sound.client.stream("POST", COMPLETIONS, json={**SLOW, "stream": True}) as answer:
            for part in answer.iter_text():
                streamed.append(part)
                begun.set()

    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(sound.post, COMPLETIONS, SLOW) for _ in range(4)]
        one = pool.submit(stream)
        assert begun.wait(60)
        began = time.monotonic()
        os.kill(sound.info()["engine_pid"], signal.SIGKILL)
        while sound.client.get("/ready").status_code == 200:
            assert time.monotonic() - began < 2
        refused = sound.post(COMPLETIONS, CANARY)
        is_refusal(refused, 503, code="starting")
        assert refused.headers["retry-after"]
        assert sound.client.get("/health").status_code == 200
        restarted(sound, before)
        answers = [done.result(60) for done in waiting]
        one.result(60)
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [want] * 4
    assert events("".join(streamed))[-1]["error"]["code"] == "engine_restarted"


def test_37_a_request_that_kills_twice_is_not_sent_a_third_time(sound: Served) -> None:
    before = sound.info()["restarts"]
    with ThreadPoolExecutor(1) as pool:
        sound.fault("slow", 50)
        bad = pool.submit(sound.post, COMPLETIONS, SLOW)
        os.kill(sound.busy()["engine_pid"], signal.SIGKILL)
        restarted(sound, before)
        sound.fault("slow", 50)
        os.kill(sound.busy()["engine_pid"], signal.SIGKILL)
        is_refusal(bad.result(60), 500, code="engine_restarted")
    restarted(sound, before + 1)


def test_37_a_hung_engine_is_noticed_and_replaced(sound: Served) -> None:
    before = sound.info()["restarts"]
    want = sound.canary()
    sound.fault("hang")
    with ThreadPoolExecutor(1) as pool:
        caught = pool.submit(sound.post, COMPLETIONS, CANARY)
        began = time.monotonic()
        while sound.client.get("/ready").status_code == 200:
            assert time.monotonic() - began < 2.5
            time.sleep(0.02)
        restarted(sound, before)
        assert caught.result(60).json()["choices"][0]["text"] == want


def test_37_a_lost_device_is_another_engine(sound: Served) -> None:
    before = sound.info()["restarts"]
    want = sound.usual_canary
    sound.fault("device", 1)
    assert sound.canary() == want  # sent again
    restarted(sound, before)
    assert sound.info()["restarts"] == before + 1


def test_39_no_more_descriptors(sound: Served) -> None:
    """Connections that find none are let in when there are some again; meanwhile nothing spins."""
    pid, lines = sound.process.pid, len(sound.log)
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    held = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    links = []
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (held + 5, usual[1]))
        links = [socket.create_connection(("127.0.0.1", sound.port)) for _ in range(30)]
        before = cpu_s(sound)
        time.sleep(1)
        assert cpu_s(sound) - before < 0.5
    finally:
        for link in links:
            link.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    with httpx.Client(base_url=sound.url, timeout=60) as other:
        assert other.post(COMPLETIONS, json=CANARY).json()["choices"][0]["text"] == sound.usual_canary
    assert "Traceback" not in "".join(sound.log[lines:])


def test_39_a_full_disk_under_the_log_stops_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ridgeline.cli.main", "serve", "--port", str(port), *SMALL]
    with open("/dev/full", "wb") as full, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        process = subprocess.Popen(command, stderr=full, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            limit = time.monotonic() + 240
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/ready").status_code == 200:
                        break
                assert process.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.05)
            texts = {client.post(COMPLETIONS, json=CANARY).json()["choices"][0]["text"] for _ in range(5)}
            assert len(texts) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()


def test_39_durations_are_of_clocks_that_do_not_jump() -> None:
    """The time of day only says when something was; nothing waits or ends by it."""
    root = Path(__file__).parents[2] / "src" / "ridgeline"
    sayings = {
        "server/completions.py": "int(time.time())", "server/chat.py": "int(time.time())",
        "server/state.py": "self.created = int(time.time())", "server/edge.py": "time.time_ns()",
    }  # fmt: skip
    for folder in ("server", "engine", "schedule", "text"):
        for path in (root / folder).rglob("*.py"):
            name = path.relative_to(root).as_posix()
            lines = [
                line for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"time\.time\w*\(", line)
            ]
            assert all(sayings.get(name, "nowhere") in line for line in lines), (name, lines)
            assert len(lines) <= 1, (name, lines)


def test_39_a_dead_grammar_child_is_replaced(sound: Served) -> None:
    body = {"model": "ridgeline", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8,
            "response_format": {"type": "json_object"}}  # fmt: skip
    assert sound.post("/v1/chat/completions", body).status_code == 200
    killed = 0
    for pid in children(sound.process.pid):
        if b"grammar_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            killed += 1
    assert killed == 1
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}}}
    answer = sound.post("/v1/chat/completions", body)
    assert answer.json()["choices"][0]["message"]["content"].strip() in ("true", "false")


def test_39_a_closed_log_stops_nobody() -> None:
    with served(*SMALL) as server:
        want = server.canary()
        server.log_closes = True  # with the next line: whoever writes then gets a broken pipe
        for _ in range(5):
            assert server.canary() == want
        assert server.process.stderr is not None
        assert server.process.stderr.closed
        assert server.stop() == 0


def test_35_sigterm_lets_requests_finish() -> None:
    with served(*SMALL, "--drain-timeout", "60") as server:
        want = server.post(COMPLETIONS, SLOW).json()["choices"][0]["text"]
        server.fault("slow", 25)
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.post, COMPLETIONS, SLOW)
            parts = pool.submit(server.post, COMPLETIONS, {**SLOW, "stream": True})
            server.busy(2)
            below = children(server.process.pid)
            assert below
            server.process.send_signal(signal.SIGTERM)
            while (ready := server.client.get("/ready")).status_code == 200:
                time.sleep(0.005)
            is_refusal(ready, 503, code="shutting_down")
            late = server.post(COMPLETIONS, CANARY)
            is_refusal(late, 503, code="shutting_down")
            assert late.headers["retry-after"]
            assert whole.result(60).json()["choices"][0]["text"] == want
            told = events(parts.result(60).text)
        assert "".join(one["choices"][0]["text"] for one in told) == want
        assert server.process.wait(60) == 0
        assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_35_who_takes_longer_than_the_drain_is_told() -> None:
    with served(*SMALL, "--drain-timeout", "0.5") as server:
        server.fault("slow", 50)
        with ThreadPoolExecutor(1) as pool:
            parts = pool.submit(server.post, COMPLETIONS, {**SLOW, "stream": True})
            server.busy()
            server.process.send_signal(signal.SIGTERM)
            told = events(parts.result(60).text)
        assert told[-1]["error"]["code"] == "shutting_down"
        assert server.process.wait(60) == 0


def test_35_a_second_signal_ends_at_once() -> None:
    with served(*SMALL) as server:
        server.fault("slow", 100)
        with ThreadPoolExecutor(1) as pool:
            going = pool.submit(_quietly, httpx.Client(base_url=server.url, timeout=120))
            server.busy()
            server.process.send_signal(signal.SIGTERM)
            while server.client.get("/ready").status_code == 200:
                time.sleep(0.005)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
            assert time.monotonic() - began < 10  # its request would take 100 s, the drain 30
            going.result(60)


def _quietly(client: httpx.Client) -> None:
    with contextlib.suppress(httpx.TransportError):
        client.post(COMPLETIONS, json={**SLOW, "max_tokens": 1000})


def test_37_an_engine_that_keeps_dying_is_given_up() -> None:
    with served(*SMALL, "--set", "max_restarts=1", "--set", "backoff_s=0.05") as server:
        for _ in range(2):
            server.wait_ready()
            pid = server.info()["engine_pid"]
            os.kill(pid, signal.SIGKILL)
            limit = time.monotonic() + 60
            while time.monotonic() < limit and server.process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if server.info()["engine_pid"] != pid:
                        break
                time.sleep(0.02)
        assert server.process.wait(60) == 1
        assert "died" in server.log[-1]
        assert "Traceback" not in "".join(server.log)
