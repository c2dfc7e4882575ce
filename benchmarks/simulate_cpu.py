"""Requests of the Azure conversation trace, simulated and served: how far apart are the two?

The embedded model's steps are calibrated (or a card is given). A closed loop over the trace's requests tells what the
machine serves at most; then the trace's own arrivals, stretched to a share of that, are served for real `--rounds`
times and simulated once, on the same scheduler with the same settings. The real side is the median of its last rounds;
rounds are added while they differ among each other by more than half of what the simulation may be off, because then
the machine and not the simulation is what is seen. Every step's prediction stands beside its time as well.
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
from benchmarks.record import Record, losing, parser, seconds, use_threads
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
    result.add_argument("--most-rounds", type=int, default=9, help="rounds at most, while they do not agree")
    result.add_argument("--only-card", action="store_true", help="calibrate, write the card and stop")
    return result


@dataclass(frozen=True)
class Run:
    """One real run: what users felt, and every step."""

    served: list[Served]
    steps: list[StepRecord]
    report: Report


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
        rate = closed_loop_rate(llm, jobs, options.seats, record)
        span = len(jobs) / (options.load * rate)
        arriving = [
            Job(one.prompt_tokens, one.output_tokens, one.arrival_s)
            for one in spread(azure_jobs(options.requests, options.scale), span)
        ]
        record.settings = {
            "model": what,
            "dtype": "float32",
            "threads": options.threads,
            "requests": len(jobs),
            "prompt_tokens": sum(one.prompt_tokens for one in jobs),
            "output_tokens": sum(one.output_tokens for one in jobs),
            "max_num_seqs": options.seats,
            "closed_loop_requests_per_s": rate,
            "load": options.load,
            "arrivals_over_s": span,
            "card_sha256": card.sha256,
        }
        simulated = simulated_run(llm, arriving, card)
        record.observe("simulated")
        runs = served_runs(llm, arriving, options, record)
    compare(record, simulated, runs, options.rounds)
    steps_beside(record, card, [one for run in runs for one in run.steps])
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
    found = report(served)
    record.observe("closed loop")
    record.summary["closed loop"] = found.as_dict()
    return found.request_rate


def simulated_run(llm: LLM, jobs: Sequence[Job], card: Card) -> Run:
    steps = Carded(card)
    found = simulate(jobs, setting_of(llm.built), steps.device_s, steps.host_s, keep_steps=True)
    return Run(found.served, found.steps, found.report)


def served_runs(llm: LLM, jobs: Sequence[Job], options: argparse.Namespace, record: Record) -> list[Run]:
    """Rounds on the wall's clock until the last ones agree, or as many as may be."""
    runs: list[Run] = []
    while True:
        steps: list[StepRecord] = []
        llm.built.engine.listeners.append(steps.append)
        try:
            served = drive(llm.built.engine, jobs, llm.built.spec.vocabulary, seed=1000 + len(runs))
        finally:
            llm.built.engine.listeners.remove(steps.append)
        runs.append(Run(served, steps, report(served)))
        record.observe(f"round {len(runs)}")
        if len(runs) < options.rounds:
            continue
        if steady(runs[-options.rounds :]) or len(runs) >= max(options.most_rounds, options.rounds):
            return runs


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


def steady(runs: Sequence[Run]) -> bool:
    """Whether rounds differ by no more than half of what the simulation may be off."""
    return all(apart(runs, name) <= limit / 2 for name, limit in TOLERANCES.items())


def apart(runs: Sequence[Run], name: str) -> float:
    values = [figures(run.report)[name] for run in runs]
    return (max(values) - min(values)) / statistics.median(values)


def compare(record: Record, simulated: Run, runs: Sequence[Run], rounds: int) -> None:
    last = runs[-rounds:]
    mine = figures(simulated.report)
    rows, cells = [], {}
    for name, limit in TOLERANCES.items():
        values = [figures(run.report)[name] for run in last]
        real = statistics.median(values)
        error = mine[name] / real - 1
        form, scale = ("{:,.0f}", 1.0) if name.startswith("output") else ("{:.2f} ms", 1e3)
        shown = [form.format(one * scale) for one in (mine[name], real)]
        met, between = abs(error) <= limit, apart(last, name)
        cells[name] = {"simulated": mine[name], "real": real, "rounds": values, "error": error, "apart": between}
        rows.append([name, *shown, losing(f"{error:+.1%}", not met), f"{limit:.0%}", f"{between:.1%}"])
        verdict = met if steady(last) else None  # rounds that differ by more than that judge nothing
        record.target(f"simulated {name} against real", f"within {limit:.0%}", f"{error:+.1%}", verdict)
    record.summary["simulated against real"] = cells
    record.summary["simulated"] = simulated.report.as_dict()
    record.summary["real"] = [run.report.as_dict() for run in runs]
    record.table(
        f"{len(simulated.served)} requests: simulated, and the median of {len(last)} real rounds",
        ["", "simulated", "real", "error", "may be", "rounds apart"],
        rows,
    )
    if not steady(last):
        record.note(
            f"after {len(runs)} rounds the last {len(last)} still differ by more than half of a tolerance: other work "
            "on this machine is seen here, and the lines say little"
        )
    record.timings["rounds, the simulated one first"] = [
        {
            "first_token_s": seconds(one.ttft_s for one in run.served),
            "tpot_s": seconds(one.tpot_s or 0.0 for one in run.served),
        }
        for run in [simulated, *runs]
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
