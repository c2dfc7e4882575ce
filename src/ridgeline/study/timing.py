"""How long things take, side by side: medians of alternating rounds, with intervals.

Knows clocks of the host and of a CUDA device, CUDA graphs, and the arithmetic of medians. It must not know what it
times.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

RESAMPLES = 2000
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
SLOWED = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat, by hardware", 0x80: "power brake"}
"""Bits of the driver's reasons for lower clocks that a measurement must not have."""
LEAST_S = 1e-3
"""A timed stretch is at least this long: events tick in half microseconds, and a graph's start takes some."""
MOST_S = 0.06
"""A timed stretch of a GPU is not made longer than this, whatever number of calls was asked for."""


class Interval(NamedTuple):
    """A median with its 95 % bootstrap interval (equal to the median for a single value)."""

    median: float
    low: float
    high: float


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Median of independent values and the percentile-bootstrap interval of that median."""
    middle = statistics.median(values)
    if len(values) == 1:
        return Interval(middle, middle, middle)
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Interval(middle, medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1])


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Interval of paired ratios: each pair was measured in the same round."""
    return interval([a / b for a, b in zip(numerators, denominators, strict=True)])


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


class Stretch(NamedTuple):
    """Something to be timed: run() -> seconds of one call, averaged over `calls` calls in a row.

    works: what a graph was captured from. Its replays read the tensors that those calls hold, and do not keep them.
    """

    run: Callable[[], float]
    calls: int
    graph: bool
    works: Works | None = None


def alternate(arms: Mapping[str, Stretch], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds a call of each arm in each round; the order turns around every round. `warm` rounds are dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-warm, rounds):
        for name in arms if number % 2 == 0 else reversed(list(arms)):
            taken = arms[name].run()
            if number >= 0:
                seconds[name].append(taken)
    return seconds


class Works(NamedTuple):
    """The same work on several copies of its inputs, to be called in turn.

    context: what must be entered around the calls (a pinned backend); entering it is not timed.
    """

    calls: Sequence[Callable[[], Any]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def on_host(works: Works, least_s: float = 5e-3) -> Stretch:
    """Calls of `works` in turn, by the host's clock."""
    with works.context():
        works.calls[0]()
        start = time.perf_counter()
        works.calls[0]()
        calls = _calls(time.perf_counter() - start, 1, least_s, float("inf"))

    def run() -> float:
        with works.context():
            begin = time.perf_counter()
            for number in range(calls):
                works.calls[number % len(works.calls)]()
            return (time.perf_counter() - begin) / calls

    return Stretch(run, calls, False)


class GraphPool:
    """Memory for graphs that come and go and never run at once. Lives as long as this object.

    torch refuses a pool that had graphs and has none left while any memory in it is in use; a workspace of cuBLAS, once
    taken while a graph was captured, stays in use for good. So one graph, never replayed, holds on to the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._held = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._held, pool=self.handle):
            torch.zeros(1, device=device)


def on_cuda(works: Works, calls: int, graph: bool, pool: GraphPool | None = None) -> Stretch:
    """Calls of `works` in turn on a CUDA device, by events; captured into one graph if asked to.

    calls: the least number of calls in a stretch, if that takes no longer than MOST_S. pool: for the graph's memory;
    its own, if left out.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), works.context():
        for _ in range(2):  # the first one compiles
            once = _event_seconds(works.calls[0])
        for work in works.calls[1:]:
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    calls = _calls(once, calls, LEAST_S, MOST_S)

    def loop() -> None:
        for number in range(calls):
            works.calls[number % len(works.calls)]()

    def eager() -> float:
        with works.context():
            return _event_seconds(loop) / calls

    if not graph:
        return Stretch(eager, calls, False)
    captured = torch.cuda.CUDAGraph()
    with works.context(), torch.cuda.graph(captured, pool=None if pool is None else pool.handle):
        loop()
    captured.replay()
    torch.cuda.synchronize()
    times = replays(_event_seconds(captured.replay))

    def again() -> None:
        for _ in range(times):
            captured.replay()

    return Stretch(lambda: _event_seconds(again) / (times * calls), times * calls, True, works)


def replays(once_s: float) -> int:
    """How often a graph is replayed in a stretch.

    The number of calls in it was chosen by one call on its own, which on a GPU takes as long as its launch: small ones
    are faster by far in a graph, whose start would then count with them.
    """
    return max(1, math.ceil(LEAST_S / max(once_s, 1e-6)))


def _calls(once_s: float, asked: int, least_s: float, most_s: float) -> int:
    once_s = max(once_s, 1e-7)
    return max(1, math.floor(min(max(asked, math.ceil(least_s / once_s)), most_s / once_s) + 1e-9))


def _event_seconds(work: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature of a CUDA device at this moment; empty where nobody says."""
    if device.type != "cuda":
        return {}
    query = f"--query-gpu={','.join(CLOCK_FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader", "-i", str(device.index or 0)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCK_FIELDS, (one.strip() for one in done.stdout.splitlines()[0].split(","))))


def slowed(told: Mapping[str, str]) -> str:
    """Why a GPU's clocks are held down, of what `clocks` told; empty if they are not. A cap of power under load is how
    such cards work, and no fault."""
    try:
        bits = int(told.get("clocks_event_reasons.active", "0"), 16)
    except ValueError:
        return ""
    return ", ".join(what for bit, what in SLOWED.items() if bits & bit)


def forget(device: torch.device) -> None:
    """Give freed memory back, so that the next case starts from the same place."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
