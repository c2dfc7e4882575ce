"""How an OpenAI-compatible server stands load: one run, or a sweep of rates or of concurrencies, and its picture.

Knows endpoints by their public API, workloads and their measures. It must not know which server answers: ours and
others are measured alike, from outside.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ridgeline.core.errors import InvalidArgument, RidgelineError
from ridgeline.workload.arrivals import Job, equal
from ridgeline.workload.http import Address, Client, HttpError
from ridgeline.workload.load import COMPLETIONS, Outcome, Target, ends, load
from ridgeline.workload.measure import Report, Spread, report

SAFE_VOCABULARY = 1000
"""Token ids below this are in any model's vocabulary; used where the server does not say how large its own is."""
LATE_S = 0.01
"""A client whose 99th percentile is later than this is too slow for the load that it was told to make."""
CACHED = 0.05
"""Share of prompt tokens above which the prefix cache had a part in a run whose prompts share nothing."""
DETAILS = 5

Making = Callable[[float | None, int | None], list[Job]]
"""(requests a second or None for the trace's own arrivals, the server's context or None) -> jobs."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A bench of one server. Names as in Target; None: ask the server.

    rates: requests a second, one run each (inf: all at once; None: as the trace says); concurrencies: likewise,
    None without a bound. warmups: requests before each run that are not measured. objectives: seconds.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    endpoint: str = COMPLETIONS
    text: bool = False
    vocabulary: int | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float | None] = (None,)
    concurrencies: Sequence[int | None] = (None,)
    objectives: Mapping[str, float] = field(default_factory=dict)
    warmups: int = 1
    timeout_s: float = 600.0
    seed: int = 0


@dataclass(frozen=True)
class Server:
    """What a server says of itself; None where it says nothing."""

    url: str
    model: str
    max_model_len: int | None = None
    vocabulary: int | None = None
    version: str | None = None


@dataclass(frozen=True)
class Run:
    """One load, and what came of it. shared: its prompts share beginnings, as the trace says."""

    request_rate: float | None
    max_concurrency: int | None
    outcomes: Sequence[Outcome]
    report: Report
    shared: bool = False

    @property
    def late(self) -> Spread | None:
        return Spread.of([one.late_s for one in self.outcomes])

    @property
    def begin_s(self) -> float:
        return min(one.served.arrival_s for one in self.outcomes)

    @property
    def complaints(self) -> list[tuple[str, int]]:
        """What the server said when it did not serve, the most frequent first."""
        counted = Counter(f"{one.end}: {one.detail}" for one in self.outcomes if one.end)
        return counted.most_common(DETAILS)

    def as_dict(self) -> dict[str, Any]:
        late = self.late
        return {
            "request_rate": _number(self.request_rate),
            "max_concurrency": self.max_concurrency,
            **self.report.as_dict(),
            "ends": ends(self.outcomes),
            "complaints": [{"said": text, "times": times} for text, times in self.complaints],
            "client_late": None if late is None else late.as_dict(),
            "requests_raw": [_row(one, self.begin_s) for one in self.outcomes],
        }


RAW = ("arrival_s", "ttft_s", "e2e_s", "prompt_tokens", "output_tokens", "end")


def result(settings: Settings, server: Server, runs: Sequence[Run]) -> dict[str, Any]:
    """Everything about a bench, as JSON has it."""
    return {
        "name": "bench-serve",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "server": asdict(server),
        "endpoint": settings.endpoint,
        "text": settings.text,
        "ignore_eos": settings.ignore_eos,
        "temperature": settings.temperature,
        "extra": dict(settings.extra),
        "seed": settings.seed,
        "raw_columns": RAW,
        "runs": [one.as_dict() for one in runs],
    }


async def measure(
    settings: Settings, jobs: Making, progress: Callable[[int, int, str], None] | None = None
) -> tuple[Server, list[Run]]:
    """The server and its runs, one after the other: first by rate, then by concurrency.

    progress(done, total, what) hears of requests that have ended. RidgelineError if the server cannot be asked at all.
    """
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    runs: list[Run] = []
    async with Client(Address.of(settings.base_url), headers) as client:
        server = await meet(client, settings.model)
        target = Target(
            model=server.model,
            endpoint=settings.endpoint,
            vocabulary=None if settings.text else settings.vocabulary or server.vocabulary or SAFE_VOCABULARY,
            ignore_eos=settings.ignore_eos,
            temperature=settings.temperature,
            extra=settings.extra,
            seed=settings.seed,
            timeout_s=settings.timeout_s,
        )
        for rate in settings.rates:
            made = jobs(rate, server.max_model_len)
            for concurrency in settings.concurrencies:
                await _warm(client, target, settings.warmups)
                what = named(rate, concurrency)

                def heard(done: int, total: int, what: str = what) -> None:
                    if progress is not None:
                        progress(done, total, what)

                # Each run has prompts of its own: the prefix cache of the one before must not flatter it.
                fresh = replace(target, seed=settings.seed + len(runs))
                outcomes = await load(client, fresh, made, concurrency, heard)
                figures = report([one.served for one in outcomes], settings.objectives)
                runs.append(Run(rate, concurrency, outcomes, figures, any(job.prefix for job in made)))
    return server, runs


async def meet(client: Client, model: str | None) -> Server:
    """Ask a server what it serves. RidgelineError if it does not answer as OpenAI's API does."""
    url = str(client.address)
    models = await _get(client, "/v1/models")
    if models is None:
        raise RidgelineError(f"{url}/v1/models does not answer as an OpenAI-compatible server does")
    found = [one for one in models.get("data") or () if isinstance(one, dict) and "id" in one]
    if model is None and not found:
        raise RidgelineError(f"{url} serves no model")
    name = model or str(found[0]["id"])
    entry = next((one for one in found if one["id"] == name), {})
    facts = await _get(client, "/server_info") or {}
    version = await _get(client, "/version") or {}
    return Server(
        url=url,
        model=name,
        max_model_len=_integer(entry.get("max_model_len")) or _integer(facts.get("max_model_len")),
        vocabulary=_integer(facts.get("vocabulary")),
        version=str(version["version"]) if "version" in version else None,
    )


