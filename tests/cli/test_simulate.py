"""`ridgeline simulate` and `ridgeline plan --slo`: JSON, tables, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ridgeline.cli.main import application
from ridgeline.core.errors import DoesNotFit, InvalidArgument

typer_testing = pytest.importorskip("typer.testing")


def run(*arguments: str) -> str:
    done = typer_testing.CliRunner().invoke(application, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_simulate_json() -> None:
    found: dict[str, Any] = json.loads(
        run(
            "simulate", "--hardware", "A10", "--num-prompts", "20", "--request-rate", "50", "--slo", "ttft=1s", "--json"
        )
    )
    assert found["requests"] == 20
    assert found["failed"] == 0
    assert found["output_tokens"] == 20 * 128
    assert set(found["ttft"]) == {"count", "mean_s", "p50_s", "p90_s", "p99_s", "max_s"}
    assert found["ttft"]["p50_s"] <= found["ttft"]["p99_s"] <= found["e2e"]["p99_s"]
    assert found["goodput_per_s"] == found["request_rate_per_s"]


def test_static_batches_wait_longer_than_continuous_ones() -> None:
    load = ("--hardware", "a10", "--num-prompts", "40", "--request-rate", "40", "--max-num-seqs", "8", "--json")
    static = json.loads(run("simulate", *load, "--scheduling-policy", "static"))
    continuous = json.loads(run("simulate", *load))
    assert static["ttft"]["p90_s"] > continuous["ttft"]["p90_s"]


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:{second:02}.0,{100 + second},{5 + second}" for second in range(10)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    found = json.loads(run("simulate", "--hardware", "h200", "--trace", str(trace), "--json"))
    assert found["prompt_tokens"] == sum(100 + second for second in range(10))
    assert found["seconds"] == pytest.approx(9, abs=0.2)  # the embedded model is done at once


def test_the_plan_for_objectives() -> None:
    load = ("--slo", "ttft=200ms,tpot=20ms", "--num-prompts", "40", "--json")
    found = json.loads(run("plan", "--hardware", "a10", "--hardware", "h200", *load))
    small, large = found["capacities"]
    assert large["rate_per_s"] > small["rate_per_s"] > 0
    assert small["best"]["goodput_per_s"] > 0


def test_tables() -> None:
    text = run("simulate", "--hardware", "h200", "--num-prompts", "5")
    assert "TTFT" in text
    assert "last" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("simulate", "--hardware", "h20"), InvalidArgument, "did you mean h200"),
        (("simulate", "--hardware", "a10", "--slo", "ttft"), InvalidArgument, "slo"),
        (("simulate", "--hardware", "a10", "--num-prompts", "0"), InvalidArgument, "num_prompts"),
        (("simulate", "--hardware", "a10", "--request-rate", "-1"), InvalidArgument, "request_rate"),
        (("simulate", "--hardware", "a10", "--trace", "nowhere.csv"), InvalidArgument, "is not a file"),
        (("simulate", "--hardware", "a10", "--length-scale", "0"), InvalidArgument, "length_scale"),
        (("simulate", "--hardware", "a10", "--gpu-memory-utilization", "0.001"), DoesNotFit, "KV cache"),
        (("plan", "--hardware", "a10", "--slo", "tpot=1us"), InvalidArgument, "no load meets it"),
    ],
)
def test_errors(arguments: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        typer_testing.CliRunner().invoke(application, arguments, catch_exceptions=False)
