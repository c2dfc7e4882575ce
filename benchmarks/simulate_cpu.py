"""Requests of the Azure conversation trace, simulated and served: how far apart are the two?

The embedded model's steps are calibrated (or a card is given). A closed loop over the trace's requests tells what the
machine serves at most; then the trace's own arrivals, stretched to a share of that, are served for real and simulated
on the same scheduler with the same settings. At such a load the medians are steep: arrivals come in bursts, and a
machine that is slower by 1 % has a median TTFT and TPOT 10 to 20 % higher (--slower shows it). So the two are compared
at the same speed: before and behind every round the requests that follow in the trace are served at the same rate, and
the steps of these two say how much slower the machine was than its card, by kind of step. (A closed loop would not do:
it decodes with all seats taken, arrivals mostly with few, and those two are not slowed by the same.) That is what the
lines are judged by. Beside it stands the simulation at the speed of the round's own steps, which leaves nothing to be
off but queues, batches and one step beside another of its kind, and what the card alone says, of the closed loop and of
the first rounds in a row whose real figures agree.

Rounds are added while the last ones differ among each other by more than half of what the simulation may be off,
because then the machine and not the simulation is what is seen. If they never agree, the median over all rounds counts
where errors at the rounds' own speed leave no doubt (verdict). Every step's prediction stands beside its time as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import checkpoint
from benchmarks.record import Record, interval, losing, parser, seconds, use_threads
from benchmarks.trace import azure_jobs, spread
from ridgeline import LLM
from ridgeline.core.step import Spans, StepRecord
from ridgeline.perf.card import Card, load_card
from ridgeline.study.calibrate import calibrate
from ridgeline.study.predicted import PredictedSteps
from ridgeline.study.simulate import Carded, simulate
from ridgeline.study.verify import setting_of
from ridgeline.workload.arrivals import Job
from ridgeline.workload.drive import drive
from ridgeline.workload.measure import Report, Served, report

TOLERANCES = {
    "output tokens/s": 0.05,
    "TTFT p50": 0.10,
    "TPOT p50": 0.10,
    "TTFT p99": 0.20,
    "TPOT p99": 0.20,
}
"""How far from the real run a simulation may be: the issue's lines."""


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.requests, options.scale, options.rounds, options.most_rounds = 8, 32, 1, 1
        options.anchors, options.seats, options.max_num_seqs, options.max_model_len = 4, 4, 4, 256
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=3)
    result.add_argument("--requests", type=int, default=300)
    result.add_argument("--scale", type=int, default=4, help="the trace's lengths are divided by this")
    result.add_argument("--load", type=float, default=0.7, help="arrivals as a share of the closed loop's rate")
    result.add_argument("--seats", type=int, default=64, help="requests in the closed loop")
    result.add_argument(
        "--anchors",
        type=int,
        default=200,
        help="requests before and behind a round, by whose steps the machine's speed is known",
    )
    result.add_argument("--max-num-seqs", type=int, default=256, help="requests in a step at most; the engine's own")
    result.add_argument("--max-model-len", type=int, help="longest sequence; the model's own if left out")
    result.add_argument("--card", type=Path, help="a card to predict by; if it is not there, it is made and kept there")
    result.add_argument("--most-rounds", type=int, default=16, help="rounds at most, while they do not agree")
    result.add_argument(
        "--slower",
        type=float,
        nargs="+",
        default=[0.98, 0.99, 1.0, 1.01, 1.02],
        metavar="FACTOR",
        help="simulate the first round's arrivals once more on a machine slower by these",
    )
    result.add_argument("--only-card", action="store_true", help="calibrate, write the card and stop")
    return result


@dataclass(frozen=True)
class Run:
    """What users felt, and every step."""

    served: list[Served]
    steps: list[StepRecord]
    report: Report


@dataclass(frozen=True)
class Speed:
    """How much slower a machine is than its card. device: by kind of step; host: what lies around them."""

    device: dict[str, float]
    host: float

    @classmethod
    def of(cls, card: Card, steps: Sequence[StepRecord]) -> Speed:
        said: Counter[str] = Counter()
        took: Counter[str] = Counter()
        for one in steps:
            for kind in (kind_of(Spans(*zip(*one.spans))), "all"):
                said[kind] += by_card_s(one, card)
                took[kind] += one.device_s
        host = sum(card.host_step_s + card.host_request_s * len(one.spans) for one in steps)
        device = {kind: took[kind] / said[kind] for kind in said}
        return cls(device, sum(one.host_s for one in steps) / host)

    def slower(self, factor: float) -> Speed:
        return Speed({kind: factor * one for kind, one in self.device.items()}, factor * self.host)


FEW = 4
"""Requests up to which decoding waits for memory and little else: so that neighbours who read memory too slow it down,
and not the steps of more."""


