"""Requests with the lengths and arrivals of the Azure conversation trace, scaled to a small context.

Knows the trace's file and the scaling. It must not know engines.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

DATA = Path(__file__).parent / "data"
PROMPT_LIMITS = (8, 1536)
OUTPUT_LIMITS = (4, 384)


@dataclass(frozen=True)
class Job:
    """One request: tokens in, tokens out, seconds after the first arrival."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float


def azure_jobs(count: int, scale: int = 4, first: int = 0) -> list[Job]:
    """`count` requests from row `first` on: lengths / scale, clipped to the limits above."""
    with (DATA / "azure_conv_lengths.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[first : first + count]
    if len(rows) < count:
        raise ValueError(f"the trace here has {first + len(rows)} rows, {first + count} were asked for")
    start = _time(rows[0]["TIMESTAMP"])
    return [
        Job(
            _clip(int(row["ContextTokens"]) // scale, PROMPT_LIMITS),
            _clip(int(row["GeneratedTokens"]) // scale, OUTPUT_LIMITS),
            (_time(row["TIMESTAMP"]) - start).total_seconds(),
        )
        for row in rows
    ]


def spread(jobs: Sequence[Job], span_s: float) -> list[Job]:
    """The same requests with arrivals stretched or shrunk to `span_s` in all (0: all at once)."""
    last = jobs[-1].arrival_s or 1.0
    return [Job(one.prompt_tokens, one.output_tokens, one.arrival_s * span_s / last) for one in jobs]


def prompts_for(jobs: Sequence[Job], vocabulary: int, seed: int) -> list[list[int]]:
    """A random prompt for each job; another seed shares no prefix worth caching."""
    draw = random.Random(f"prompts {seed}")
    return [[draw.randrange(vocabulary) for _ in range(one.prompt_tokens)] for one in jobs]


def _clip(value: int, limits: tuple[int, int]) -> int:
    return min(max(value, limits[0]), limits[1])


def _time(stamp: str) -> datetime:
    """The file gives 100 ns digits; datetime reads microseconds."""
    return datetime.fromisoformat(stamp[:26])
