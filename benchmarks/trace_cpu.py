"""Requests of unequal length on a CPU: ridgeline beside Transformers' padded batch, policies beside each other.

Part one. 32 requests with lengths of the Azure conversation trace, all there at the start: `LLM.generate`
beside `generate` on one left-padded batch, which runs until its longest output. Beside it stands the best
that batches sorted by length (down to single requests) can do for Transformers; it is told the output
lengths, which a server never knows. Both sides are judged by the tokens that were asked for.

Part two. The same trace under static batching, iteration-level scheduling of whole prompts (Orca, Yu et
al., OSDI 2022) and chunked prefill (Sarathi, Agrawal et al., 2308.16369): all at once, and with the
trace's arrivals stretched to a share of what chunked prefill manages. "static 8" collects 8 requests and
prefills them in one step; "Orca-style" takes whole prompts while 2,048 tokens last; "chunked 512" is the
default, "chunked 128" trades throughput for shorter stalls. A stall is the gap between a request's tokens.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.models import Reference, checkpoint, vocabulary_of
from benchmarks.record import (
    Record,
    alternate,
    interval,
    losing,
    parser,
    progress,
    quantile,
    ratios,
    seconds,
    use_threads,
)
from benchmarks.trace import Job, azure_jobs, prompts_for, spread
from ridgeline import LLM, SamplingParams

TARGET = 3.0
GROUPS = (16, 8, 4, 2, 1)
RUNS = itertools.count()
"""Request ids are never used twice, as in a server."""


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.requests, options.scale, options.rounds, options.seats = 6, 32, 2, 3
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "")
    result.add_argument("--requests", type=int, default=32)
    result.add_argument("--scale", type=int, default=4, help="the trace's lengths are divided by this")
    result.add_argument("--seats", type=int, default=8, help="size of a static batch (the others admit as many as fit)")
    result.add_argument("--load", type=float, default=0.8, help="arrivals in part two, as a share of the offline rate")
    result.add_argument("--part", choices=("padded", "policies", "both"), default="both")
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    record = Record("trace-cpu", options)
    jobs = azure_jobs(options.requests, options.scale)
    record.settings = {
        "model": what,
        "dtype": "float32",
        "threads": options.threads,
        "rounds": options.rounds,
        "prompt_tokens": [job.prompt_tokens for job in jobs],
        "output_tokens": [job.output_tokens for job in jobs],
        "transformers": "sdpa, DynamicCache, inference_mode, greedy, left-padded with attention_mask",
        "prompts": "random ids, fresh in each round, the same for all sides; prefix caching is on and finds nothing",
    }
    if options.part in ("padded", "both"):
        against_padded(record, folder, what, jobs)
    if options.part in ("policies", "both"):
        policies(record, folder, what, jobs)
    return record


# Part one: beside padded batches


def params_of(job: Job) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=job.output_tokens, ignore_eos=True, detokenize=False)


def against_padded(record: Record, folder: Any, what: str, jobs: Sequence[Job]) -> None:
    options, vocabulary = record.options, vocabulary_of(folder)
    reference = Reference(folder, torch.float32)
    outputs = [job.output_tokens for job in jobs]
    params = [params_of(job) for job in jobs]
    order, size, tried = best_groups(reference, jobs, vocabulary)
    record.timings["sorted batches tried, seconds"] = tried
    with LLM(folder, dtype="float32", device="cpu", enable_prefix_caching=False) as llm:

        def ours(number: int) -> tuple[float, list[list[int]]]:
            prompts = prompts_for(jobs, vocabulary, number)
            start = time.perf_counter()
            done = llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
            return time.perf_counter() - start, [one.outputs[0].token_ids for one in done]

        def padded(number: int) -> tuple[float, list[list[int]]]:
            prompts = prompts_for(jobs, vocabulary, number)
            start = time.perf_counter()
            rows = reference.generate_padded(prompts, outputs)
            return time.perf_counter() - start, rows

        def grouped(number: int) -> tuple[float, list[list[int]]]:
            prompts = prompts_for(jobs, vocabulary, number)
            start = time.perf_counter()
            rows = reference.generate_grouped(prompts, outputs, order, size)
            return time.perf_counter() - start, rows

        results = alternate({"ridgeline": ours, "padded": padded, "sorted": grouped}, options.rounds)
    record.observe("padded batches")
    times = {name: [one for one, _ in runs] for name, runs in results.items()}
    record.timings["all at once, seconds"] = {name: seconds(values) for name, values in times.items()}
    total = sum(outputs)
    agree = [
        a == b
        for (_, ours_), (_, theirs) in zip(results["ridgeline"], results["sorted"])
        for a, b in zip(ours_, theirs)
    ]
    against = ratios(times["padded"], times["ridgeline"])
    against_sorted = ratios(times["sorted"], times["ridgeline"])
    record.summary["against padded batches"] = {
        "useful_tokens": total,
        "tokens_per_s": {name: interval([total / one for one in values]) for name, values in times.items()},
        "against_padded": against,
        "against_sorted": against_sorted,
        "sorted_batches_of": size,
        "same_outputs_as_sorted": sum(agree) / len(agree),
    }
    rows = []
    for name, values in times.items():
        label = {
            "padded": f"generate, one padded batch of {len(jobs)}",
            "sorted": f"generate, sorted batches of {size}",
        }
        compared = ratios(values, times["ridgeline"])
        wanted = {"padded": TARGET, "sorted": 1.0}.get(name, 0.0)
        rows.append(
            [
                label.get(name, name),
                interval(values).show(unit=" s"),
                interval([total / one for one in values]).show(".0f"),
                losing(compared.show(unit="×"), compared.median < wanted),
            ]
        )
    prompt_total = sum(job.prompt_tokens for job in jobs)
    record.table(
        f"{len(jobs)} requests, {prompt_total} prompt and {total} output tokens, fp32, "
        f"{options.threads} threads, {what}",
        ["", "time", "useful tok/s", "time ÷ ridgeline"],
        rows,
    )
    record.target(
        f"{len(jobs)} trace requests against padded-batch generate",
        f"≥ {TARGET:.0f}×",
        against.show(unit="×"),
        against.median >= TARGET,
    )
    record.note(
        f"batches of {size} sorted by output length, known in advance, are Transformers' best here: "
        f"ridgeline is {against_sorted.show(unit='×')} as fast as those"
    )


def best_groups(reference: Reference, jobs: Sequence[Job], vocabulary: int) -> tuple[list[int], int, dict[str, float]]:
    """The order and batch size with which Transformers is fastest: each tried once, the two best once more."""
    prompts = prompts_for(jobs, vocabulary, -100)
    outputs = [job.output_tokens for job in jobs]
    places = range(len(jobs))
    orders = {
        "output": sorted(places, key=lambda one: (jobs[one].output_tokens, jobs[one].prompt_tokens)),
        "prompt": sorted(places, key=lambda one: (jobs[one].prompt_tokens, jobs[one].output_tokens)),
    }
    ways = {
        f"by {name}, {size}": (order, size)
        for name, order in orders.items()
        for size in GROUPS
        if size < len(jobs) or size == min(GROUPS)
    }
    tried: dict[str, float] = {}
    bar = progress(len(ways) + 2)

    def attempt(name: str) -> None:
        bar.set_postfix_str(f"sorted batches {name}")
        start = time.perf_counter()
        reference.generate_grouped(prompts, outputs, *ways[name])
        tried[name] = min(time.perf_counter() - start, tried.get(name, float("inf")))
        bar.update(1)

    for name in ways:
        attempt(name)
    for name in sorted(ways, key=tried.__getitem__)[:2]:
        attempt(name)
    bar.close()
    order, size = ways[min(ways, key=tried.__getitem__)]
    return order, size, {name: round(took, 6) for name, took in tried.items()}


# Part two: policies beside each other


@dataclass(frozen=True)
class Replay:
    """When each request arrived and each of its tokens came, in seconds from the start."""

    arrivals: list[float]
    stamps: list[list[float]]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.stamps)) / (max(one[-1] for one in self.stamps) - min(self.arrivals))

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive tokens of a request, over all requests."""
        return [later - earlier for one in self.stamps for earlier, later in itertools.pairwise(one)]

    @property
    def first_tokens(self) -> list[float]:
        return [one[0] - arrival for one, arrival in zip(self.stamps, self.arrivals)]


