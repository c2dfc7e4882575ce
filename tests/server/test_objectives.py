"""Objectives and priorities over HTTP: who waits at the door, in which order, and who is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import CANARY, COMPLETIONS, Served, served
from test_inputs import is_refusal
from test_readers import ask

LONG = {**CANARY, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """No step is as fast as a microsecond, so outputs run one by one."""
    options = ("--scheduling-policy", "priority", "--slo", "tpot=1us", "--set", "queue_timeout_s=60")
    with served("--max-num-seqs", "8", *options) as running:
        yield running


def test_whoever_would_slow_others_waits_in_order_of_priority(sound: Served) -> None:
    order: list[str] = []

    def post(name: str, priority: int, body: dict[str, Any]) -> Any:
        answer = sound.post(COMPLETIONS, {**body, "priority": priority})
        order.append(name)
        return answer

    with sound.slowed(20), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(post, "first", 0, LONG)]
        sound.busy()
        for admitted, (name, priority) in enumerate((("later", 5), ("middle", 0), ("sooner", -5)), start=2):
            asked.append(pool.submit(post, name, priority, CANARY))
            info = sound.until(lambda info, admitted=admitted: info["admitted"] >= admitted)
            assert info["engine"]["requests"] <= 1
        assert [one.result().status_code for one in asked] == [200] * 4
    assert order == ["first", "sooner", "middle", "later"]


def test_whoever_leaves_the_door_is_forgotten(sound: Served) -> None:
    with sound.slowed(20), ThreadPoolExecutor(1) as pool:
        first = pool.submit(sound.post, COMPLETIONS, LONG)
        sound.busy()
        with ask(sound, {**LONG, "n": 2, "stream": True}):
            sound.until(lambda info: info["admitted"] == 3)
        sound.until(lambda info: info["admitted"] == 1)
        assert first.result().status_code == 200
        sound.settled()


def test_a_first_token_that_would_come_too_late_is_refused() -> None:
    with served("--max-num-seqs", "4", "--slo", "ttft=1us") as server:
        want = server.canary()  # an empty server refuses nobody
        with server.slowed(20), ThreadPoolExecutor(1) as pool:
            first = pool.submit(server.post, COMPLETIONS, LONG)
            server.busy()
            refused = server.post(COMPLETIONS, CANARY)
            is_refusal(refused, 429, code="server_overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert first.result().status_code == 200
        assert server.canary() == want
