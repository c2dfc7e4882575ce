"""Where every millisecond of a step went: floor, kernels, gaps, host, drafting, padding; and what to do about it.

Knows step records, a Timer's calls, and the limit curve measured on the spot. It must not know how steps are made.
A workload runs twice: unwatched, for the time of steps, and watched, for the shares of ops; what watching costs is
printed. An op below 95 % of its floor is no achievement but an error of measurement, and is refused as such. What a
calibration card says of the same steps stands beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ridgeline.core.cost import ZERO, Cost
from ridgeline.core.errors import RidgelineError
from ridgeline.core.step import Spans, StepPlan, StepRecord
from ridgeline.engine.build import Built
from ridgeline.engine.executor import Executor, Handle
from ridgeline.perf.card import Card
from ridgeline.perf.limit import LimitCurve, OwnProduct, measure_curve
from ridgeline.perf.predict import StepSeconds
from ridgeline.perf.price import Price
from ridgeline.perf.timer import TimedCall, Timer
from ridgeline.workload.arrivals import Job
from ridgeline.workload.drive import drive

ABOVE_LIMIT = 1.05
"""Measured faster than the limit by more than this is a mistake of the measurement."""
TIMED_FLOOR_S = 2e-6
"""Ops this short are mostly the clock: they are not held against the limit."""


class MeasurementError(RidgelineError):
    """A result that the machine cannot have reached."""


@dataclass(frozen=True, slots=True)
class OpShare:
    """One op in the mean step of a class of work: seconds of all its calls, measured and at the limit."""

    op: str
    kind: str
    calls: float
    cost: Cost
    floor_s: float
    memory_bound: bool
    measured_s: float

    @property
    def lost_s(self) -> float:
        """What its kernels take beyond the limit."""
        return max(self.measured_s - self.floor_s, 0.0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "class": self.kind,
            "calls": self.calls,
            "flops": self.cost.flops,
            "bytes": self.cost.bytes,
            "bound": "memory" if self.memory_bound else "compute",
            "floor_s": self.floor_s,
            "measured_s": self.measured_s,
            "of_limit": self.floor_s / self.measured_s if self.measured_s else None,
        }


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a card says of the mean step, in seconds. around_s: on the device outside of ops.

    error: predicted / measured - 1 of the whole step; residual: the card's own error bar; beyond: share of the steps
    that lie beyond what the card measured.
    """

    attention_s: float
    other_ops_s: float
    around_s: float
    host_s: float
    error: float
    residual: float
    beyond: float

    @property
    def step_s(self) -> float:
        return self.attention_s + self.other_ops_s + self.around_s + self.host_s

    def as_dict(self) -> dict[str, float]:
        return {"step_s": self.step_s, **{name: getattr(self, name) for name in self.__slots__}}


@dataclass(frozen=True)
class Explained:
    """The mean step of one class of work, split up. All seconds.

    step_s = floor_s + kernels_s + gaps_s + host_s + draft_s. floor_memory_s and floor_compute_s: the floor by the roof
    that its ops hit. kernels_s: ops beyond their floors; gaps_s: device time outside of ops (preparation, launches,
    results); host_s: scheduling and commit; where steps overlap, only what the device waited for; draft_s: drafting
    token trees. tokens: rows, of which `drafted` were nodes of trees; accepted: those nodes that became tokens.
    padding: rows of the mean step that nobody asked for; padding_s: of step_s, what they took, if the ops do them as
    fast as the others. observer_s: what watching added to a step. curve: the limit that the floor is by;
    working_set_bytes: what a step touches. predicted: by a card, if there is one.
    """

    kind: str
    steps: int
    tokens: float
    step_s: float
    host_s: float
    gaps_s: float
    ops: tuple[OpShare, ...]
    observer_s: float
    curve: LimitCurve
    working_set_bytes: float
    dtype: str = "float32"
    padding: float = 0.0
    padding_s: float = 0.0
    draft_s: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    predicted: Predicted | None = None
    advice: tuple[str, ...] = field(default=())

    @property
    def floor_s(self) -> float:
        return sum(one.floor_s for one in self.ops)

    @property
    def ops_s(self) -> float:
        """All ops of an unwatched step."""
        return self.step_s - self.gaps_s - self.host_s - self.draft_s

    @property
    def kernels_s(self) -> float:
        return self.ops_s - self.floor_s

    @property
    def limit_share(self) -> float:
        return self.floor_s / self.step_s

    def as_dict(self) -> dict[str, Any]:
        memory = sum(one.floor_s for one in self.ops if one.memory_bound)
        return {
            "kind": self.kind,
            "steps": self.steps,
            "tokens_per_step": self.tokens,
            "step_s": self.step_s,
            "floor_s": self.floor_s,
            "floor_memory_s": memory,
            "floor_compute_s": self.floor_s - memory,
            "kernels_s": self.kernels_s,
            "gaps_s": self.gaps_s,
            "host_s": self.host_s,
            "draft_s": self.draft_s,
            "drafted_per_step": self.drafted,
            "accepted_per_step": self.accepted,
            "padding_rows": self.padding,
            "padding_s": self.padding_s,
            "observer_s": self.observer_s,
            "limit_share": self.limit_share,
            "working_set_bytes": self.working_set_bytes,
            "read_bytes_per_s": self.curve.bytes_per_s(self.working_set_bytes),
            "dram_bytes_per_s": self.curve.dram_bytes_per_s,
            "flops_per_s": self.curve.flops_per_s,
            "predicted": None if self.predicted is None else self.predicted.as_dict(),
            "ops": [one.as_dict() for one in self.ops],
            "advice": list(self.advice),
        }