async def _get(client: Client, path: str) -> dict[str, Any] | None:
    """A JSON object; None if there is none at this path. RidgelineError if the key is refused or nobody answers."""
    try:
        answer = await client.ask("GET", path)
        try:
            body = await answer.read()
        finally:
            answer.close()
    except HttpError as error:
        raise RidgelineError(f"{client.address}: {error}") from None
    if answer.status in (401, 403):
        raise InvalidArgument("api_key", f"{client.address}{path} answers {answer.status}: it asks for another key")
    if answer.status != 200:
        return None
    try:
        found = json.loads(body)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


async def _warm(client: Client, target: Target, count: int) -> None:
    """Requests that are not measured. RidgelineError with the server's words if none of them is served."""
    if not count:
        return
    outcomes = await load(client, target, equal(count, 16, 4), concurrency=1)
    if all(one.end for one in outcomes):
        hint = "; try --no-ignore-eos" if "ignore_eos" in outcomes[0].detail else ""
        raise RidgelineError(f"{client.address} does not serve: {outcomes[0].end} {outcomes[0].detail}{hint}")


def named(rate: float | None, concurrency: int | None) -> str:
    """A run in a few words."""
    arrivals = "as in the trace" if rate is None else "all at once" if math.isinf(rate) else f"{rate:g}/s"
    return arrivals if concurrency is None else f"{arrivals}, at most {concurrency}"


def warnings(found: Run) -> list[str]:
    """What makes a run's figures doubtful."""
    said = []
    late = found.late
    closed = found.max_concurrency is not None
    if late is not None and late.p99 > LATE_S and not closed and not math.isinf(found.request_rate or 0.0):
        said.append(f"this client was late by {late.p99 * 1e3:.0f} ms (p99): it is too slow for this load")
    cached = found.report.cached_tokens / max(found.report.prompt_tokens, 1)
    if cached > CACHED and not found.shared:
        said.append(f"{cached:.0%} of the prompt tokens came from a prefix cache: were these prompts sent before?")
    missing = sum(one.end == "" and one.told_tokens is None for one in found.outcomes)
    if missing:
        said.append(f"{missing} answers came without usage: their tokens are counted as pieces of text")
    return said


