"""What the KV cache buys, and what paging it wastes.

Time a token and memory against length, with the cache and without it (every token computes all others
again). Then, on 256 requests of the Azure conversation trace, under the real scheduler and the real block
tables but no model (bytes need no arithmetic): bytes in partly filled blocks, beside contiguous
reservation of the context's maximum for each request, as in Kwon et al. (2309.06180).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.decode_cpu import stream
from benchmarks.models import checkpoint, vocabulary_of
from benchmarks.record import Record, alternate, interval, losing, parser, ratios, seconds, use_threads
from benchmarks.trace import Job, azure_jobs
from ridgeline import LLM, SamplingParams
from ridgeline.core.request import Request
from ridgeline.core.step import Spans, StepPlan, StepResult, TokenScore
from ridgeline.engine.memory import LiveBytes
from ridgeline.kv.cache import KVCache
from ridgeline.kv.layout import KVLayout
from ridgeline.models import parse_config
from ridgeline.models.spec import read_config
from ridgeline.ops import Ops
from ridgeline.schedule import Scheduler, make_policy

BLOCK_SIZES = (16, 32, 64, 128, 256)
DEFAULT_BLOCK = 64


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.lengths, options.new, options.rounds, options.requests = [16, 64], 3, 2, 24
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "")
    result.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 1536, 1920])
    result.add_argument("--new", type=int, default=8, help="tokens after the first to time at each length")
    result.add_argument("--requests", type=int, default=256, help="of the trace, for the bytes that paging wastes")
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    record = Record("kv-cache", options)
    record.settings = {
        "model": what,
        "dtype": "float32",
        "threads": options.threads,
        "lengths": options.lengths,
        "new_tokens": options.new,
        "rounds": options.rounds,
    }
    with_and_without(record, folder, what)
    paging(record, folder)
    return record


# With and without the cache


def with_and_without(record: Record, folder: Path, what: str) -> None:
    options, vocabulary = record.options, vocabulary_of(folder)
    rows = []
    with (
        LLM(folder, dtype="float32", device="cpu") as cached,
        LLM(folder, dtype="float32", device="cpu", kv_cache=False) as bare,
    ):
        per_token = KVLayout(*kv_shape(folder), 4).bytes_per_token
        for length in options.lengths:

            def prompt(number: int, length: int = length) -> list[int]:
                draw = random.Random(1000 * length + number)
                return [draw.randrange(vocabulary) for _ in range(length)]

            results = alternate(
                {
                    "with": lambda number: stream(cached, prompt(number), options.new + 1),
                    "without": lambda number: stream(bare, prompt(number), options.new + 1),
                },
                options.rounds,
            )
            record.observe(f"length {length}")
            times = {name: [one.decode_s for one in runs] for name, runs in results.items()}
            assert [one.ids for one in results["with"]] == [one.ids for one in results["without"]], "tokens differ"
            gain = ratios(times["without"], times["with"])
            visible = length + options.new
            step = {"with": activation_bytes(cached, 1, visible), "without": activation_bytes(bare, visible, visible)}
            record.timings[f"length {length}"] = {
                name: [seconds(one.stamps) for one in runs] for name, runs in results.items()
            }
            record.summary[f"length {length}"] = {
                "seconds_a_token": {name: interval(values) for name, values in times.items()},
                "gain": gain,
                "kv_bytes_kept_between_steps": {"with": visible * per_token, "without": 0},
                "activation_bytes_of_a_step": step,
            }
            rows.append(
                [
                    str(length),
                    *(interval(times[name]).show(".2f", " ms", 1e3) for name in ("with", "without")),
                    losing(gain.show(".1f", "×"), gain.median < 1),
                    megabytes(visible * per_token),
                    megabytes(step["with"]),
                    megabytes(step["without"]),
                ]
            )
    record.table(
        f"Time a token and memory, with and without the KV cache, fp32, {options.threads} threads, {what}",
        ["length", "with", "without", "gain", "KV kept with", "activations with", "activations without"],
        rows,
    )
    first, last = (record.summary[f"length {options.lengths[place]}"]["gain"] for place in (0, -1))
    record.note(
        "without the cache nothing is kept between steps, but each step still writes its keys and values into the "
        "request's blocks while it runs; activations are the peak of live op outputs in one step, from meta tensors"
    )
    record.target(
        "time a token and memory against length, with and without the KV cache",
        "recorded",
        f"{first.show('.1f', '×')} at {options.lengths[0]} tokens, {last.show('.1f', '×')} at {options.lengths[-1]}",
        None,
    )


def kv_shape(folder: Path) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of a checkpoint."""
    spec = parse_config(read_config(folder), str(folder))
    return spec.layers, spec.kv_heads, spec.head_dim


def activation_bytes(llm: LLM, new: int, visible: int) -> int:
    """Peak of live op outputs in a step that computes `new` tokens of a request of `visible`."""
    live = LiveBytes()
    llm.built.price.trace(Spans((new,), (visible,)), 1, True, Ops({}, live))
    return live.peak_bytes


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


# What paging wastes


