"""`ridgeline bench serve` against a stand-in endpoint: discovery, runs, sweeps, failures, pictures, the command."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "workload"))

from standin_endpoint import Answering, Endpoint, Heard, endpoint, plain, reciting

from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument, RidgelineError
from ridgeline.study import bench_serve
from ridgeline.study.bench_serve import Run, Settings, draw, named, warnings
from ridgeline.workload.arrivals import Job, at_once, equal, poisson
from ridgeline.workload.load import Outcome
from ridgeline.workload.measure import Served, report

MODELS = {"object": "list", "data": [{"id": "first", "max_model_len": 512}, {"id": "second"}]}


def server(
    answering: Answering, models: Any = MODELS, info: dict[str, Any] | None = None, key: str | None = None
) -> Answering:
    """An endpoint that also says what it serves."""

    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        method, path, _ = heard.line.split()
        if key is not None and heard.headers.get("authorization") != f"Bearer {key}":
            writer.write(plain(401, {"error": {"message": "no key", "code": "invalid_api_key"}}))
        elif path == "/v1/models":
            writer.write(plain(200, models) if models is not None else plain(404, {}))
        elif path == "/server_info" and info is not None:
            writer.write(plain(200, info))
        elif path == "/version":
            writer.write(plain(200, {"version": "9.9"}))
        elif method == "POST":
            await answering(heard, writer)
        else:
            writer.write(plain(404, {"error": {"message": "nothing here"}}))

    return answer


def measured(answering: Answering, jobs: Callable[..., list[Job]], **settings: Any) -> tuple[Any, list[Run], Endpoint]:
    async def work() -> tuple[Any, list[Run], Endpoint]:
        async with endpoint(answering) as found:
            told, runs = await bench_serve.measure(Settings(base_url=found.url, **settings), jobs)
            return told, runs, found

    return asyncio.run(asyncio.wait_for(work(), 20))


def four(rate: float | None, context: int | None) -> list[Job]:
    return equal(4, 20, 3)


def test_the_server_says_what_it_serves() -> None:
    told, runs, found = measured(server(reciting(3), info={"vocabulary": 40}), four)
    assert (told.model, told.max_model_len, told.vocabulary, told.version) == ("first", 512, 40, "9.9")
    bodies = [heard.body for heard in found.heard if heard.body]
    assert len(bodies) == 5  # one to warm up
    assert {body["model"] for body in bodies} == {"first"}
    assert max(token for body in bodies for token in body["prompt"]) < 40
    assert runs[0].report.output_tokens == 12


def test_a_named_model_and_settings_win() -> None:
    told, _, found = measured(
        server(reciting(3)), four, model="second", vocabulary=7, warmups=0, endpoint="completions", temperature=0.5
    )
    assert (told.model, told.max_model_len) == ("second", None)
    bodies = [heard.body for heard in found.heard if heard.body]
    assert len(bodies) == 4
    assert all(max(body["prompt"]) < 7 and body["temperature"] == 0.5 for body in bodies)
    _, _, found = measured(server(reciting(3)), four, endpoint="chat")
    assert all(heard.body["messages"] for heard in found.heard if heard.body)


def test_a_sweep_has_a_run_for_each_load_and_prompts_of_its_own() -> None:
    asked: list[tuple[float | None, int | None]] = []

    def jobs(rate: float | None, context: int | None) -> list[Job]:
        asked.append((rate, context))
        made = equal(4, 20, 3)
        return at_once(made) if rate is None or math.isinf(rate) else poisson(made, rate)

    _, runs, found = measured(
        server(reciting(3)), jobs, rates=(100.0, math.inf), concurrencies=(1, None), warmups=0, objectives={"ttft": 5.0}
    )
    assert asked == [(100.0, 512), (math.inf, 512)]
    assert [(one.request_rate, one.max_concurrency) for one in runs] == [
        (100.0, 1), (100.0, None), (math.inf, 1), (math.inf, None),
    ]  # fmt: skip
    prompts = [tuple(heard.body["prompt"]) for heard in found.heard if heard.body]
    assert len(set(prompts)) == len(prompts) == 16
    assert all(one.report.met == 4 for one in runs)
    result = json.loads(
        json.dumps(bench_serve.result(Settings(base_url="http://x"), told_by(runs), runs), allow_nan=False)
    )
    assert [one["request_rate"] for one in result["runs"]] == [100.0, 100.0, "inf", "inf"]
    rows = result["runs"][0]["requests_raw"]
    assert len(rows) == 4
    assert len(rows[0]) == len(result["raw_columns"])
    assert [row[-1] for row in rows] == [""] * 4


def told_by(runs: list[Run]) -> bench_serve.Server:
    return bench_serve.Server("http://x", "m")


def test_refusals_are_counted_and_quoted() -> None:
    async def busy(heard: Heard, writer: asyncio.StreamWriter) -> None:
        if heard.body["prompt"][0] % 2:
            writer.write(plain(429, {"error": {"message": "full", "code": "server_overloaded"}}))
        else:
            await reciting(3)(heard, writer)

    _, (run,), found = measured(server(busy), lambda rate, context: equal(12, 20, 3), warmups=0)
    refused = sum(heard.body["prompt"][0] % 2 for heard in found.heard if heard.body)
    assert 0 < refused < 12
    figures = run.as_dict()
    assert figures["ends"] == {"ok": 12 - refused, "429": refused}
    assert figures["complaints"] == [{"said": "429: server_overloaded full", "times": refused}]
    assert figures["failed"] == refused


async def refuse_ignore_eos(heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(plain(400, {"error": {"message": "Unrecognized request argument supplied: ignore_eos"}}))


@pytest.mark.parametrize(
    ("answering", "settings", "kind", "words"),
    [
        (server(reciting(1), models=None), {}, RidgelineError, "does not answer as an OpenAI-compatible"),
        (server(reciting(1), models={"data": []}), {}, RidgelineError, "serves no model"),
        (server(reciting(1), key="k"), {}, InvalidArgument, "api_key: .* answers 401"),
        (server(refuse_ignore_eos), {}, RidgelineError, "try --no-ignore-eos"),
    ],
)
def test_servers_that_cannot_be_measured(
    answering: Answering, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        measured(answering, four, **settings)


def test_a_key_goes_with_every_request_and_into_no_result() -> None:
    _, runs, found = measured(server(reciting(1), key="secret-key"), four, api_key="secret-key")
    assert {heard.headers["authorization"] for heard in found.heard} == {"Bearer secret-key"}
    settings = Settings(base_url="http://x", api_key="secret-key")
    assert "secret-key" not in json.dumps(bench_serve.result(settings, told_by(runs), runs)) + repr(settings)


def run_of(times: list[list[float]], late: float = 0.0, cached: int = 0, told: bool = True) -> Run:
    outcomes = []
    for one in times:
        served = Served(100, one[0], one[1:], cached_tokens=cached)
        outcomes.append(Outcome(served, 200, "", late_s=late, told_tokens=len(one) - 1 if told else None))
    return Run(5.0, None, outcomes, report([one.served for one in outcomes]))


def test_what_makes_figures_doubtful_is_said() -> None:
    times = [[0.0, 0.1, 0.2], [1.0, 1.1, 1.3]]
    assert warnings(run_of(times)) == []
    assert "late by 50 ms" in warnings(run_of(times, late=0.05))[0]
    assert "64% of the prompt tokens" in warnings(run_of(times, cached=64))[0]
    assert "2 answers came without usage" in warnings(run_of(times, told=False))[0]


def test_loads_have_names() -> None:
    assert named(None, None) == "as in the trace"
    assert named(math.inf, 8) == "all at once, at most 8"
    assert named(2.5, None) == "2.5/s"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    failed = Outcome(Served(5, 0.5, error="429"), 429, "429")
    one = run_of([[0.0, 0.1, 0.2], [1.0, 1.1, 1.3]])
    single = Run(1.0, None, [*one.outcomes, failed], one.report)
    nothing = Run(1.0, None, [failed], report([failed.served]))
    for number, runs in enumerate(([single], [one, single], [nothing], [nothing, nothing])):
        path = tmp_path / "deep" / f"{number}{suffix}"
        draw(told_by(runs), runs, path)
        assert path.stat().st_size > 2000
    with pytest.raises(InvalidArgument, match="plot"):
        draw(told_by([one]), [one], tmp_path / "x.nothing")


# The command


@contextmanager
def in_a_thread(answering: Answering) -> Iterator[Endpoint]:
    """The endpoint on a loop of its own, for a command that has one as well."""
    ready, found, ends = threading.Event(), [], []

    async def work() -> None:
        async with endpoint(answering) as one:
            end = asyncio.Event()
            found.append(one)
            ends.append((asyncio.get_running_loop(), end))
            ready.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield found[0]
    finally:
        loop, end = ends[0]
        loop.call_soon_threadsafe(end.set)
        thread.join(5)


def command(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(
        application, ["bench", "serve", *arguments], catch_exceptions=False, env={"COLUMNS": "160"}
    )
    assert done.exit_code == status, done.output
    return done.stdout


def test_the_command(tmp_path: Path) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "plot.png"
    with in_a_thread(server(reciting(4))) as found:
        at = ("--base-url", found.url, "--num-prompts", "6", "--prompt-len", "9", "--output-len", "4")
        shown = command(*at, "--request-rate", "200", "--slo", "ttft=2s", "--out", str(out), "--plot", str(plot))
        assert "first at http://127.0.0.1" in shown
        assert "TTFT" in shown
        assert "goodput" in shown
        assert plot.stat().st_size > 2000
        kept = json.loads(out.read_text())
        assert kept["runs"][0]["ends"] == {"ok": 6}
        assert kept["runs"][0]["request_rate"] == 200
        told = json.loads(command(*at, "--max-concurrency", "1,3", "--extra-body", '{"top_k": 5}', "--json"))
        assert [one["max_concurrency"] for one in told["runs"]] == [1, 3]
        assert found.heard[-1].body["top_k"] == 5
        table = command(*at, "--max-concurrency", "1,3")
        assert "all at once, at most 3" in table
        assert "6/6" in table


def test_a_trace_keeps_its_arrivals(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 40 * place, "input_length": 30 + place, "output_length": 4} for place in range(5)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    with in_a_thread(server(reciting(4))) as found:
        told = json.loads(command("--base-url", found.url, "--trace", str(trace), "--json"))
        lengths = [len(heard.body["prompt"]) for heard in found.heard if heard.body]
    assert told["runs"][0]["request_rate"] is None
    assert [row[0] for row in told["runs"][0]["requests_raw"]] == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])
    assert lengths[1:] == [30, 31, 32, 33, 34]


async def refuse(heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(plain(503, {"error": {"message": "starting"}}))


def test_nothing_served_is_a_failure() -> None:
    with in_a_thread(server(refuse)) as found:
        shown = command("--base-url", found.url, "--num-prompts", "3", "--num-warmups", "0", status=1)
    assert "503 × 3" in shown


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        (("--request-rate", "0"), "request_rate"),
        (("--request-rate", "1,x"), "request_rate"),
        (("--max-concurrency", "0"), "max_concurrency"),
        (("--extra-body", "[1]"), "extra_body"),
        (("--endpoint", "embeddings"), "endpoint"),
        (("--plot", "a.gif"), "plot"),
        (("--out", "/nowhere/a.json"), "out"),
        (("--timeout", "0"), "timeout"),
        (("--base-url", "localhost"), "base_url"),
    ],
)
def test_refused_arguments(arguments: tuple[str, str], parameter: str) -> None:
    with in_a_thread(server(reciting(1))) as found, pytest.raises(InvalidArgument) as error:
        CliRunner().invoke(application, ["bench", "serve", "--base-url", found.url, *arguments], catch_exceptions=False)
    assert error.value.parameter == parameter
