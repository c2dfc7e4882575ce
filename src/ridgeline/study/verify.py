"""A plan for objectives against a run: the same requests at the planned rate, served here and now.

Knows a driver, an engine and what a simulation has said. It must not know how either came about. Simulation and engine
have the same shape and the same arrivals; what differs is only whether time is real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ridgeline.engine.build import Built
from ridgeline.engine.virtual import Setting
from ridgeline.workload.arrivals import Job
from ridgeline.workload.drive import drive
from ridgeline.workload.measure import Report, Served, report

WARM_UP = 4
"""Requests that are served and forgotten first."""


def setting_of(built: Built) -> Setting:
    """An engine's shape, for its double in virtual time. Prompts are random, so no prefix is shared."""
    config = built.config
    return Setting(
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        scheduling_policy=config.scheduling_policy,
        vocabulary=built.spec.vocabulary,
    )


@dataclass(frozen=True)
class Verified:
    """What was planned and what was measured at one rate. Latencies in seconds."""

    planned: Report
    measured: Report
    served: tuple[Served, ...]

    @property
    def rows(self) -> list[tuple[str, float, float]]:
        """(figure, planned, measured): output tokens a second, latencies, the share within all objectives."""
        found = [("output tokens/s", self.planned.output_rate, self.measured.output_rate)]
        for name in ("ttft", "tpot", "e2e"):
            planned, measured = getattr(self.planned, name), getattr(self.measured, name)
            if planned is not None and measured is not None:
                found.append((f"{name} p50", planned.p50, measured.p50))
                found.append((f"{name} p99", planned.p99, measured.p99))
        met = [one.met / max(one.requests, 1) for one in (self.planned, self.measured)]
        return [*found, ("within objectives", met[0], met[1])]

    @property
    def holds(self) -> bool:
        """Whether at least as large a share of the real requests met the objectives as 0.99 of those planned."""
        return self.measured.met >= 0.99 * self.planned.met

    def as_dict(self) -> dict[str, Any]:
        return {
            "planned": self.planned.as_dict(),
            "measured": self.measured.as_dict(),
            "errors": {name: planned / measured - 1 for name, planned, measured in self.rows if measured},
            "holds": self.holds,
        }


def verify(
    built: Built,
    jobs: Sequence[Job],
    planned: Report,
    objectives: Mapping[str, float],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Serve `jobs` at their arrivals on the wall's clock, after a few that warm up, and put the plan beside it."""
    drive(
        built.engine, [Job(one.prompt_tokens, one.output_tokens) for one in jobs[:WARM_UP]], built.spec.vocabulary, -1
    )
    served = drive(built.engine, jobs, built.spec.vocabulary, seed, progress=progress)
    return Verified(planned, report(served, objectives), tuple(served))
