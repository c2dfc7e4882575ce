"""When requests arrive and how long they are: drawn from a process, or replayed from a trace.

Knows trace formats and random processes. It must not know engines, tokens' values or clocks.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from ridgeline.core.errors import InvalidArgument

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one of a Mooncake row's hash_ids stands for."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request: tokens in, tokens out, seconds after the start.

    prefix: names of the prompt's leading blocks of MOONCAKE_BLOCK_TOKENS tokens; equal names, equal tokens.
    """

    prompt_tokens: int
    output_tokens: int
    arrival_s: float = 0.0
    prefix: tuple[int, ...] = ()


def poisson(jobs: Sequence[Job], rate_per_s: float, seed: int = 0) -> list[Job]:
    """The same lengths, arriving independently of each other at a mean rate."""
    return gamma(jobs, rate_per_s, 1.0, seed)


def gamma(jobs: Sequence[Job], rate_per_s: float, burstiness: float, seed: int = 0) -> list[Job]:
    """Gaps from a gamma distribution of mean 1 / rate: burstiness 1 is Poisson, below 1 comes in bursts.

    (vLLM's `--burstiness`; the gaps' coefficient of variation is burstiness ** -0.5.)
    """
    if not rate_per_s > 0:
        raise InvalidArgument("request_rate", f"must be above 0, not {rate_per_s}")
    if not burstiness > 0:
        raise InvalidArgument("burstiness", f"must be above 0, not {burstiness}")
    draw = random.Random(f"arrivals {seed}")
    now, result = 0.0, []
    for job in jobs:
        result.append(replace(job, arrival_s=now))
        now += draw.gammavariate(burstiness, 1 / (rate_per_s * burstiness))
    return result


def at_once(jobs: Sequence[Job]) -> list[Job]:
    """All at the start: offline throughput, and what a closed loop draws from."""
    return [replace(job, arrival_s=0.0) for job in jobs]


def stretched(jobs: Sequence[Job], factor: float) -> list[Job]:
    """The same arrivals, slower by `factor`."""
    return [replace(job, arrival_s=job.arrival_s * factor) for job in jobs]


def scaled(jobs: Sequence[Job], scale: float, prompt: tuple[int, int], output: tuple[int, int]) -> list[Job]:
    """Lengths divided by `scale` and clipped to (least, most): a long trace for a small context.

    Shared prefixes keep their names only if lengths keep theirs (scale 1): a cut block is another block.
    """
    return [
        replace(
            job,
            prompt_tokens=_clip(int(job.prompt_tokens / scale), prompt),
            output_tokens=_clip(int(job.output_tokens / scale), output),
            prefix=job.prefix if scale == 1 else (),
        )
        for job in jobs
    ]


def equal(count: int, prompt_tokens: int, output_tokens: int) -> list[Job]:
    """`count` requests of one size."""
    return [Job(prompt_tokens, output_tokens) for _ in range(count)]


def replay(path: Path, count: int | None = None) -> list[Job]:
    """A trace by its form: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's JSON lines.

    Arrivals count from the first. Raises InvalidArgument naming file and line of what cannot be read.
    """
    if not path.is_file():
        raise InvalidArgument("trace", f"{path} is not a file")
    rows = _mooncake(path) if path.suffix == ".jsonl" else _azure(path)
    jobs: list[Job] = []
    for job in rows:
        if count is not None and len(jobs) == count:
            break
        jobs.append(job)
    if not jobs or (count is not None and len(jobs) < count):
        raise InvalidArgument("trace", f"{path} has {len(jobs)} requests, {count or 'at least one'} were asked for")
    start = jobs[0].arrival_s
    return [replace(job, arrival_s=job.arrival_s - start) for job in jobs]


def _azure(path: Path) -> Iterator[Job]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                # The file gives 100 ns digits; datetime reads microseconds.
                arrival = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                yield Job(int(row["ContextTokens"]), int(row["GeneratedTokens"]), arrival)
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidArgument("trace", f"{path}, line {number}: {_words(error)}") from None


def _mooncake(path: Path) -> Iterator[Job]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                yield Job(
                    int(row["input_length"]),
                    int(row["output_length"]),
                    float(row["timestamp"]) / 1000,
                    tuple(int(one) for one in row.get("hash_ids", ())),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidArgument("trace", f"{path}, line {number}: {_words(error)}") from None


def prompt_ids(job: Job, number: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random token ids of the job's length; blocks of the same name are the same tokens in every prompt."""
    result: list[int] = []
    for name in job.prefix:
        draw = random.Random(f"block {seed} {name}")
        result.extend(draw.choices(range(vocabulary), k=MOONCAKE_BLOCK_TOKENS))
    draw = random.Random(f"prompt {seed} {number}")
    missing = job.prompt_tokens - len(result)
    if missing > 0:
        result.extend(draw.choices(range(vocabulary), k=missing))
    return result[: job.prompt_tokens]


def _clip(value: int, limits: tuple[int, int]) -> int:
    return min(max(value, limits[0]), limits[1])


def _words(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)