def replay(llm: LLM, prompts: Sequence[Sequence[int]], jobs: Sequence[Job]) -> Replay:
    """Drive the engine step by step, adding each request when its time has come."""
    engine, scheduler = llm.built.engine, llm.built.engine.scheduler
    run = next(RUNS)
    waiting = []
    for place, (prompt, job) in enumerate(zip(prompts, jobs)):
        _, requests = llm.intake.requests(f"{run}-{place}", {"prompt_token_ids": list(prompt)}, params_of(job))
        waiting.append((job.arrival_s, requests[0]))
    stamps: dict[str, list[float]] = {request.request_id: [] for _, request in waiting}
    start, come = time.perf_counter(), 0
    while come < len(waiting) or engine.has_work:
        now = time.perf_counter() - start
        while come < len(waiting) and waiting[come][0] <= now:
            engine.add(waiting[come][1])
            come += 1
        scheduler.more_to_come = come < len(waiting)
        events = engine.step()
        now = time.perf_counter() - start
        for event in events:
            if event.token is not None:
                stamps[event.request.request_id].append(now)
        if not events and not scheduler.running and come < len(waiting):
            time.sleep(max(waiting[come][0] - now, 0.0))
    return Replay([arrival for arrival, _ in waiting], list(stamps.values()))


def policies(record: Record, folder: Any, what: str, jobs: Sequence[Job]) -> None:
    options, vocabulary = record.options, vocabulary_of(folder)
    longest = max(job.prompt_tokens for job in jobs)
    settings: dict[str, dict[str, Any]] = {
        f"static {options.seats}": {
            "scheduling_policy": "static",
            "max_num_seqs": options.seats,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(options.seats * longest, 2048),
        },
        "Orca-style": {"enable_chunked_prefill": False},
        "chunked 512": {"max_num_batched_tokens": 512},
        "chunked 128": {"max_num_batched_tokens": 128},
    }
    record.settings["policies"] = settings
    chunked = "chunked 512"
    engines = {
        name: LLM(folder, dtype="float32", device="cpu", enable_prefix_caching=False, **extra)
        for name, extra in settings.items()
    }
    try:
        run_policies(record, engines, jobs, vocabulary, chunked, what)
    finally:
        for llm in engines.values():
            llm.close()


