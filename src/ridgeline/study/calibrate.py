"""Calibration: a model's own steps measured on this device, on a grid, in about a minute.

Knows how to make steps of any shape, a Timer, and least squares. It must not know workloads: what is asked later
lies between the points. Ops are timed in watched steps; what lies around them comes from unwatched steps of
other shapes, whose left-over error is the card's error bar.
"""

from __future__ import annotations

import itertools
import platform
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from ridgeline.core.errors import DoesNotFit, RidgelineError
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, Spans, StepPlan, StepRecord
from ridgeline.engine.build import Built
from ridgeline.perf.card import Card, Grid, Line
from ridgeline.perf.timer import TimedCall, Timer
from ridgeline.study.explain import exposed
from ridgeline.workload.arrivals import Job
from ridgeline.workload.drive import drive

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CONTEXTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
REPEATS = 7
ENOUGH_S = 0.25
BUSY = 1.25
"""A quiet machine repeats a step within this factor (upper quartile over median); beyond it the machine is busy."""


class BusyMachine(RidgelineError):
    """Times vary too much to calibrate by."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """A step to measure: (new, visible) of each request; every request is sampled."""

    spans: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(new for new, _ in self.spans)

    def as_spans(self) -> Spans:
        return Spans(tuple(new for new, _ in self.spans), tuple(visible for _, visible in self.spans))


def calibrate(built: Built, progress: Callable[[int, int], None] | None = None, allow_busy: bool = False) -> Card:
    """Measure steps of `built`'s model up to its limits, and fit a Card.

    Raises BusyMachine if repeated steps differ by more than BUSY, unless allow_busy.
    """
    bench = _Bench(built)
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
        body[count], head_one, _ = bench.parts(
            _Shape(((count, count),) if count <= bench.longest else bench.cut(count))
        )
        head.setdefault(1, head_one)
        tick()
    decode: dict[tuple[int, int], float] = {}
    for count, length in decodes:
        _, head_s, decode[count, length] = bench.parts(_Shape(((1, length),) * count))
        head[count] = min(head.get(count, head_s), head_s)
        tick()
    prefill: dict[tuple[int, int], float] = {}
    for new, before in prefills:
        _, _, prefill[new, before] = bench.parts(_Shape(((new, new + before),)))
        tick()
    if bench.spread > BUSY and not allow_busy:
        raise BusyMachine(
            f"the same step took up to {bench.spread:.2f} times its median: something else runs on this machine, or "
            "its clocks change; calibrate when it is quiet, or say --allow-busy to have the card marked"
        )
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
        versions=_versions(),
        clocks={"spread": bench.spread},
    )
    return _anchored(card, built)


class _Bench:
    """Makes and times steps of any shape, over blocks of the engine's own pool."""

    def __init__(self, built: Built) -> None:
        self.built = built
        config = built.config
        self.device = torch.device(config.device)
        self.timer = Timer(self.device)
        self.ops = {kind: ops.observed(self.timer) for kind, ops in built.table.by_work.items()}
        self.longest = config.max_model_len
        self.most_tokens = config.max_num_batched_tokens
        self.most_requests = min(config.max_num_seqs, self.most_tokens)
        self.block, self.blocks = config.block_size, config.num_blocks
        self.spread = 1.0
        self._draw = random.Random(0)
        self._number = 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()

    def fits(self, requests: int, length: int) -> bool:
        """Whether the pool holds so many requests of this length, each in blocks of its own."""
        return requests * -(-length // self.block) <= self.blocks

    def cut(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """So many prompt tokens in prompts of at most the longest length."""
        whole, rest = divmod(tokens, self.longest)
        return ((self.longest, self.longest),) * whole + (((rest, rest),) if rest else ())

    def parts(self, shape: _Shape) -> tuple[float, float, float]:
        """(body, head, attention) seconds of a watched step: medians over repeats, the first of which warms up."""
        found: list[tuple[float, float, float]] = []
        plan = self.plan(shape)
        for number in range(REPEATS + 1):
            self.built.runner.run(plan, self.ops[plan.kind])
            calls = self.timer.take()
            if number:
                found.append(_split(calls))
            if number >= 3 and sum(map(sum, found)) > ENOUGH_S:
                break  # a slow step is measured well enough by three
        body, head, attention = (sorted(one[place] for one in found) for place in range(3))
        whole = sorted(sum(one) for one in found)
        self.spread = max(
            self.spread, whole[(3 * len(whole)) // 4] / statistics.median(whole) if len(whole) > 3 else 1.0
        )
        return statistics.median(body), statistics.median(head), statistics.median(attention)

    def plan(self, shape: _Shape) -> StepPlan:
        """A step of this shape on random tokens, every request in blocks of its own while they last."""
        vocabulary = self.built.spec.vocabulary
        params = SamplingParams(temperature=0, ignore_eos=True)
        chunks, used = [], 0
        for number, (new, visible) in enumerate(shape.spans):
            need = -(-visible // self.block)
            if used + need > self.blocks:
                used = 0  # reading somebody else's keys takes as long
            if need > self.blocks:
                raise DoesNotFit(f"a request of {visible} tokens needs {need} blocks, the pool has {self.blocks}")
            tokens = [self._draw.randrange(vocabulary) for _ in range(new)]
            sampling = Sampling(params, 0, visible, tokens, visible)
            chunks.append(Chunk(f"c{number}", tokens, visible - new, range(used, used + need), sampling))
            used += need
        self._number += 1
        return StepPlan(self._number, tuple(chunks))


def _split(calls: Sequence[TimedCall]) -> tuple[float, float, float]:
    """(body, head, attention) seconds; the head is what follows the last norm."""
    last = max(place for place, one in enumerate(calls) if one.kind == "normalization")
    attention = sum(one.seconds for one in calls if one.op == "attention")
    body = sum(one.seconds for one in calls[: last + 1] if one.op != "attention")
    return body, sum(one.seconds for one in calls[last + 1 :]), attention


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
    step_s, request_s, scale = _fitted([[1.0] * len(fit), counts, ops], [record.device_s for record in fit])
    if built.engine.overlap:  # what the device waits for the host comes and goes: its mean
        host_step_s, host_request_s = statistics.mean(record.host_s for record in fit), 0.0
        loop_step_s = loop_request_s = 0.0
    else:
        host_step_s, host_request_s = _fitted([[1.0] * len(fit), counts], [record.host_s for record in fit])
        loops = [(float(len(record.spans)), between_s) for record, between_s in served if between_s > 0]
        loop_step_s, loop_request_s = _fitted([[1.0] * len(loops), [n for n, _ in loops]], [s for _, s in loops])
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


def _predicted(card: Card, record: StepRecord) -> float:
    new, visible = zip(*record.spans)
    return card.device_s(Spans(new, visible), record.rows)


def _fitted(features: Sequence[Sequence[float]], measured: Sequence[float]) -> list[float]:
    """Weights of least squared relative error; steps that another process disturbed are left out: the worst tenth,
    three times."""
    columns = np.array(features, dtype=np.float64)
    target = np.array(measured, dtype=np.float64)
    weights: Any = None
    for _ in range(4):
        weights = np.linalg.lstsq((columns / target).T, np.ones_like(target), rcond=None)[0]
        errors = np.abs(weights @ columns / target - 1)
        kept = errors <= np.quantile(errors, 0.9)
        columns, target = columns[:, kept], target[kept]
    return [float(one) for one in weights]


def _served(built: Built) -> Iterator[tuple[StepRecord, float]]:
    """Steps of real workloads of other shapes than the grid's, a few requests to many at a time; and what lay between
    each and the next one; where steps overlap, the host has what the device waited for, and nothing lies between."""
    longest, draw = built.config.max_model_len, random.Random(1)
    for concurrency in (1, 3, 12, 48):
        if concurrency > built.config.max_num_seqs:
            break
        jobs = []
        for _ in range(concurrency * 2):
            prompt = draw.randrange(4, max(min(700, longest // 2), 6))
            jobs.append(Job(prompt, min(draw.randrange(8, 40), longest - prompt)))
        records: list[StepRecord] = []
        built.engine.listeners.append(records.append)
        try:
            drive(built.engine, jobs, built.spec.vocabulary, seed=concurrency, concurrency=concurrency)
        finally:
            built.engine.listeners.remove(records.append)
        if built.engine.overlap:
            yield from ((record, 0.0) for record in exposed(records[2:]))
            continue
        for one, after in itertools.pairwise(records[2:]):
            yield one, after.start_s - one.start_s - one.host_s - one.device_s


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("ridgeline", "numba", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
