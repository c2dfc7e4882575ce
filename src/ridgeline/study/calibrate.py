"""Calibration: a model's own steps measured on this device, on a grid, in about a minute.

Knows steps of any shape that are timed, and least squares. It must not know workloads: what is asked later
lies between the points. Ops are timed in watched steps; what lies around them comes from unwatched steps of
other shapes, whose left-over error is the card's error bar.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ridgeline.core.errors import RidgelineError
from ridgeline.core.step import Spans, StepRecord
from ridgeline.engine.build import Built
from ridgeline.perf.card import Card, Grid, Line
from ridgeline.study.explain import exposed
from ridgeline.study.step_bench import Shape, StepBench, versions
from ridgeline.study.timing import clocks, slowed
from ridgeline.workload.arrivals import Job
from ridgeline.workload.drive import drive

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CONTEXTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
AT_A_TIME = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Requests that are served together for what lies around the ops."""
LATER = 4
"""Requests more that come when one of them has ended: prompts beside decoding."""
BUSY = 1.25
"""A quiet machine repeats a step within this factor (upper quartile over median); beyond it the machine is busy."""


class BusyMachine(RidgelineError):
    """Times vary too much to calibrate by."""


def calibrate(built: Built, progress: Callable[[int, int], None] | None = None, allow_busy: bool = False) -> Card:
    """Measure steps of `built`'s model up to its limits, and fit a Card.

    Raises BusyMachine if repeated steps differ by more than BUSY, unless allow_busy.
    """
    bench = StepBench(built)
    clocks_before = clocks(bench.device)
    tokens = [count for count in TOKENS if count <= bench.most_tokens]
    batches = [count for count in TOKENS if count <= bench.most_requests]
    contexts = [length for length in CONTEXTS if length < bench.longest] + [bench.longest]
    chunks = [count for count in TOKENS if 8 <= count <= min(bench.most_tokens, bench.longest)]
    decodes = [(count, length) for count in batches for length in contexts if bench.fits(count, length)]
    befores = [0, *(length for length in contexts if length < bench.longest)]
    prefills = [(new, before) for new in chunks for before in befores if new + before <= bench.longest]
    total, done = len(tokens) + len(decodes) + len(prefills), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    body: dict[int, float] = {}
    head: dict[int, float] = {}
    for count in tokens:
        body[count], head_one, _ = bench.parts(Shape(((count, count),) if count <= bench.longest else bench.cut(count)))
        head.setdefault(1, head_one)
        tick()
    decode: dict[tuple[int, int], float] = {}
    for count, length in decodes:
        _, head_s, decode[count, length] = bench.parts(Shape(((1, length),) * count))
        head[count] = min(head.get(count, head_s), head_s)
        tick()
    prefill: dict[tuple[int, int], float] = {}
    for new, before in prefills:
        _, _, prefill[new, before] = bench.parts(Shape(((new, new + before),)))
        tick()
    told = quiet(bench, clocks_before, allow_busy)
    card = Card(
        device=bench.device_name,
        model=built.directory.name,
        dtype=built.config.dtype,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        body=Line(tuple(sorted(body.items()))),
        head=Line(tuple(sorted(head.items()))),
        decode=_grid(batches, contexts, decode),
        prefill=_grid(chunks, befores, prefill, power=True),
        longest=bench.longest,
        step_s=0.0,
        request_s=0.0,
        ops_scale=1.0,
        host_step_s=0.0,
        host_request_s=0.0,
        loop_step_s=0.0,
        loop_request_s=0.0,
        residual=0.0,
        captured=captured_tokens(built),
        versions=versions(),
        clocks=told,
    )
    return _anchored(card, built)


def captured_tokens(built: Built) -> tuple[int, ...]:
    """Numbers of tokens at which an engine captures steps with prompts."""
    return () if built.runner.prompts is None else built.runner.prompts.tokens


def quiet(bench: StepBench, before: Mapping[str, str], allow_busy: bool) -> dict[str, Any]:
    """How steady the machine was, and its clocks, for the card. BusyMachine if that is not steady enough, unless
    allow_busy."""
    after = clocks(bench.device)
    why = slowed(after)
    if bench.spread > BUSY and not allow_busy:
        raise BusyMachine(
            f"the same step took up to {bench.spread:.2f} times its median: something else runs on this machine, or "
            "its clocks change; calibrate when it is quiet, or say --allow-busy to have the card marked"
        )
    if why and not allow_busy:
        raise BusyMachine(
            f"the GPU's clocks are held down ({why}): calibrate when it is cool, or say --allow-busy to have the card "
            "marked"
        )
    return {"spread": bench.spread, "slowed": why, "before": dict(before), "after": after}


def _grid(
    rows: Sequence[int], columns: Sequence[int], found: dict[tuple[int, int], float], power: bool = False
) -> Grid:
    """A full grid; what could not be measured (the pool is too small, the context too short) continues its row
    straight on, or in proportion if its row has one value only."""
    values = []
    for row in rows:
        known = Line(tuple((column, found[row, column]) for column in columns if (row, column) in found))
        first, seconds = known.points[0]
        if len(known.points) == 1 and first > 0:
            values.append(tuple(seconds * column / first for column in columns))
        else:
            values.append(tuple(known(column) for column in columns))
    return Grid(tuple(map(float, rows)), tuple(map(float, columns)), tuple(values), power)