def _row(one: Outcome, begin_s: float) -> list[Any]:
    served = one.served
    done = not one.end and served.token_times_s
    return [
        round(served.arrival_s - begin_s, 6),
        round(served.ttft_s, 6) if done else None,
        round(served.e2e_s, 6) if done else None,
        served.prompt_tokens,
        len(served.token_times_s),
        one.end,
    ]


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "inf" if value is not None and math.isinf(value) else value


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


# Pictures

COLOURS = {"ttft": "#0072B2", "tpot": "#D55E00", "rate": "#009E73", "failed": "#A52A2A"}
DPI = 140


def draw(server: Server, runs: Sequence[Run], path: Path) -> None:
    """One run over time, or latency over throughput of several. PNG or SVG by the suffix.

    Raises InvalidArgument if it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{server.model} at {server.url}", fontsize=10.5, x=0.01, ha="left")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    if len(runs) == 1:
        _over_time(left, right, runs[0])
    else:
        for axes, name, words in ((left, "ttft", "time to first token"), (right, "tpot", "time per output token")):
            _over_load(axes, runs, name, words)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise InvalidArgument("plot", f"{path} cannot be written: {error}") from None


def _over_time(left: Any, right: Any, found: Run) -> None:
    """Output tokens second by second; each request's first token where it was to arrive, failures at the foot."""
    begin = found.begin_s
    done = [one.served for one in found.outcomes if not one.end and one.served.token_times_s]
    seconds = Counter(int(at - begin) for one in done for at in one.token_times_s)
    length = max(seconds, default=0) + 1
    left.step(range(length), [seconds[second] for second in range(length)], where="post", color=COLOURS["rate"])
    left.set_ylim(bottom=0)
    _words(left, f"output tokens/s, {found.report.output_rate:,.0f} over all", "seconds", "")
    failed = [one.served.arrival_s - begin for one in found.outcomes if one.end]
    right.scatter(
        [one.arrival_s - begin for one in done],
        [one.ttft_s * 1e3 for one in done],
        s=9,
        color=COLOURS["ttft"],
        alpha=0.6,
    )
    if done:
        _logarithmic(right)
    if failed:
        foot = right.get_ylim()[0]
        right.plot(failed, [foot] * len(failed), "x", color=COLOURS["failed"], label=f"{len(failed)} not served")
        right.legend(fontsize=8, frameon=False)
    _words(right, "time to first token, by arrival", "seconds", "ms")


def _over_load(axes: Any, runs: Sequence[Run], name: str, words: str) -> None:
    """Median and 99th percentile over output tokens a second, each point named by its load."""
    points = [(one, getattr(one.report, name)) for one in runs]
    points = sorted(
        ((one, spread) for one, spread in points if spread is not None), key=lambda pair: pair[0].report.output_rate
    )
    rates = [one.report.output_rate for one, _ in points]
    for quantile, style in (("p50", "o-"), ("p99", "o--")):
        values = [getattr(spread, quantile) * 1e3 for _, spread in points]
        axes.plot(rates, values, style, color=COLOURS[name], markersize=4, linewidth=1.4, label=quantile)
    for one, spread in points:
        text = f"{one.max_concurrency}" if one.max_concurrency is not None else named(one.request_rate, None)
        axes.annotate(
            text, (one.report.output_rate, spread.p50 * 1e3), (3, -10), textcoords="offset points", fontsize=7
        )
    if points:
        _logarithmic(axes)
    axes.legend(fontsize=8, frameon=False)
    axes.margins(x=0.12)
    _words(axes, words, "output tokens/s", "ms")


def _logarithmic(axes: Any) -> None:
    """A vertical axis whose numbers are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _words(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
