"""Requests of the Azure conversation trace, simulated and served: how far apart are the two?

The embedded model's steps are calibrated (or a card is given). A closed loop over the trace's requests tells what the
machine serves at most; then the trace's own arrivals, stretched to a share of that, are served for real and simulated
on the same scheduler with the same settings. At such a load the medians are steep: arrivals come in bursts, and a
machine that is slower by 1 % has a median TTFT and TPOT 10 to 20 % higher (--slower shows it). So the two
are compared at the same speed: every round of arrivals has a closed loop before it, whose rate its arrivals are
stretched by, and one behind it; the card's seconds are scaled, all alike, so that a simulated closed loop has the mean
rate of these two. What the card itself says of the closed loop is a line of its own.

Rounds are added while the last ones differ among each other by more than half of what the simulation may be off,
because then the machine and not the simulation is what is seen. If they never agree, the median over all rounds counts
where its interval leaves no doubt. Every step's prediction stands beside its time as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import checkpoint
from benchmarks.record import Record, interval, losing, parser, seconds, use_threads
from benchmarks.trace import azure_jobs, spread
from ridgeline import LLM
from ridgeline.core.step import StepRecord
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
        options.seats, options.max_model_len = 4, 256
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=3)
    result.add_argument("--requests", type=int, default=300)
    result.add_argument("--scale", type=int, default=4, help="the trace's lengths are divided by this")
    result.add_argument("--load", type=float, default=0.7, help="arrivals as a share of the closed loop's rate")
    result.add_argument("--seats", type=int, default=64, help="requests in a step at most, and in the closed loop")
    result.add_argument("--max-model-len", type=int, help="longest sequence; the model's own if left out")
    result.add_argument("--card", type=Path, help="a card to predict by; if it is not there, it is made and kept there")
    result.add_argument("--most-rounds", type=int, default=12, help="rounds at most, while they do not agree")
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
class Round:
    """Arrivals served for real and simulated. factor: how much slower the machine was than its card."""

    real: Run
    simulated: Run
    factor: float

    @property
    def errors(self) -> dict[str, float]:
        """By the names of TOLERANCES, simulated over real, less one."""
        real = figures(self.real.report)
        return {name: value / real[name] - 1 for name, value in figures(self.simulated.report).items()}


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    record = Record("simulate-cpu", options)
    jobs = [Job(one.prompt_tokens, one.output_tokens) for one in azure_jobs(options.requests, options.scale)]
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_seqs": options.seats}
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
            "max_num_seqs": options.seats,
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


def closed_loop_rate(llm: LLM, jobs: Sequence[Job], seats: int, record: Record) -> float:
    """Requests a second with always `seats` of them in the engine."""
    served = drive(llm.built.engine, jobs, llm.built.spec.vocabulary, seed=7, concurrency=seats)
    record.observe("closed loop")
    return report(served).request_rate


def simulated_run(llm: LLM, jobs: Sequence[Job], card: Card, factor: float = 1.0, seats: int | None = None) -> Run:
    """On a machine so much slower than its card; seats: a closed loop."""
    steps = Carded(card)
    found = simulate(
        jobs,
        setting_of(llm.built),
        lambda spans, rows: factor * steps.device_s(spans, rows),
        lambda plan: factor * steps.host_s(plan),
        concurrency=seats,
        keep_steps=True,
    )
    return Run(found.served, found.steps, found.report)


def compared(llm: LLM, jobs: Sequence[Job], card: Card, options: argparse.Namespace, record: Record) -> list[Round]:
    """Rounds on the wall's clock and simulated, until the last ones agree, or as many as may be."""
    said = simulated_run(llm, jobs, card, seats=options.seats).report.request_rate
    before = closed_loop_rate(llm, jobs, options.seats, record)
    first, closed = before, [before]
    rounds: list[Round] = []
    while True:
        span = len(jobs) / (options.load * before)
        arriving = [
            Job(one.prompt_tokens, one.output_tokens, one.arrival_s)
            for one in spread(azure_jobs(options.requests, options.scale), span)
        ]
        real = served_run(llm, arriving, len(rounds))
        record.observe(f"round {len(rounds) + 1}")
        behind = closed_loop_rate(llm, jobs, options.seats, record)
        closed.append(behind)
        factor = said / statistics.geometric_mean([before, behind])
        rounds.append(Round(real, simulated_run(llm, arriving, card, factor), factor))
        if len(rounds) == 1:
            slower(llm, arriving, card, factor, options.slower, record)
        before = behind
        if len(rounds) < options.rounds:
            continue
        if steady(rounds[-options.rounds :]) or len(rounds) >= max(options.most_rounds, options.rounds):
            break
    record.summary["closed loops, requests/s"] = {"simulated": said, "real": closed}
    error = said / first - 1
    record.target("simulated closed loop against the first real one", "recorded", f"{error:+.1%}", None)
    return rounds


