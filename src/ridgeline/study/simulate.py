"""A workload on the real scheduler and the real KV cache, with steps that take their predicted time.

Knows workloads and an engine without a device. It must not know how seconds are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ridgeline.core.errors import DoesNotFit, InvalidArgument
from ridgeline.core.step import Spans, StepPlan, StepRecord
from ridgeline.engine.build import DEFAULT_BATCHED_TOKENS
from ridgeline.engine.virtual import Setting, build_virtual
from ridgeline.perf.card import Card
from ridgeline.perf.hardware import Hardware
from ridgeline.study.plan import BLOCK_SIZE, Planner
from ridgeline.workload.arrivals import Job, poisson
from ridgeline.workload.drive import drive
from ridgeline.workload.measure import Report, Served, Spread, report

TYPICAL_RUNS = 20
"""Simulations that a search for capacity takes, about: for a progress bar."""

Seconds = Callable[[Spans, int], float]
"""Time of a step from its spans and the number of sampled rows."""


class Carded:
    """Steps as a card predicts them, and how many of them lie beyond what it measured."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.steps = self.beyond = 0
        self.reach = 0.0

    def device_s(self, spans: Spans, rows: int) -> float:
        reach = self.card.reach(spans)
        self.steps += 1
        self.beyond += reach > 1
        self.reach = max(self.reach, reach)
        return self.card.device_s(spans, rows)

    def host_s(self, plan: StepPlan) -> float:
        """The engine's own work around a step, and its driver's before the next one."""
        card, count = self.card, len(plan.chunks)
        return card.host_step_s + card.loop_step_s + (card.host_request_s + card.loop_request_s) * count

    def forget(self) -> None:
        """Count from here."""
        self.steps = self.beyond = 0
        self.reach = 0.0

    @property
    def error(self) -> float:
        """Error bar of a step, relative; wider beyond the card's range."""
        return self.card.residual * max(self.reach, 1.0)

    def as_dict(self) -> dict[str, float]:
        return {"steps": self.steps, "beyond_the_card": self.beyond, "reach": self.reach, "error": self.error}

    def line(self) -> str:
        """The error bar in words, and a mark where the card is left."""
        said = f"by a card whose steps are off by {self.card.residual:.1%} (95th percentile)"
        if not self.beyond:
            return said
        return (
            f"{said}; BEYOND ITS RANGE: {self.beyond:,} of {self.steps:,} steps, up to {self.reach:.1f} times: expect "
            f"{self.error:.0%} there, or calibrate with larger limits"
        )


@dataclass
class Simulation:
    """What came of it: requests as served, figures, and the record of every step (virtual seconds)."""

    served: list[Served]
    report: Report
    steps: list[StepRecord] = field(default_factory=list)


def setting_for(
    planner: Planner,
    hardware: Hardware,
    utilization: float = 0.9,
    max_model_len: int | None = None,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int | None = None,
    scheduling_policy: str = "fcfs",
    enable_chunked_prefill: bool = True,
) -> Setting:
    """The engine that this model would have on this machine. DoesNotFit if one request of full length does not."""
    length = max_model_len or planner.spec.max_positions
    tokens = max_num_batched_tokens or max(DEFAULT_BATCHED_TOKENS[hardware.device], max_num_seqs)
    if not enable_chunked_prefill and max_num_batched_tokens is None:
        tokens = max(tokens, length)
    capacity_tokens = planner.capacity_tokens(hardware, utilization, tokens, min(max_num_seqs, tokens))
    if capacity_tokens < length:
        raise DoesNotFit(
            f"{planner.name} in {planner.dtype} leaves room for {capacity_tokens:,} tokens of KV cache on "
            f"{hardware.name}, less than one request of max_model_len {length:,}: lower max_model_len"
        )
    return Setting(
        num_blocks=capacity_tokens // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_model_len=length,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        scheduling_policy=scheduling_policy,
        vocabulary=planner.spec.vocabulary,
    )


def seconds_of(seconds: Seconds) -> Callable[[StepPlan], float]:
    """A plan's time from its spans."""

    def of(plan: StepPlan) -> float:
        spans = Spans(tuple(chunk.new for chunk in plan.chunks), tuple(chunk.visible for chunk in plan.chunks))
        return seconds(spans, sum(chunk.sampling is not None for chunk in plan.chunks))

    return of