def _anchored(card: Card, built: Built) -> Card:
    """The card with what lies around ops: from unwatched steps of the engine, half to fit and half to judge.

    ops_scale: what ops take in an unwatched step as a share of their times in watched ones.
    """
    served = [(record, between_s) for record, between_s in _served(built) if record.device_s > 0]
    records = [record for record, _ in served]
    fit, judge = records[::2], records[1::2]
    counts = [float(len(record.spans)) for record in fit]
    ops = [_predicted(card, record) for record in fit]
    prompts = [any(new > 1 for new, _ in record.spans) for record in fit]
    step_s, request_s, scale = fitted([[1.0] * len(fit), counts, ops], [record.device_s for record in fit], prompts)
    host_step_s, host_request_s, loop_step_s, loop_request_s = _around(built, served)
    card = replace(
        card,
        step_s=step_s,
        request_s=request_s,
        ops_scale=scale,
        host_step_s=host_step_s,
        host_request_s=host_request_s,
        loop_step_s=loop_step_s,
        loop_request_s=loop_request_s,
    )
    errors = sorted(abs(_predicted(card, record) / record.device_s - 1) for record in judge)
    return replace(card, residual=errors[int(0.95 * (len(errors) - 1))])


def around(built: Built) -> tuple[float, float, float, float]:
    """Seconds of the host around a step and for each of its requests, and of the loop between two steps, the same."""
    return _around(built, [(record, between_s) for record, between_s in _served(built) if record.device_s > 0])


def _around(built: Built, served: Sequence[tuple[StepRecord, float]]) -> tuple[float, float, float, float]:
    records = [record for record, _ in served][::2]
    if built.engine.overlap:  # what the device waits for the host comes and goes: its mean
        return statistics.mean(record.host_s for record in records), 0.0, 0.0, 0.0
    counts = [float(len(record.spans)) for record in records]
    host_step_s, host_request_s = fitted([[1.0] * len(records), counts], [record.host_s for record in records])
    loops = [(float(len(record.spans)), between_s) for record, between_s in served if between_s > 0]
    loop_step_s, loop_request_s = fitted([[1.0] * len(loops), [n for n, _ in loops]], [s for _, s in loops])
    return host_step_s, host_request_s, loop_step_s, loop_request_s


def _predicted(card: Card, record: StepRecord) -> float:
    new, visible = zip(*record.spans)
    return card.device_s(Spans(new, visible), record.rows)


def fitted(
    features: Sequence[Sequence[float]], measured: Sequence[float], kinds: Sequence[object] | None = None
) -> list[float]:
    """Weights, none below 0, of least squared relative error; steps that another process disturbed are left out: the
    worst tenth, three times, of each kind by itself, so that no kind goes whole."""
    columns = np.array(features, dtype=np.float64)
    target = np.array(measured, dtype=np.float64)
    names = np.array([0] * len(target) if kinds is None else kinds)
    weights: Any = None
    for _ in range(4):
        weights = _least(columns / target)
        errors = np.abs(weights @ columns / target - 1)
        kept = np.zeros(len(target), dtype=bool)
        for name in np.unique(names):
            kept |= (names == name) & (errors <= np.quantile(errors[names == name], 0.9))
        columns, target, names = columns[:, kept], target[kept], names[kept]
    return [float(one) for one in weights]


def _least(columns: Any) -> Any:
    """The weights, none below 0, with which rows [number, steps] come nearest to 1 everywhere: those of the best choice
    of rows whose own best weights are positive (few rows: all choices are tried)."""
    best, least = None, np.inf
    for count in range(1, len(columns) + 1):
        for chosen in map(list, itertools.combinations(range(len(columns)), count)):
            found = np.linalg.lstsq(columns[chosen].T, np.ones(columns.shape[1]), rcond=None)[0]
            error = float(np.sum((found @ columns[chosen] - 1) ** 2))
            if found.min() >= 0 and error < least:
                best, least = np.zeros(len(columns)), error
                best[chosen] = found
    return best


def _served(built: Built) -> Iterator[tuple[StepRecord, float]]:
    """Steps of real workloads of other shapes than the grid's, one request to many at a time: prompts of all lengths,
    then decoding, where what a request costs shows. And what lay between each and the next one; where steps overlap,
    the host has what the device waited for, and nothing lies between.
    """
    longest, draw = built.config.max_model_len, random.Random(1)
    for requests in AT_A_TIME:
        if requests > built.config.max_num_seqs:
            break
        jobs = []
        for _ in range(requests + LATER):
            prompt = draw.randrange(4, max(min(700, longest // 2, 4096 // requests), 6))
            jobs.append(Job(prompt, min(draw.randrange(16, 32), longest - prompt)))
        records: list[StepRecord] = []
        built.engine.listeners.append(records.append)
        try:
            drive(built.engine, jobs, built.spec.vocabulary, seed=requests, concurrency=requests)
        finally:
            built.engine.listeners.remove(records.append)
        if built.engine.overlap:
            yield from ((record, 0.0) for record in exposed(records[2:]))
            continue
        for one, after in itertools.pairwise(records[2:]):
            yield one, after.start_s - one.start_s - one.host_s - one.device_s
