"""What users of a workload felt: TTFT, TPOT, ITL, E2E, throughput, goodput, each with its formula.

Knows times of tokens. It must not know engines. One vocabulary everywhere; the formulas are those of vLLM's
`bench serve`: TPOT leaves the first token out, ITL pools all gaps between tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ridgeline.core.errors import InvalidArgument

FORMULAS = {
    "ttft": "first token - arrival",
    "tpot": "(last token - first token) / (tokens - 1), requests of two tokens or more",
    "itl": "token - the token before it, all gaps of all requests",
    "e2e": "last token - arrival",
    "request_rate": "finished requests / (last token - first arrival)",
    "output_rate": "output tokens / (last token - first arrival)",
    "goodput": "requests a second that meet every objective",
}
SHARES = (0.5, 0.9, 0.99)


@dataclass(slots=True)
class Served:
    """One request as it happened: seconds on the driver's clock."""

    prompt_tokens: int
    arrival_s: float
    token_times_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.token_times_s[-1] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        count = len(self.token_times_s)
        return None if count < 2 else (self.token_times_s[-1] - self.token_times_s[0]) / (count - 1)


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in seconds: mean and quantiles."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        ordered = sorted(values)
        middle, high, last = (quantile(ordered, share) for share in SHARES)
        return cls(len(ordered), sum(ordered) / len(ordered), middle, high, last, ordered[-1])

    def as_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean_s": self.mean, "p50_s": self.p50, "p90_s": self.p90, "p99_s": self.p99,
                "max_s": self.most}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """One run of a workload."""

    requests: int
    failed: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    cached_tokens: int
    preemptions: int
    objectives: Mapping[str, float]
    met: int

    @property
    def request_rate(self) -> float:
        return (self.requests - self.failed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def output_rate(self) -> float:
        return self.output_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def goodput(self) -> float | None:
        """Requests a second within all objectives; None without any."""
        return self.met / self.seconds if self.objectives and self.seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        spreads = {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl, "e2e": self.e2e}
        return {
            "requests": self.requests,
            "failed": self.failed,
            "seconds": self.seconds,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
            "preemptions": self.preemptions,
            "request_rate_per_s": self.request_rate,
            "output_tokens_per_s": self.output_rate,
            **{name: None if one is None else one.as_dict() for name, one in spreads.items()},
            "objectives_s": dict(self.objectives),
            "goodput_per_s": self.goodput,
            "formulas": FORMULAS,
        }


def report(served: Sequence[Served], objectives: Mapping[str, float] | None = None) -> Report:
    """Figures of a run. objectives: seconds for ttft, tpot, e2e that a good request stays within."""
    objectives = dict(objectives or {})
    done = [one for one in served if one.error is None and one.token_times_s]
    ends = [one.token_times_s[-1] for one in done]
    begin = min((one.arrival_s for one in served), default=0.0)
    gaps = [b - a for one in done for a, b in zip(one.token_times_s, one.token_times_s[1:])]
    return Report(
        requests=len(served),
        failed=len(served) - len(done),
        seconds=max(ends, default=begin) - begin,
        prompt_tokens=sum(one.prompt_tokens for one in done),
        output_tokens=sum(len(one.token_times_s) for one in done),
        ttft=Spread.of([one.ttft_s for one in done]),
        tpot=Spread.of([value for one in done if (value := one.tpot_s) is not None]),
        itl=Spread.of(gaps),
        e2e=Spread.of([one.e2e_s for one in done]),
        cached_tokens=sum(one.cached_tokens for one in done),
        preemptions=sum(one.preemptions for one in done),
        objectives=objectives,
        met=sum(_meets(one, objectives) for one in done),
    )


def _meets(one: Served, objectives: Mapping[str, float]) -> bool:
    measured = {"ttft": one.ttft_s, "tpot": one.tpot_s or 0.0, "e2e": one.e2e_s}
    return all(measured[name] <= limit for name, limit in objectives.items())


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of sorted values lie, interpolated."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


UNITS = {"ms": 1e-3, "s": 1.0, "us": 1e-6}


def objectives_named(text: str) -> dict[str, float]:
    """ "ttft=500ms,tpot=50ms" in seconds. InvalidArgument for an unknown name or a time that is none."""
    result: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in ("ttft", "tpot", "e2e"):
            raise InvalidArgument("slo", f"{part.strip()!r} is none of ttft=TIME, tpot=TIME, e2e=TIME")
        unit = next((one for one in ("ms", "us", "s") if value.endswith(one)), None)
        try:
            number = float(value.removesuffix(unit or ""))
        except ValueError:
            number = -1.0
        if unit is None or not number > 0:
            raise InvalidArgument("slo", f"{name}={value} must be a time above 0, such as {name}=50ms")
        result[name] = number * UNITS[unit]
    return result