def served_run(llm: LLM, arriving: Sequence[Job], number: int) -> Run:
    steps: list[StepRecord] = []
    llm.built.engine.listeners.append(steps.append)
    try:
        served = drive(llm.built.engine, arriving, llm.built.spec.vocabulary, seed=1000 + number)
    finally:
        llm.built.engine.listeners.remove(steps.append)
    return Run(served, steps, report(served))


def slower(
    llm: LLM, arriving: Sequence[Job], card: Card, factor: float, factors: Sequence[float], record: Record
) -> None:
    """How steep the figures are: the same arrivals on machines a little slower or faster."""
    middle = figures(simulated_run(llm, arriving, card, factor).report)
    cells = {}
    for one in factors:
        found = figures(simulated_run(llm, arriving, card, factor * one).report)
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


def steady(rounds: Sequence[Round]) -> bool:
    """Whether rounds differ, at equal speed, by no more than half of what the simulation may be off."""
    return all(apart(rounds, name) <= limit / 2 for name, limit in TOLERANCES.items())


def apart(rounds: Sequence[Round], name: str) -> float:
    found = [done.errors[name] for done in rounds]
    return max(found) - min(found)


def verdict(errors: Sequence[float], limit: float, agree: bool) -> bool | None:
    """Whether the median error is within the limit. None where rounds do not agree and its interval says either."""
    middle, low, high = interval(errors)
    if agree:
        return abs(middle) <= limit
    if -limit <= low <= high <= limit:
        return True
    return False if low > limit or high < -limit else None


def compare(record: Record, rounds: Sequence[Round], last: int) -> None:
    agree = steady(rounds[-last:])
    judged = rounds[-last:] if agree else rounds
    rows, cells = [], {}
    for name, limit in TOLERANCES.items():
        errors = [done.errors[name] for done in judged]
        middle, low, high = interval(errors)
        met = verdict(errors, limit, agree)
        real = statistics.median(figures(done.real.report)[name] for done in judged)
        mine = statistics.median(figures(done.simulated.report)[name] for done in judged)
        form, scale = ("{:,.0f}", 1.0) if name.startswith("output") else ("{:.2f} ms", 1e3)
        shown = [form.format(one * scale) for one in (mine, real)]
        every = [{"simulated": figures(one.simulated.report)[name], "real": figures(one.real.report)[name]}
                 for one in rounds]  # fmt: skip
        cells[name] = {"rounds": every, "error": [middle, low, high], "apart": apart(rounds[-last:], name)}
        said = f"{middle:+.1%} [{low:+.1%}, {high:+.1%}]"
        rows.append([name, *shown, losing(said, met is False), f"{limit:.0%}", f"{apart(rounds[-last:], name):.1%}"])
        record.target(f"simulated {name} against real", f"within {limit:.0%}", said, met)
    record.summary["simulated against real"] = cells
    record.summary["slower than the card, by round"] = [done.factor for done in rounds]
    record.summary["simulated"] = [done.simulated.report.as_dict() for done in rounds]
    record.summary["real"] = [done.real.report.as_dict() for done in rounds]
    record.table(
        f"{len(rounds[0].simulated.served)} requests: simulated and real, medians of {len(judged)} rounds",
        ["", "simulated", "real", "error", "may be", f"last {last} apart"],
        rows,
    )
    if not agree:
        record.note(
            f"after {len(rounds)} rounds the last {last} still differ by more than half of a tolerance, so that the "
            "median of all rounds is judged by its interval"
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