def simulate(
    jobs: Sequence[Job],
    setting: Setting,
    seconds: Seconds,
    host_s: Callable[[StepPlan], float] | None = None,
    objectives: Mapping[str, float] | None = None,
    concurrency: int | None = None,
    keep_steps: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Serve `jobs` in virtual time. Jobs longer than max_model_len fail, as they would in the engine."""
    engine = build_virtual(setting, seconds_of(seconds), host_s or (lambda plan: 0.0))
    steps: list[StepRecord] = []
    if keep_steps:
        engine.listeners.append(steps.append)
    served = drive(engine, jobs, setting.vocabulary, concurrency=concurrency, progress=progress)
    return Simulation(served, report(served, objectives), steps)


@dataclass(frozen=True, slots=True)
class Tried:
    """One rate of a search: the share of requests within every objective, whether as many came as went, the
    latencies."""

    rate_per_s: float
    share: float
    sustained: bool
    ttft: Spread | None
    tpot: Spread | None
    e2e: Spread | None

    def as_dict(self) -> dict[str, Any]:
        spreads = {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}
        shown = {name: None if one is None else one.as_dict() for name, one in spreads.items()}
        return {"rate_per_s": self.rate_per_s, "share": self.share, "sustained": self.sustained, **shown}


@dataclass(frozen=True)
class Capacity:
    """The highest request rate that can go on, at which `share` of requests meet every objective; 0 if none does.

    tried: rates in the order of the search. best: figures at that rate, or, where no rate meets them, at the lowest one
    tried: the best that can be reached. saturated: no rate is too high, because so few requests never queue.
    """

    rate_per_s: float
    share: float
    tried: tuple[Tried, ...]
    best: Report
    saturated: bool = False

    def as_dict(self) -> dict[str, Any]:
        tried = [one.as_dict() for one in self.tried]
        return {"rate_per_s": self.rate_per_s, "share": self.share, "tried": tried, "best": self.best.as_dict()}


def capacity(
    jobs: Sequence[Job],
    setting: Setting,
    seconds: Seconds,
    objectives: Mapping[str, float],
    share: float = 0.99,
    host_s: Callable[[StepPlan], float] | None = None,
    precision: float = 0.02,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Capacity:
    """Bisect the Poisson rate. InvalidArgument, with the best reachable, if not even one request alone meets it.

    A rate counts as met only if it is sustained: a few requests can be within an objective while they pile up.
    """
    tried: list[Tried] = []

    def run(rate: float) -> tuple[float, Report]:
        done = simulate(poisson(jobs, rate, seed), setting, seconds, host_s, objectives)
        found, on = done.report, sustained(done.served)
        met = found.met / max(found.requests, 1)
        tried.append(Tried(rate, met, on, found.ttft, found.tpot, found.e2e))
        if progress is not None:
            progress(len(tried), TYPICAL_RUNS)
        return met if on else 0.0, found

    alone = simulate(jobs[:1], setting, seconds, host_s, objectives).report
    assert alone.e2e is not None
    low = 0.02 / alone.e2e.mean
    met, best = run(low)
    if met < share:
        reached = ", ".join(
            f"{name} {spread.p99 * 1e3:.3g} ms"
            for name, spread in (("ttft", best.ttft), ("tpot", best.tpot), ("e2e", best.e2e))
            if name in objectives and spread is not None
        )
        raise InvalidArgument(
            "slo", f"no load meets it: the best reachable (99th percentile, almost alone) is {reached}"
        )
    high = low
    while True:
        high *= 2
        met, found = run(high)
        if met < share:
            break
        low, best = high, found
        if found.seconds and high > 4 * found.request_rate:  # arrivals no longer limit anything
            return Capacity(found.request_rate, share, tuple(tried), best, saturated=True)
    while high / low > 1 + precision:
        middle = (low * high) ** 0.5
        met, found = run(middle)
        if met >= share:
            low, best = middle, found
        else:
            high = middle
    return Capacity(low, share, tuple(tried), best)


def sustained(served: Sequence[Served]) -> bool:
    """Whether requests leave as fast as they arrive: no more of them are under way at the last arrival than halfway
    there, but for a quarter and twice the scatter of a Poisson number."""
    arrivals = sorted(one.arrival_s for one in served)
    ends = [one.token_times_s[-1] for one in served if one.token_times_s]

    def under_way(at_s: float) -> int:
        return sum(one <= at_s for one in arrivals) - sum(one <= at_s for one in ends)

    half = under_way((arrivals[0] + arrivals[-1]) / 2)
    return under_way(arrivals[-1]) <= 1.25 * half + 2 * half**0.5 + 1