def by_card_s(step: StepRecord, card: Card) -> float:
    """Seconds on the device by the card."""
    return card.device_s(Spans(*zip(*step.spans)), step.rows)


def kind_of(spans: Spans) -> str:
    if max(spans.new) == 1:
        return "decode of few" if len(spans.new) <= FEW else "decode"
    return "mixed" if min(spans.new) == 1 else "prefill"


@dataclass(frozen=True)
class Round:
    """Arrivals served for real and simulated. alike: at the speed of the real one's own steps."""

    real: Run
    simulated: Run
    alike: Run
    speed: Speed

    @property
    def errors(self) -> dict[str, float]:
        return errors_of(self.simulated, self.real)


def errors_of(simulated: Run, real: Run) -> dict[str, float]:
    """By the names of TOLERANCES, simulated over real, less one."""
    found = figures(real.report)
    return {name: value / found[name] - 1 for name, value in figures(simulated.report).items()}


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    record = Record("simulate-cpu", options)
    jobs = [Job(one.prompt_tokens, one.output_tokens) for one in azure_jobs(options.requests, options.scale)]
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_seqs": options.max_num_seqs}
    if options.max_model_len:
        settings["max_model_len"] = options.max_model_len
    with LLM(folder, **settings, enable_prefix_caching=False) as llm:
        card = card_for(llm, options.card, record)
        if options.only_card:
            return record
        drive(llm.built.engine, jobs[:8], llm.built.spec.vocabulary, seed=99)  # warm
        record.settings = {
            "model": what,
            "dtype": "float32",
            "threads": options.threads,
            "requests": len(jobs),
            "prompt_tokens": sum(one.prompt_tokens for one in jobs),
            "output_tokens": sum(one.output_tokens for one in jobs),
            "max_num_seqs": options.max_num_seqs,
            "seats": options.seats,
            "anchors": options.anchors,
            "load": options.load,
            "card_sha256": card.sha256,
        }
        rounds = compared(llm, jobs, card, options, record)
    compare(record, rounds, options.rounds)
    steps_beside(record, card, [one for done in rounds for one in done.real.steps])
    record.timings["card"] = card.as_dict()
    return record


def card_for(llm: LLM, path: Path | None, record: Record) -> Card:
    """The card of that file; otherwise a new one, kept there. A card of a busy machine is kept and says so."""
    if path is not None and path.is_file():
        card = load_card(path)
        record.note(f"the card was made before, at {card.made}")
        return card
    start = time.perf_counter()
    card = calibrate(llm.built, allow_busy=True)
    record.timings["calibration_s"] = round(time.perf_counter() - start, 3)
    record.note(
        f"calibrated in {record.timings['calibration_s']:.0f} s; a step repeated within {card.clocks['spread']:.2f} "
        f"times its median; steps left out of the fit are off by {card.residual:.1%} (95th percentile)"
    )
    if path is not None:
        card.save(path)
    return card


def simulated_run(llm: LLM, jobs: Sequence[Job], card: Card, speed: Speed, seats: int | None = None) -> Run:
    """On a machine of that speed; seats: a closed loop."""
    steps, every = Carded(card), speed.device["all"]
    found = simulate(
        jobs,
        setting_of(llm.built),
        lambda spans, rows: speed.device.get(kind_of(spans), every) * steps.device_s(spans, rows),
        lambda plan: speed.host * steps.host_s(plan),
        concurrency=seats,
        keep_steps=True,
    )
    return Run(found.served, found.steps, found.report)


AS_THE_CARD = Speed({"all": 1.0}, 1.0)


def real_run(llm: LLM, jobs: Sequence[Job], seed: int, seats: int | None = None) -> Run:
    """On this machine; seats: a closed loop."""
    steps: list[StepRecord] = []
    llm.built.engine.listeners.append(steps.append)
    try:
        served = drive(llm.built.engine, jobs, llm.built.spec.vocabulary, seed=seed, concurrency=seats)
    finally:
        llm.built.engine.listeners.remove(steps.append)
    return Run(served, steps, report(served))


