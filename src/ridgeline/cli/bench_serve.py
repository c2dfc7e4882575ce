"""`ridgeline bench serve`: load on a running server, ours or another's.

Knows options and tables. It must not know how requests are sent (workload/load.py).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cli import options, workload
from ridgeline.cli.bench import screen
from ridgeline.core.errors import InvalidArgument

if TYPE_CHECKING:
    from ridgeline.study.bench_serve import Run, Server
    from ridgeline.workload.arrivals import Job

BaseUrl = Annotated[str, typer.Option(help="The server, without /v1.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="Key, if the server asks for one.")
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Name of the served model; the first if left out.")]
Endpoint = Annotated[str, typer.Option(help="completions or chat.")]
TextPrompts = Annotated[bool, typer.Option("--text", help="Prompts as words instead of token ids (chat always).")]
Vocabulary = Annotated[
    int | None, typer.Option(help="Token ids of prompts are below this; the server's own if it says.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Ask for the whole output length.")]
Temperature = Annotated[float, typer.Option(help="Of sampling.")]
ExtraBody = Annotated[str | None, typer.Option(help='Further fields of each request, as JSON: {"top_k": 20}.')]
RequestRates = Annotated[
    str | None,
    typer.Option("--request-rate", help="Requests a second; several with commas: a run each; inf: all at once."),
]
Concurrencies = Annotated[
    str | None, typer.Option("--max-concurrency", help="Most requests under way; several with commas: a run each.")
]
Warmups = Annotated[int, typer.Option("--num-warmups", help="Requests before each run that are not measured.")]
Timeout = Annotated[float, typer.Option(help="Seconds after which a request is given up.")]
Out = Annotated[Path | None, typer.Option(help="File for the result as JSON, with every request.")]
Plot = Annotated[Path | None, typer.Option(help="Draw it: a PNG or SVG file, by its suffix.")]


def command(
    base_url: BaseUrl = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    model: Model = None,
    endpoint: Endpoint = "completions",
    text: TextPrompts = False,
    vocabulary: Vocabulary = None,
    ignore_eos: IgnoreEos = True,
    temperature: Temperature = 0.0,
    extra_body: ExtraBody = None,
    trace: workload.Trace = None,
    num_prompts: workload.NumPrompts = None,
    prompt_len: workload.PromptLen = 512,
    output_len: workload.OutputLen = 128,
    length_scale: workload.LengthScale = 1.0,
    request_rate: RequestRates = None,
    burstiness: workload.Burstiness = 1.0,
    max_concurrency: Concurrencies = None,
    slo: workload.Slo = None,
    num_warmups: Warmups = 1,
    timeout: Timeout = 600.0,
    seed: workload.Seed = 0,
    out: Out = None,
    plot: Plot = None,
    as_json: options.Json = False,
) -> None:
    """Load a running OpenAI-compatible server: TTFT, TPOT, ITL, E2E, throughput, goodput, and what went wrong.

    Times count from the moment at which a request was to be sent. With several rates or concurrencies, one run each.
    The exit status is 1 if no request was served.
    """
    import asyncio

    from ridgeline.cli.progress import bar
    from ridgeline.study import bench_serve as study
    from ridgeline.workload.measure import objectives_named

    for name, path in (("out", out), ("plot", plot)):
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise InvalidArgument(name, f"{path.parent} is no folder that can be written")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise InvalidArgument("plot", f"must end in .png or .svg, not {plot.name!r}")
    if not timeout > 0:
        raise InvalidArgument("timeout", f"must be above 0, not {timeout}")
    settings = study.Settings(
        base_url=base_url,
        api_key=api_key,
        model=model,
        endpoint=endpoint,
        text=text,
        vocabulary=vocabulary,
        ignore_eos=ignore_eos,
        temperature=temperature,
        extra=_object(extra_body),
        rates=_rates(request_rate, trace is not None),
        concurrencies=_concurrencies(max_concurrency),
        objectives=objectives_named(slo) if slo else {},
        warmups=num_warmups,
        timeout_s=timeout,
        seed=seed,
    )

    def jobs(rate: float | None, context: int | None) -> list[Job]:
        return workload.jobs_of(
            trace, num_prompts, prompt_len, output_len, length_scale, rate, burstiness, seed, context or 1 << 30
        )

    with bar("", shown=not as_json) as progress:
        server, runs = asyncio.run(study.measure(settings, jobs, lambda done, total, what: progress(done, total)))
    result = study.result(settings, server, runs)
    if out is not None:
        out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if plot is not None:
        study.draw(server, runs, plot)
    if as_json:
        print(json.dumps(result))
    else:
        console = screen()
        show(console, server, runs)
        for path in (out, plot):
            if path is not None:
                console.print(Text(f"-> {path}"))
    if all(one.report.failed == one.report.requests for one in runs):
        raise typer.Exit(1)


def show(console: Console, server: Server, runs: list[Run]) -> None:
    """Tables of the runs, what went wrong, and what makes the figures doubtful."""
    from ridgeline.study.bench_serve import named, warnings
    from ridgeline.workload.load import ends

    title = f"{server.model} at {server.url}"
    if len(runs) == 1:
        only = runs[0]
        load = named(only.request_rate, only.max_concurrency)
        words = f"{title}: {only.report.requests} requests, {load}"
        console.print(workload.report_table(only.report, words, failed="not served; see below"))
    else:
        console.print(sweep_table(runs, title))
    for one in runs:
        load = "" if len(runs) == 1 else f"{named(one.request_rate, one.max_concurrency)}: "
        if one.report.failed:
            told = ", ".join(f"{end} × {count}" for end, count in ends(one.outcomes).items())
            console.print(Text(f"{load}{told}", style="red"))
            for words, times in one.complaints:
                console.print(Text(f"  {times} × {words}", style="dim"))
        for words in warnings(one):
            console.print(Text(f"{load}{words}", style="yellow"))


def sweep_table(runs: list[Run], title: str) -> Table:
    """A row a run."""
    from ridgeline.cli.figures import milliseconds
    from ridgeline.study.bench_serve import named

    columns = ["load", "served", "requests/s", "output tokens/s", "TTFT p50", "p99", "TPOT p50", "p99"]
    goal = bool(runs[0].report.objectives)
    table = Table(*columns, *(["goodput"] if goal else []), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in runs:
        found = one.report
        times = [
            milliseconds(getattr(spread, share)) if spread is not None else "–"
            for spread in (found.ttft, found.tpot)
            for share in ("p50", "p99")
        ]
        table.add_row(
            named(one.request_rate, one.max_concurrency),
            f"{found.requests - found.failed}/{found.requests}",
            f"{found.request_rate:,.2f}",
            f"{found.output_rate:,.1f}",
            *times,
            *([f"{found.goodput or 0:,.2f}"] if goal else []),
        )
    return table


def _rates(text: str | None, traced: bool) -> tuple[float | None, ...]:
    if text is None:
        return (None if traced else math.inf,)
    try:
        found = tuple(float(one) for one in text.split(","))
    except ValueError:
        found = ()
    if not found or any(not one > 0 or math.isnan(one) for one in found):
        raise InvalidArgument("request_rate", f"must be numbers above 0 with commas between, or inf, not {text!r}")
    return found


def _concurrencies(text: str | None) -> tuple[int | None, ...]:
    if text is None:
        return (None,)
    try:
        found = tuple(int(one) for one in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InvalidArgument("max_concurrency", f"must be whole numbers from 1 with commas between, not {text!r}")
    return found


def _object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidArgument("extra_body", f"must be a JSON object, not {text!r}")
    return found
