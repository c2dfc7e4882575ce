"""Options that describe a workload, shared by simulate, bench and plan.

Knows vLLM's option names for load. It must not know engines.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ridgeline.core.errors import InvalidArgument

if TYPE_CHECKING:
    from ridgeline.workload.arrivals import Job
    from ridgeline.workload.measure import Report

Trace = Annotated[Path | None, typer.Option(help="Replay lengths and arrivals: Azure's CSV or Mooncake's JSON lines.")]
NumPrompts = Annotated[int | None, typer.Option(help="Requests; 100 without a trace, all of a trace.")]
PromptLen = Annotated[int, typer.Option(help="Prompt tokens of a request, without a trace.")]
OutputLen = Annotated[int, typer.Option(help="Output tokens of a request, without a trace.")]
LengthScale = Annotated[float, typer.Option(help="Divide the trace's lengths by this.")]
RequestRate = Annotated[
    float | None, typer.Option(help="Requests a second, instead of the trace's arrivals; inf: all at once.")
]
Burstiness = Annotated[float, typer.Option(help="Shape of the gamma gaps: 1 is Poisson, below 1 bursts.")]
MaxConcurrency = Annotated[int | None, typer.Option(help="Closed loop: most requests in the engine at a time.")]
Slo = Annotated[str | None, typer.Option(help="Objectives such as ttft=500ms,tpot=50ms,e2e=2s.")]
Seed = Annotated[int, typer.Option(help="Of arrivals and prompts.")]


def jobs_of(
    trace: Path | None,
    num_prompts: int | None,
    prompt_len: int,
    output_len: int,
    length_scale: float,
    request_rate: float | None,
    burstiness: float,
    seed: int,
    max_model_len: int,
) -> list[Job]:
    """The workload that these options describe. InvalidArgument for what makes none."""
    from ridgeline.workload.arrivals import at_once, equal, gamma, replay, scaled

    if num_prompts is not None and num_prompts < 1:
        raise InvalidArgument("num_prompts", f"must be at least 1, not {num_prompts}")
    if not length_scale > 0:
        raise InvalidArgument("length_scale", f"must be above 0, not {length_scale}")
    if trace is None:
        for name, value in (("prompt_len", prompt_len), ("output_len", output_len)):
            if value < 1:
                raise InvalidArgument(name, f"must be at least 1, not {value}")
        jobs = equal(num_prompts or 100, prompt_len, output_len)
        request_rate = math.inf if request_rate is None else request_rate
    else:
        jobs = replay(trace, num_prompts)
        if length_scale != 1:
            jobs = scaled(jobs, length_scale, (1, max_model_len), (1, max_model_len))
    if request_rate is None:
        return jobs
    return at_once(jobs) if math.isinf(request_rate) else gamma(jobs, request_rate, burstiness, seed)


def report_table(report: Report, title: str, failed: str = "refused: longer than the context") -> Table:
    """What users felt, with the formula beside each number. failed: why requests failed, if any did."""
    from ridgeline.cli.figures import milliseconds
    from ridgeline.workload.measure import FORMULAS

    table = Table("", "mean", "p50", "p90", "p99", "formula", title=title)
    for name in ("ttft", "tpot", "itl", "e2e"):
        spread = getattr(report, name)
        if spread is not None:
            values = (spread.mean, spread.p50, spread.p90, spread.p99)
            table.add_row(name.upper(), *map(milliseconds, values), FORMULAS[name])
    table.add_row("requests/s", f"{report.request_rate:,.2f}", "", "", "", FORMULAS["request_rate"])
    table.add_row("output tokens/s", f"{report.output_rate:,.1f}", "", "", "", FORMULAS["output_rate"])
    if report.goodput is not None:
        goal = ", ".join(f"{name} ≤ {milliseconds(limit)}" for name, limit in report.objectives.items())
        table.add_row("goodput", f"{report.goodput:,.2f}", "", "", "", f"{FORMULAS['goodput']} ({goal})")
    if report.failed:
        table.add_row("failed", str(report.failed), "", "", "", failed)
    return table
