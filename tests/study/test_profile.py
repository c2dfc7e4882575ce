"""Profiles: the decode path copies nothing, Transformers' does; classes and ops add up to the step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ridgeline import LLM
from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument
from ridgeline.study.profile import COPIES, profiled

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