@dataclass(frozen=True)
class Waste:
    """Byte totals over all steps of a run, and at the step that held most; tokens are those with KV."""

    steps: int
    used: int
    held: int
    reserved_context: int
    reserved_request: int
    peak_held: int
    peak_used: int
    peak_requests: int

    @property
    def paged(self) -> float:
        """Share of the held bytes that hold nothing."""
        return 1 - self.used / self.held

    @property
    def contiguous(self) -> float:
        """The same if each running request reserved the whole context, as servers without paging do."""
        return 1 - self.used / self.reserved_context

    @property
    def exact(self) -> float:
        """The same if each reserved its prompt and its own limit of output tokens, were that known."""
        return 1 - self.used / self.reserved_request


def run_without_model(jobs: Sequence[Job], layout: KVLayout, context: int, seats: int, batched: int) -> Waste:
    """The scheduler and the block tables over all jobs at once; every sampled token is id 0."""
    blocks = 2 * seats * layout.blocks_for(context)
    cache = KVCache(block_size=layout.block_size, num_blocks=blocks, enable_prefix_caching=False)
    scheduler = Scheduler(cache, make_policy("fcfs"), seats, batched, context)
    limits = {}
    for place, job in enumerate(jobs):
        params = SamplingParams(temperature=0, max_tokens=job.output_tokens, ignore_eos=True)
        scheduler.add(Request(str(place), [1] * job.prompt_tokens, job.prompt_tokens, params, job.output_tokens))
        limits[str(place)] = job.prompt_tokens + job.output_tokens
    steps = used = held = reserved_context = reserved_request = 0
    peak = (0, 0, 0)
    while (plan := scheduler.plan(scheduler.choose())) is not None:
        visible = {request.request_id: request.computed for request in scheduler.running}
        visible.update((chunk.request_id, chunk.visible) for chunk in plan.chunks)
        names = list(visible)
        now_held = sum(len(cache.table(name)) for name in names) * layout.bytes_per_block
        now_used = sum(visible.values()) * layout.bytes_per_token
        steps, used, held = steps + 1, used + now_used, held + now_held
        reserved_context += len(names) * context * layout.bytes_per_token
        reserved_request += sum(limits[name] for name in names) * layout.bytes_per_token
        peak = max(peak, (now_held, now_used, len(names)))
        scheduler.commit(plan, pretend(plan))
    return Waste(steps, used, held, reserved_context, reserved_request, *peak)


def pretend(plan: StepPlan) -> StepResult:
    """A step's result without a model."""
    return StepResult({chunk.request_id: TokenScore(0) for chunk in plan.chunks if chunk.sampling is not None})


def paging(record: Record, folder: Path) -> None:
    options = record.options
    spec = parse_config(read_config(folder), str(folder))
    context = min(spec.max_positions, 2048)
    jobs = azure_jobs(options.requests, scale=16 if options.quick else 4)
    rows = []
    cells: dict[str, Any] = {}
    for size in BLOCK_SIZES:
        layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, 4, size)
        waste = run_without_model(jobs, layout, context, seats=32, batched=512)
        pool = 32 * context * layout.bytes_per_token
        mean_held = waste.held / waste.steps
        cells[f"block {size}"] = {
            "wasted_share": {"paged": waste.paged, "whole context": waste.contiguous, "own limit": waste.exact},
            "wasted_bytes_mean": {
                "paged": (waste.held - waste.used) / waste.steps,
                "whole context": (waste.reserved_context - waste.used) / waste.steps,
                "own limit": (waste.reserved_request - waste.used) / waste.steps,
            },
            "bytes_per_token": layout.bytes_per_token,
            "steps": waste.steps,
            "peak": {"held": waste.peak_held, "used": waste.peak_used, "requests": waste.peak_requests},
        }
        rows.append(
            [
                str(size),
                megabytes(waste.used / waste.steps),
                f"{megabytes((waste.held - waste.used) / waste.steps)} ({100 * waste.paged:.1f} %)",
                f"{megabytes((waste.reserved_context - waste.used) / waste.steps)} ({100 * waste.contiguous:.1f} %)",
                f"{megabytes((waste.reserved_request - waste.used) / waste.steps)} ({100 * waste.exact:.1f} %)",
                f"{pool / mean_held:.1f}×",
            ]
        )
    record.summary["paging"] = cells
    record.table(
        f"KV bytes, mean over all steps of {len(jobs)} trace requests, 32 at a time, context {context}, fp32",
        ["block", "used", "wasted by paging", "wasted by reserving the context", "by reserving its own limit", "room"],
        rows,
    )
    record.note("room: how many times as many requests fit in the bytes that 32 whole contexts would take")
    share = cells[f"block {DEFAULT_BLOCK}"]["wasted_share"]
    record.target(
        "KV bytes wasted by paging against contiguous reservation of the maximum",
        "recorded",
        f"{100 * share['paged']:.1f} % against {100 * share['whole context']:.1f} % (blocks of {DEFAULT_BLOCK})",
        None,
    )


if __name__ == "__main__":
    main()