class Watched:
    """An executor that runs every step under a Timer."""

    def __init__(self, built: Built, timer: Timer) -> None:
        self._built = built
        self._timer = timer
        self._ops = {kind: ops.observed(timer) for kind, ops in built.table.by_work.items()}
        self.steps: list[tuple[str, list[TimedCall]]] = []

    def run(self, plan: StepPlan) -> Handle:
        result = self._built.runner.run(plan, self._ops[plan.kind])
        self.steps.append((plan.kind, self._timer.take()))
        result.device_s -= self._timer.paused_s
        return _Done(result)

    def close(self) -> None: ...


class _Done:
    def __init__(self, result: Any) -> None:
        self._result = result

    def result(self) -> Any:
        return self._result


def explain(
    built: Built,
    jobs: Sequence[Job],
    concurrency: int | None = None,
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
    card: Card | None = None,
) -> list[Explained]:
    """Run `jobs` on an engine and split the steps of each class, as `explain_serving` does."""
    return explain_serving(
        built, lambda seed: drive(built.engine, jobs, built.spec.vocabulary, seed, concurrency), rounds, progress, card
    )


def explain_serving(
    built: Built,
    serve: Callable[[int], object],
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
    card: Card | None = None,
) -> list[Explained]:
    """Let `serve` run its workload on an engine, `rounds` times unwatched and as often watched, and split the steps of
    each class of work that both kinds of runs had (trees follow prices, which differ from run to run).

    serve(number): all of the workload; the number may seed it. Raises MeasurementError if an op comes out more than
    5 % above the limit at its working set, also when the limit is measured a second time; InvalidArgument for a card
    of another model or dtype.
    """
    if card is not None:
        card.check(built.directory.name, built.config.dtype)
    config = built.config
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    panels = built.runner.model.layers[0].attention.qkv.weight.format == "panels"
    own = OwnProduct(built.table.ops("prefill").linear, panels)
    curve = measure_curve(device, dtype, own)
    plain: list[StepRecord] = []
    watched = Watched(built, Timer(torch.device(config.device)))
    executor = built.engine.executor
    watched_s: dict[str, list[float]] = {}
    done = 0
    for number in range(-1, rounds):  # the first round of each is a warm-up
        unwatched: list[StepRecord] = []
        built.engine.listeners.append(unwatched.append)
        try:
            serve(number)
        finally:
            built.engine.listeners.remove(unwatched.append)
        plain += exposed(unwatched) if built.engine.overlap else unwatched
        built.engine.executor = watched
        records: list[StepRecord] = []
        built.engine.listeners.append(records.append)
        try:
            with _prices_kept(built):
                serve(number)
        finally:
            built.engine.executor = executor
            built.engine.listeners.remove(records.append)
        if number < 0:
            plain.clear()
            watched.steps.clear()
            continue
        for record in records:
            watched_s.setdefault(record.kind, []).append(record.host_s + record.device_s + record.draft_s)
        done += 1
        if progress is not None:
            progress(done, rounds)
    kinds = sorted(
        {record.kind for record in plain} & set(watched_s),
        key=lambda kind: -sum(r.device_s for r in plain if r.kind == kind),
    )

    def split(curve: LimitCurve) -> list[Explained]:
        return [
            _explained(
                kind,
                [record for record in plain if record.kind == kind],
                [calls for one, calls in watched.steps if one == kind],
                watched_s[kind],
                curve,
                built.price,
                card,
                config.dtype,
            )
            for kind in kinds
        ]

    try:
        return split(curve)
    except MeasurementError:  # others may have slowed the limit and not the steps
        return split(curve.better(measure_curve(device, dtype, own)))


