"""`ridgeline bench throughput`: figures of a real run, policies side by side."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument


def test_policies_side_by_side() -> None:
    load = ["--num-prompts", "6", "--prompt-len", "12", "--output-len", "4", "--max-num-seqs", "2"]
    policies = ["--scheduling-policy", "fcfs", "--scheduling-policy", "static"]
    arguments = ["bench", "throughput", *load, *policies, "--slo", "ttft=10s", "--json"]
    found = json.loads(CliRunner().invoke(application, arguments, catch_exceptions=False).stdout)
    assert [one["scheduling_policy"] for one in found["runs"]] == ["fcfs", "static"]
    for run in found["runs"]:
        assert run["output_tokens"] == 24
        assert run["goodput_per_s"] == run["request_rate_per_s"] > 0
        assert run["tpot"]["count"] == 6


def test_bad_load() -> None:
    for bad in (["--num-prompts", "0"], ["--slo", "fast"], ["--scheduling-policy", "best"], ["--request-rate", "0"]):
        with pytest.raises(InvalidArgument):
            CliRunner().invoke(application, ["bench", "throughput", *bad], catch_exceptions=False)
