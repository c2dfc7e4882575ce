"""Profiles: the decode path copies nothing, Transformers' does; classes and ops add up to the step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ridgeline import LLM
from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument
from ridgeline.study.profile import COPIES, Rung, profiled, verdicts

TOKENS = 8


def test_decoding_copies_nothing_a_token(tmp_path: Path) -> None:
    """The report's finding, answered: no aten::copy_, _to_copy or to in a step of decoding."""
    trace = tmp_path / "traces" / "decode.json"
    with LLM(max_num_seqs=1, enable_prefix_caching=False, max_model_len=128) as llm:
        found = profiled(llm.built, 16, TOKENS, trace)
        assert not llm.built.engine.has_work
    ours, theirs = found.runs
    assert ours.copies_per_token == dict.fromkeys(COPIES, 0)
    assert theirs.copies_per_token["aten::copy_"] > 10
    calls = [sum(row.calls for row in run.operators) / run.tokens for run in found.runs]
    assert calls[0] < calls[1] / 4
    assert json.loads(trace.read_text())["traceEvents"]


def test_classes_and_ops_add_up(tiny: Path) -> None:
    with LLM(tiny, kernels="reference", dtype="float32", max_num_seqs=1, enable_prefix_caching=False) as llm:
        found = profiled(llm.built, 8, TOKENS)
    for rows in (found.classes, found.ops):
        assert sum(one.flop_share for one in rows) == pytest.approx(1)
        assert sum(one.time_share for one in rows) == pytest.approx(1)
    contraction = found.classes[0]
    assert contraction.name == "contraction"
    assert contraction.flop_share > 0.9
    named = {one.name for one in found.ops}
    assert named >= {"linear", "attention", "norm", "sample"}


def test_rungs_answer_the_reports_hypothesis() -> None:
    first = Rung("standard", 300.0, 12.0, None, 4e6, 2e-3)
    second = Rung("cpu", 200.0, 0.0, None, 1e6, 1e-3)
    unknown = Rung("other", 300.0, 24.0, 7.0, None, 4e-3)
    assert verdicts([first]) == []
    assert verdicts([first, second, unknown]) == [
        "cpu beside standard: attention 2.00x as fast; fewer operators (200 against 300), fewer copies (0 against 12), "
        "fewer bytes of attention (1,000,000 against 4,000,000)",
        "other beside standard: attention 0.50x as fast; as many operators, more copies (24 against 12)",
    ]


def test_rungs_are_profiled_side_by_side(tiny: Path) -> None:
    common = ["profile", "--model", str(tiny), "--dtype", "float32", "--prompt-len", "8", "--output-len", "4"]
    arguments = [*common, "--attention", "reference", "--attention", "cpu"]
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(application, arguments, catch_exceptions=False).stdout
    assert "cpu beside reference" in shown
    assert "fewer operators" in shown
    with pytest.raises(InvalidArgument, match="leave --trace and --operators out"):
        CliRunner().invoke(application, [*common, "--attention", "cpu", "--operators"], catch_exceptions=False)


def test_command(tiny: Path) -> None:
    common = ["profile", "--model", str(tiny), "--kernels", "reference", "--prompt-len", "8", "--output-len", "4"]
    found = json.loads(CliRunner().invoke(application, [*common, "--json"], catch_exceptions=False).stdout)
    assert [run["side"] for run in found["runs"]] == ["ridgeline", "transformers"]
    assert {"mue", "peak_share", "flop_share", "time_share"} <= set(found["ops"][0])
    for one in found["ops"]:
        assert one["unfused_bytes"] >= one["read_bytes"] + one["write_bytes"]
    assert {one["unfused_bytes"] for one in found["classes"]} == {None}
    wide = CliRunner(env={"COLUMNS": "160"})
    shown = wide.invoke(application, [*common, "--operators"], catch_exceptions=False).stdout
    assert "MUE" in shown
    assert "saved" in shown
    with pytest.raises(InvalidArgument, match="output_len"):
        CliRunner().invoke(application, ["profile", "--output-len", "0"], catch_exceptions=False)