def exposed(records: Sequence[StepRecord]) -> list[StepRecord]:
    """Steps of an engine that overlaps them: the host's part is only what the device waited for, i.e. from one start to
    the next less the device's time and drafting; the rest is hidden behind the step before. The last has no next one.
    """
    return [
        replace(one, host_s=max(after.start_s - one.start_s - one.device_s - one.draft_s, 0.0))
        for one, after in itertools.pairwise(records)
    ]


@contextmanager
def _prices_kept(built: Built) -> Iterator[None]:
    """Watched steps take longer than others, which the sizer of trees must not learn."""
    speculator = built.speculator
    if speculator is None:
        yield
        return
    kept = speculator.seconds, speculator.plain_seconds
    speculator.seconds, speculator.plain_seconds = (one.copy() for one in kept)
    try:
        yield
    finally:
        speculator.seconds, speculator.plain_seconds = kept


def _explained(
    kind: str,
    records: Sequence[StepRecord],
    timed: Sequence[Sequence[TimedCall]],
    watched_s: Sequence[float],
    curve: LimitCurve,
    price: Price | None = None,
    card: Card | None = None,
    dtype: str = "float32",
) -> Explained:
    count = len(timed)
    working_set = sum(call.cost.bytes for calls in timed for call in calls) / count
    sums: dict[str, list[Any]] = {}
    for calls in timed:
        for call in calls:
            entry = sums.setdefault(call.op, [call.kind, 0, ZERO, 0.0, 0.0, 0.0])
            memory_s, compute_s = _floors(call.kind, call.cost, working_set, curve)
            entry[1] += 1
            entry[2] += call.cost
            entry[3] += max(memory_s, compute_s)
            entry[4] += memory_s - compute_s
            entry[5] += call.seconds
    ops = tuple(
        OpShare(name, kind_of, calls / count, _mean(cost, count), floor / count, surplus >= 0, seconds / count)
        for name, (kind_of, calls, cost, floor, surplus, seconds) in sums.items()
    )
    for one in ops:
        if one.floor_s > ABOVE_LIMIT * one.measured_s and one.floor_s / one.calls > TIMED_FLOOR_S:
            raise MeasurementError(
                f"{one.op} ({kind}) took {one.measured_s * 1e6:.1f} µs a step where the limit at its working set is "
                f"{one.floor_s * 1e6:.1f} µs: more than 5 % above what this machine can do, so the limit or the time "
                "was measured wrongly (another load on the machine, changing clocks); run it again on a quiet one"
            )
    steps = len(records)
    host = sum(record.host_s for record in records) / steps
    device = sum(record.device_s for record in records) / steps
    drafting = sum(record.draft_s for record in records) / steps
    measured = sum(one.measured_s for one in ops)
    result = Explained(
        kind=kind,
        steps=steps,
        tokens=sum(new for record in records for new, _ in record.spans) / steps,
        step_s=host + device + drafting,
        host_s=host,
        gaps_s=max(device - measured, 0.0),
        ops=tuple(sorted(ops, key=lambda one: -one.lost_s)),
        observer_s=sum(watched_s) / len(watched_s) - host - device - drafting,
        curve=curve,
        working_set_bytes=working_set,
        dtype=dtype,
        padding=sum(record.padding for record in records) / steps,
        padding_s=_padding_s(records, ops, working_set, curve, price),
        draft_s=drafting,
        drafted=sum(record.drafted for record in records) / steps,
        accepted=sum(record.accepted for record in records) / steps,
        predicted=None if card is None else _predicted(card, records),
    )
    return replace(result, advice=advice(result))


def _floors(kind: str, cost: Cost, working_set: float, curve: LimitCurve) -> tuple[float, float]:
    """(memory, compute) seconds. Contractions read weights and caches, which a whole step passes by; the other ops
    read what the op before them has just written."""
    within = working_set if kind == "contraction" else cost.bytes
    return cost.bytes / curve.bytes_per_s(within), cost.flops / curve.flops_per_s