def compared(llm: LLM, jobs: Sequence[Job], card: Card, options: argparse.Namespace, record: Record) -> list[Round]:
    """Rounds on the wall's clock and simulated, until the last ones agree, or as many as may be."""
    loop = real_run(llm, jobs, 7, options.seats)
    record.observe("closed loop")
    rate = options.load * loop.report.request_rate
    arriving = at_rate(options.requests, options.scale, rate)
    beside = at_rate(options.anchors, options.scale, rate, first=options.requests)
    anchors = [real_run(llm, beside, 7)]
    rounds: list[Round] = []
    while True:
        real = real_run(llm, arriving, 1000 + len(rounds))
        record.observe(f"round {len(rounds) + 1}")
        anchors.append(real_run(llm, beside, 8 + len(rounds)))
        speed = Speed.of(card, [*anchors[-2].steps, *anchors[-1].steps])
        alike = simulated_run(llm, arriving, card, Speed.of(card, real.steps))
        rounds.append(Round(real, simulated_run(llm, arriving, card, speed), alike, speed))
        if len(rounds) == 1:
            slower(llm, arriving, card, speed, options.slower, record)
        if len(rounds) < options.rounds:
            continue
        if steady(rounds[-options.rounds :]) or len(rounds) >= max(options.most_rounds, options.rounds):
            break
    rates = {"real": loop.report.request_rate}
    for what, speed in (("by the card", AS_THE_CARD), ("at the speed of its steps", Speed.of(card, loop.steps))):
        rates[what] = simulated_run(llm, jobs, card, speed, options.seats).report.request_rate
        error = rates[what] / rates["real"] - 1
        record.target(f"closed loop simulated {what}, against real", "recorded", f"{error:+.1%}", None)
    record.summary["closed loop, requests/s"] = rates
    by_the_card(record, figures(simulated_run(llm, arriving, card, AS_THE_CARD).report), rounds, options.rounds)
    record.summary["beside the rounds, by the card and real, seconds in steps"] = [
        [sum(by_card_s(one, card) for one in run.steps), sum(one.device_s for one in run.steps)] for run in anchors
    ]
    return rounds


def at_rate(count: int, scale: int, rate: float, first: int = 0) -> list[Job]:
    """`count` requests of the trace from row `first` on, at so many requests a second."""
    rows = spread(azure_jobs(count, scale, first), count / rate)
    return [Job(one.prompt_tokens, one.output_tokens, one.arrival_s) for one in rows]


def slower(
    llm: LLM, arriving: Sequence[Job], card: Card, speed: Speed, factors: Sequence[float], record: Record
) -> None:
    """How steep the figures are: the same arrivals on machines a little slower or faster."""
    middle = figures(simulated_run(llm, arriving, card, speed).report)
    cells = {}
    for one in factors:
        found = figures(simulated_run(llm, arriving, card, speed.slower(one)).report)
        cells[f"{one:g}"] = {name: found[name] / middle[name] - 1 for name in found}
    record.summary["simulated on a slower machine"] = cells
    rows = [[f"{float(one) - 1:+.1%}", *(f"{found[name]:+.1%}" for name in TOLERANCES)] for one, found in cells.items()]
    record.table("The same arrivals on a machine slower by", ["", *TOLERANCES], rows)


def figures(found: Report) -> dict[str, float]:
    """The figures that are compared, by the names of TOLERANCES."""
    assert found.ttft is not None
    assert found.tpot is not None
    return {
        "output tokens/s": found.output_rate,
        "TTFT p50": found.ttft.p50,
        "TPOT p50": found.tpot.p50,
        "TTFT p99": found.ttft.p99,
        "TPOT p99": found.tpot.p99,
    }


def by_the_card(record: Record, said: dict[str, float], rounds: Sequence[Round], count: int) -> None:
    """What the card alone said beside the first `count` real rounds in a row that differ by no more than half of what
    it may be off. Rounds that never do say nothing: the median of all stands there, without a verdict."""
    real = [figures(one.real.report) for one in rounds]
    place = first_alike(real, count)
    judged = real if place is None else real[place : place + count]
    middle = {name: statistics.median(one[name] for one in judged) for name in TOLERANCES}
    errors = {name: said[name] / middle[name] - 1 for name in TOLERANCES}
    found = {"rounds": None if place is None else [place + 1, place + count], "simulated": said, "real": middle}
    record.summary["by the card alone"] = {**found, "error": errors}
    which = "all rounds, none alike" if place is None else f"rounds {place + 1} to {place + count}"
    for name, limit in TOLERANCES.items():
        met = None if place is None else abs(errors[name]) <= limit
        record.target(f"{name} by the card alone, against {which}", f"within {limit:.0%}", f"{errors[name]:+.1%}", met)


def first_alike(real: Sequence[dict[str, float]], count: int) -> int | None:
    """Where the first `count` rounds in a row begin whose figures differ by no more than half of their tolerances."""
    for place in range(len(real) - count + 1):
        some = real[place : place + count]
        columns = {name: [one[name] for one in some] for name in TOLERANCES}
        if all(max(v) - min(v) <= TOLERANCES[name] / 2 * statistics.median(v) for name, v in columns.items()):
            return place
    return None


def steady(rounds: Sequence[Round]) -> bool:
    """Whether rounds differ, at equal speed, by no more than half of what the simulation may be off."""
    return all(apart(rounds, name) <= limit / 2 for name, limit in TOLERANCES.items())