def run_policies(
    record: Record, engines: dict[str, LLM], jobs: Sequence[Job], vocabulary: int, chunked: str, what: str
) -> None:
    options = record.options
    at_once = spread(jobs, 0.0)
    offline = alternate(arms(engines, at_once, vocabulary), options.rounds)
    report(record, "all at once", offline, chunked, what)
    capacity = interval([sum(job.output_tokens for job in jobs) / run.tokens_per_s for run in offline[chunked]]).median
    span = capacity / options.load
    arriving = spread(jobs, span)
    online = alternate(arms(engines, arriving, vocabulary), options.rounds)
    title = f"arrivals of the trace over {span:.2f} s ({100 * options.load:.0f} % of the offline rate)"
    record.settings["arrivals_s"] = seconds(job.arrival_s for job in arriving)
    report(record, title, online, chunked, what)
    cell = record.summary[title]
    names = list(engines)
    shown = "; ".join(
        f"{name}: {cell[name]['tokens_per_s'].show('.0f', ' tok/s')}, stall "
        f"{cell[name]['longest_stall_s'].show('.0f', ' ms', 1e3)}, ITL p99 "
        f"{cell[name]['itl_p99_s'].show('.1f', ' ms', 1e3)}"
        for name in names[:3]
    )
    record.target("static, Orca-style and chunked: throughput, longest stall, ITL p99", "recorded", shown, None)


def arms(engines: dict[str, LLM], jobs: Sequence[Job], vocabulary: int) -> dict[str, Any]:
    def arm(llm: LLM) -> Any:
        return lambda number: replay(llm, prompts_for(jobs, vocabulary, 5000 + number), jobs)

    return {name: arm(llm) for name, llm in engines.items()}


def report(record: Record, title: str, results: dict[str, list[Replay]], chunked: str, what: str) -> None:
    """Medians over the rounds of each round's own figure."""
    record.observe(title)
    cells: dict[str, Any] = {}
    rows = []
    for name, runs in results.items():
        cells[name] = {
            "tokens_per_s": interval([run.tokens_per_s for run in runs]),
            "longest_stall_s": interval([max(run.gaps) for run in runs]),
            "itl_p50_s": interval([quantile(run.gaps, 0.5) for run in runs]),
            "itl_p99_s": interval([quantile(run.gaps, 0.99) for run in runs]),
            "ttft_p50_s": interval([quantile(run.first_tokens, 0.5) for run in runs]),
            "ttft_p99_s": interval([quantile(run.first_tokens, 0.99) for run in runs]),
        }
    best = cells[chunked]
    for name, cell in cells.items():
        row = [name, losing(cell["tokens_per_s"].show(".0f"), cell["tokens_per_s"].median < best["tokens_per_s"].low)]
        for key in ("longest_stall_s", "itl_p50_s", "itl_p99_s", "ttft_p50_s", "ttft_p99_s"):
            row.append(losing(cell[key].show(".1f", scale=1e3), cell[key].median > best[key].high))
        rows.append(row)
    columns = ["", "tok/s", "longest stall ms", "ITL p50 ms", "ITL p99 ms", "TTFT p50 ms", "TTFT p99 ms"]
    record.table(f"Policies, {title}, fp32, {what} (! : beyond the interval of {chunked})", columns, rows)
    record.summary[title] = cells
    record.timings[title] = {
        name: [{"stamps_s": [seconds(one) for one in run.stamps]} for run in runs] for name, runs in results.items()
    }


if __name__ == "__main__":
    main()