def _padding_s(
    records: Sequence[StepRecord], ops: Sequence[OpShare], working_set: float, curve: LimitCurve, price: Price | None
) -> float:
    """What the mean step's rows for nobody take: the floor of a step with them less that of one without, each op
    as far above its floor as it was measured. Padded rows have no keys, so attention takes nothing for them."""
    if price is None or not any(record.padding for record in records):
        return 0.0
    above = {one.op: one.measured_s / one.floor_s for one in ops if one.floor_s > 0}

    def op_s(name: str, kind: str, cost: Cost) -> float:
        return max(_floors(kind, cost, working_set, curve)) * above.get(name, 1.0)

    seconds = StepSeconds(price, op_s)
    lost = 0.0
    for record in records:
        tokens = sum(new for new, _ in record.spans)
        chosen = record.padding if record.kind in ("decode", "tree") else 0  # of prompts, the sampled rows alone
        whole = seconds.dense(tokens + record.padding, record.rows + chosen)
        lost += max(whole - seconds.dense(tokens, record.rows), 0.0)
    return lost / len(records)


def _predicted(card: Card, records: Sequence[StepRecord]) -> Predicted:
    """A card's say on the mean of these steps, drafting left out: it knows nothing of draft models."""
    count = len(records)
    attention = others = around = host = measured = beyond = 0.0
    for record in records:
        new, visible = zip(*record.spans)
        spans = Spans(new, visible)
        around += card.step_s + card.request_s * len(new)
        one = card.ops_scale * card.attention_s(spans)
        attention += one
        others += card.device_s(spans, record.rows) - one - card.step_s - card.request_s * len(new)
        host += card.host_s(spans)
        measured += record.device_s + record.host_s
        beyond += not card.covers(spans)
    error = (attention + others + around + host) / measured - 1
    return Predicted(
        attention / count, others / count, around / count, host / count, error, card.residual, beyond / count
    )


def _mean(cost: Cost, count: int) -> Cost:
    return Cost(cost.flops / count, cost.read_bytes / count, cost.write_bytes / count, launches=cost.launches // count)


def advice(step: Explained) -> tuple[str, ...]:
    """Worst offenders first, one plain sentence each; silence about what costs less than 3 % of a step."""
    found: list[tuple[float, str]] = []
    for one in step.ops:
        share = one.floor_s / one.measured_s if one.measured_s else 1.0
        limit = "reads at" if one.memory_bound else "computes at"
        found.append(
            (
                one.lost_s,
                f"{one.op} {limit} {share:.0%} of the limit and loses {one.lost_s * 1e3:.3g} ms a step over "
                f"{one.calls:.0f} calls: {_way_out(one, step)}",
            )
        )
    found.append(
        (
            step.gaps_s,
            f"between ops {step.gaps_s * 1e3:.3g} ms a step go to preparation, calls and results: fewer, larger ops "
            "or a captured graph remove them",
        )
    )
    found.append(
        (
            step.host_s,
            f"scheduling and commit take {step.host_s * 1e3:.3g} ms a step in which the device waits: more requests a "
            "step spread them, overlap hides them",
        )
    )
    found.append(
        (
            step.draft_s,
            f"drafting takes {step.draft_s * 1e3:.3g} ms a step and brings {step.accepted:.3g} tokens more: a smaller "
            "draft model or fewer levels take less",
        )
    )
    found.append(
        (
            step.padding_s,
            f"{step.padding:.3g} rows a step are computed for nobody and take {step.padding_s * 1e3:.3g} ms: sizes "
            "captured nearer to the batch, or a batch nearer to a captured size, save them",
        )
    )
    found.sort(key=lambda pair: -pair[0])
    worst = tuple(text for lost, text in found if lost > 0.03 * step.step_s)
    return worst or ("nothing loses more than 3 % of a step: only less work would be faster",)


def _way_out(one: OpShare, step: Explained) -> str:
    if one.measured_s / max(one.calls, 1) < 20e-6:
        return "its calls are short, so starting them costs more than their work; fuse it with a neighbour"
    if one.memory_bound:
        return (
            "it waits for memory; narrower weights or cache, or more tokens a step that share a read, help"
            if one.floor_s > 0.8 * one.measured_s
            else "its kernel leaves bandwidth unused"
        )
    return (
        "its kernel leaves arithmetic unused; larger tiles of tokens help"
        if step.tokens < 256
        else "its kernel is the place to look"
    )


__all__ = ["Executor", "Explained", "MeasurementError", "OpShare", "explain"]