def apart(rounds: Sequence[Round], name: str) -> float:
    found = [done.errors[name] for done in rounds]
    return max(found) - min(found)


def verdict(errors: Sequence[float], own: Sequence[float], limit: float, agree: bool) -> bool | None:
    """Whether the median error is within the limit. Where rounds do not agree, noise may be what put it there: so it
    counts only if errors at the rounds' own speed, own, which have none of it, are within with all of their interval.
    None where that leaves either open."""
    middle, low, high = interval(errors)
    if agree:
        return abs(middle) <= limit
    _, own_low, own_high = interval(own)
    if abs(middle) <= limit and -limit <= own_low and own_high <= limit:
        return True
    out = (low > limit, high < -limit, own_low > limit, own_high < -limit)
    return False if any(out) else None


def compare(record: Record, rounds: Sequence[Round], last: int) -> None:
    agree = steady(rounds[-last:])
    judged = rounds[-last:] if agree else rounds
    rows, cells = [], {}
    for name, limit in TOLERANCES.items():
        errors = [done.errors[name] for done in judged]
        middle, low, high = interval(errors)
        at_own = [errors_of(done.alike, done.real)[name] for done in rounds]
        met = verdict(errors, at_own, limit, agree)
        real = statistics.median(figures(done.real.report)[name] for done in judged)
        mine = statistics.median(figures(done.simulated.report)[name] for done in judged)
        form, scale = ("{:,.0f}", 1.0) if name.startswith("output") else ("{:.2f} ms", 1e3)
        shown = [form.format(one * scale) for one in (mine, real)]
        every = [
            {"simulated": figures(one.simulated.report)[name], "real": figures(one.real.report)[name],
             "at its own speed": figures(one.alike.report)[name]}
            for one in rounds
        ]  # fmt: skip
        alike = interval(at_own)
        between = apart(rounds[-last:], name)
        cells[name] = {"rounds": every, "error": [middle, low, high], "apart": between, "at its own speed": list(alike)}
        said, own = (f"{one:+.1%} [{least:+.1%}, {most:+.1%}]" for one, least, most in ((middle, low, high), alike))
        rows.append([name, *shown, losing(said, met is False), f"{limit:.0%}", f"{between:.1%}", own])
        record.target(f"simulated {name} against real", f"within {limit:.0%}", said, met)
    record.summary["simulated against real"] = cells
    record.summary["slower than the card, by round"] = [
        {**done.speed.device, "host": done.speed.host} for done in rounds
    ]
    record.summary["simulated"] = [done.simulated.report.as_dict() for done in rounds]
    record.summary["real"] = [done.real.report.as_dict() for done in rounds]
    record.table(
        f"{len(rounds[0].simulated.served)} requests: simulated and real, medians of {len(judged)} rounds",
        ["", "simulated", "real", "error", "may be", f"last {last} apart", f"at its own speed, {len(rounds)} rounds"],
        rows,
    )
    if not agree:
        record.note(
            f"after {len(rounds)} rounds the last {last} still differ by more than half of a tolerance: judged are the "
            "median of all rounds, and the interval of errors at their own speed"
        )
    record.timings["rounds"] = [
        {
            "first_token_s": seconds(one.ttft_s for one in run.served),
            "tpot_s": seconds(one.tpot_s or 0.0 for one in run.served),
        }
        for done in rounds
        for run in (done.simulated, done.real)
    ]


def steps_beside(record: Record, card: Card, steps: Sequence[StepRecord]) -> None:
    """Each step's time on the device beside the card, by class of work, and what lies around it."""
    rows, cells = [], []
    for one in PredictedSteps.of(card, steps).rows:
        chosen = [step for step in steps if one.kind in (step.kind, "all")]
        count = len(chosen)
        host = sum(card.host_step_s + card.host_request_s * len(step.spans) for step in chosen)
        taken = sum(step.host_s for step in chosen)
        tokens = sum(new for step in chosen for new, _ in step.spans) / count
        device = sum(step.device_s for step in chosen) / count
        cells.append(
            {
                **one.as_dict(),
                "tokens": tokens,
                "device_s": device,
                "host_s": taken / count,
                "host_bias": host / taken - 1,
            }
        )
        rows.append(
            [one.kind, f"{count:,}", f"{tokens:.0f}", f"{device * 1e3:.3f} ms", f"{one.bias:+.1%}", f"{one.median:.1%}",
             f"{one.p90:.1%}", f"{taken / count * 1e6:.0f} µs", f"{host / taken - 1:+.1%}"]
        )  # fmt: skip
    record.summary["steps"] = cells
    record.table(
        "Steps of the real rounds beside the card",
        ["", "steps", "tokens", "device", "off in sum", "median", "p90", "host", "off in sum"],
        rows,
    )


if __name__ == "__main__":
    main()
