"""`ridgeline bench` as a user meets it: tables, JSON, pictures, refusals of one line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--device", "cpu", "--heads", 2, "--head-dim", 16, "--sequence", 32, "--batch", "1,4", "--rounds", 2)


def ridgeline(*arguments: Any, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in this process, from its arguments to its exit code."""
    from ridgeline.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["ridgeline", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert code == expect, err.getvalue()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refusal(*arguments: Any) -> str:
    """The one line on standard error of a command that is refused."""
    done = ridgeline(*arguments, expect=1)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_attention_as_json_with_pictures_and_a_file(tmp_path: Path) -> None:
    kept = tmp_path / "result.json"
    files = ("--plots", tmp_path / "pictures", "--out", kept)
    done = ridgeline("bench", "attention", *SMALL, "--rungs", "blocked,reference", *files, "--json")
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert json.loads(kept.read_text()) == result
    assert set(result) == {
        "benchmark", "experiment", "device", "versions", "settings", "contestants", "left_out", "limit", "cells",
        "failures", "intervals",
    }  # fmt: skip
    assert result["benchmark"] == "attention"
    assert result["settings"] == {"rounds": 2, "graph": False, "check": True, "counters": False, "copies": None}
    assert [one["name"] for one in result["contestants"]] == ["blocked", "reference", "math", "torch-cpu"]
    assert [cell["case"]["dtype"] for cell in result["cells"]] == ["float32", "float32"]
    for cell in result["cells"]:
        assert set(cell) == {"case", "copies", "clocks", "results"}
        for one in cell["results"].values():
            assert {"seconds", "samples", "calls", "graph", "error", "error_of_pytorch"} <= set(one)
            assert {"flops_per_s", "floor_bytes_per_s", "kv_bytes_per_s", "roof_share"} <= set(one)
    assert (tmp_path / "pictures" / "attention-report-rates.png").exists()


@pytest.mark.parametrize("experiment", ["report", "sweep", "decode"])
def test_attention_as_tables(experiment: str) -> None:
    done = ridgeline("bench", "attention", "-e", experiment, *SMALL, "--rungs", "blocked", "--peers", "none")
    assert "blocked" in done.stdout
    assert "Bytes between the multiprocessors and memory" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-e", "speed"), "experiment: must be one of report, sweep, decode, memory, not 'speed'"),
        (("--rungs", "v3"), "rungs: attention has no kernel 'v3'"),
        (("--peers", "fa4"), "peers: there is no peer 'fa4'"),
        (("--batch", "1,x"), "batch: must be whole numbers separated by commas, not '1,x'"),
        (("--sequence", "0"), "sequence: must be positive, not 0"),
        (("--kv-heads", "3"), "kv_heads: must divide the number of heads"),
        (("--dtype", "int4"), "dtype: must be one of"),
        (("--device", "tpu"), "device: must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        (("--page", "17"), "page: must be a multiple of 16"),
        (("--layout", "rows"), "layout: must be auto, contiguous or paged"),
        (("--rounds", "0"), "rounds: must be at least 1"),
        (("--copies", "0"), "copies: must be at least 1"),
        (("--counters",), "counters: a CPU has no memory counters"),
        (("--fa3-library", "nowhere.so"), "fa3_library: nowhere.so is no file"),
        (("--out", "nowhere/result.json"), "out: nowhere is no folder"),
    ],
)
def test_refusals_of_attention(arguments: tuple[str, ...], said: str) -> None:
    device = () if "--device" in arguments else ("--device", "cpu")
    heads = ("--heads", "2") if "--kv-heads" in arguments else ()
    assert said in refusal("bench", "attention", *device, *heads, *arguments)


def test_unknown_options_and_commands() -> None:
    assert "--rung" in ridgeline("bench", "attention", "--rungg", "v2", expect=2).stderr
    assert "nothing" in ridgeline("bench", "nothing", expect=2).stderr


def test_latency(tiny: Path) -> None:
    shape = ("--model", tiny / "config.json", "--device", "cpu", "--batch", "1,2", "--sequence", 8, "--new-tokens", 2)
    arguments = ("bench", "latency", *shape, "--rounds", 1, "--attention", "blocked", "--attention", "cpu")
    done = ridgeline(*arguments, "--json")
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["benchmark"] == "latency"
    assert [list(cell["results"]) for cell in result["cells"]] == [["blocked", "cpu"]] * 2
    assert "8 tokens in, 2 out" in ridgeline(*arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch", "0"), "batch: must be at least 1, not 0"),
        (("--new-tokens", "0"), "new_tokens: must be at least 1"),
        (("--attention", "v9"), "attention_backend: must be auto, or of standard"),
        (("--model", "nowhere/config.json"), "nowhere/config.json"),
        (("--out", "nowhere/result.json"), "out: nowhere is no folder"),
    ],
)
def test_refusals_of_latency(arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal("bench", "latency", "--device", "cpu", "--rounds", "1", *arguments)


def test_tuning_a_cpu_is_refused_and_so_are_wrong_options() -> None:
    for arguments, said in (
        ((), "nothing to tune on cpu"),
        (("--rounds", 0), "rounds: must be at least 1"),
        (("--head-dim", "x"), "head_dim: must be whole numbers"),
        (("--dtype", "fp4"), "dtype: must be one of"),
        (("--out", "nowhere/table.json"), "out: nowhere is no folder"),
    ):
        assert said in refusal("kernels", "tune", "--device", "cpu", *arguments)
    assert "--kernell" in ridgeline("kernels", "tune", "--kernell", "v2", expect=2).stderr
