"""The Timer: watches the ops of a forward pass on a real device and takes their times.

The Meter's counterpart: predicted and measured join by op. Knows clocks of devices. It must not know models. On a
CPU an op is over when its call returns; on a GPU events are laid around it and read after the step. There a step's
first op waits behind a pause as long as the host needed to launch the step before: otherwise the device would wait for
each launch, and events would measure the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Op

AHEAD = 1.5
"""Times the launches of the step before that the device pauses."""
MOST_PAUSE_S = 0.2
FASTEST_HZ = 2e9
"""No GPU's clock is faster by much: a pause counts its cycles."""


@dataclass(frozen=True, slots=True)
class TimedCall:
    """One call of an op: its floor and what it took."""

    op: str
    kind: str
    cost: Cost
    seconds: float


class Timer:
    """An observer that times every op of a step; `take` returns the step's calls and begins the next.

    Its own work (two clock readings, the op's cost function) lies between the ops and not inside of what it
    measures, but a watched step takes longer than an unwatched one: say so beside its figures.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._device = device
        self._start: Any = None
        self._calls: list[tuple[Op, Cost, Any, Any]] = []
        self._began_s = self._ended_s = 0.0
        self._paused: tuple[Any, Any] | None = None
        self.paused_s = 0.0
        """Of the last step that was taken: how long the device was kept waiting first."""

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._calls:
            self._pause()
            self._began_s = time.perf_counter()
        if self._events:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        end: Any
        if self._events:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
        else:
            end = time.perf_counter()
        self._calls.append((op, op.floor(*args, **kwargs), self._start, end))
        self._ended_s = time.perf_counter()

    def take(self) -> list[TimedCall]:
        """The calls since the last time; waits for a GPU."""
        if self._events:
            torch.cuda.synchronize(self._device)
        paused, self._paused = self._paused, None
        self.paused_s = 0.0 if paused is None else _event_seconds(*paused)
        calls, self._calls = self._calls, []
        between: Callable[[Any, Any], float] = _event_seconds if self._events else _clock_seconds
        return [TimedCall(op.name, op.kind, cost, between(start, end)) for op, cost, start, end in calls]

    def _pause(self) -> None:
        """Keep a GPU busy with nothing, until the host is ahead of it by about a step."""
        launched_s = self._ended_s - self._began_s
        if self._events and launched_s:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(int(min(AHEAD * launched_s, MOST_PAUSE_S) * FASTEST_HZ))
            end.record()
            self._paused = start, end


def _event_seconds(start: Any, end: Any) -> float:
    return float(start.elapsed_time(end)) / 1e3


def _clock_seconds(start: float, end: float) -> float:
    return end - start
