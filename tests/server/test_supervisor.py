"""What the supervisor makes of messages: progress, and deliveries that fail."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from ridgeline.engine.messages import Beat, Stepped
from ridgeline.server.settings import ServerSettings
from ridgeline.server.state import State
from ridgeline.server.supervisor import Phase, Supervisor


def step(numbers: list[int], tokens: list[int]) -> Stepped:
    return Stepped(1, numbers, tokens, [], [], [], [], "decode", 2, 0.01, 0.01, None, 2, 0, 1, 0, 0, 0, 0)


@dataclass(eq=False)
class Listener:
    """Stands for a job: its tokens, and how it ended."""

    numbers: list[int]
    breaks: bool = False
    tokens: list[int] = field(default_factory=list)
    error: Any = None

    def token(self, number: int, score: Any, now_s: float) -> None:
        if self.breaks:
            raise ValueError("these bytes are no text")
        self.tokens.append(score.token)

    def fail(self, error: Any) -> None:
        self.error = error


def test_36_a_detokenizer_that_fails_fails_alone() -> None:
    async def run() -> None:
        supervisor = Supervisor(ServerSettings(), lambda facts: None)
        good, bad = Listener([1]), Listener([2], breaks=True)
        supervisor._jobs.update({1: good, 2: bad})  # type: ignore[dict-item]
        for token in (5, 6):
            supervisor._take(step([2, 1], [token, token]))
        assert good.tokens == [5, 6]
        assert good.error is None
        assert (bad.error.status, bad.error.code) == (500, "internal_error")
        assert 2 not in supervisor._jobs

    asyncio.run(run())


def test_health_is_progress() -> None:
    """An engine whose loop turns while its requests do not get on is as stuck as a silent one."""
    state = State(ServerSettings(health_silence_s=0.2, ready_silence_s=0.1))
    supervisor = state.supervisor
    supervisor.phase = Phase.READY
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        supervisor._take(Beat(7, 1, 10, 3))
        time.sleep(0.01)
    assert supervisor.silent_s < 0.1
    assert not state.healthy
    assert not state.ready
    supervisor._take(Beat(8, 1, 10, 3))
    assert state.healthy
    assert state.ready
    time.sleep(0.3)
    supervisor._take(Beat(8, 0, 10, 0))  # nothing to do
    assert state.healthy
