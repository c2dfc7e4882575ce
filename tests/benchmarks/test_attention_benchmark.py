"""Attention's experiments on record: one file with every experiment's result, raw timings apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import attention, attention_accuracy, attention_prefill
from ridgeline.kernels.cuda import attention_sm90


def test_experiments_on_record(tmp_path: Path) -> None:
    arguments = ["report", "decode", "--quick", "--device", "cpu", "--threads", "1", "--rungs", "blocked"]
    pictures = tmp_path / "pictures"
    attention.main([*arguments, "--peers", "none", "--out", str(tmp_path / "result.json"), "--plots", str(pictures)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["summary"]) == list(result["timings"]) == ["report", "decode"]
    for experiment, summary in result["summary"].items():
        (cell,) = summary["cells"]
        assert cell["results"]["blocked"]["seconds"][0] > 0
        assert "samples" not in cell["results"]["blocked"]
        (taken,) = result["timings"][experiment][cell["case"]["label"]].values()
        assert len(taken) == 1
    assert result["tables"][0]["title"].split(":")[0] == "The report's experiment"
    assert result["settings"]["dtype"] == "float32"
    assert len(list(pictures.glob("*.png"))) == 4


def test_an_unknown_experiment_is_refused() -> None:
    with pytest.raises(ValueError, match="experiment: must be one of report"):
        attention.main(["speed", "--quick", "--device", "cpu", "--rungs", "blocked"])


def test_errors_on_record(tmp_path: Path) -> None:
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--causal", "--out", str(tmp_path / "result.json")]
    attention_accuracy.main(arguments)
    result = json.loads((tmp_path / "result.json").read_text())
    for dtype in ("fp16", "bf16"):
        errors = result["summary"][f"{dtype}, B1 S128 H2 D64 causal"]
        assert {"standard", "blocked", "fused", "torch-cpu"} <= set(errors)
        assert 0 < errors["blocked"]["rounded"] < errors["standard"]["rounded"] < 1e-2
    assert all(one["met"] for one in result["targets"])


def test_variants_of_sm90_change_a_table_while_they_run() -> None:
    seen: list[tuple[int, bool, bool]] = []

    def call() -> torch.Tensor:
        long, short = attention_sm90.LONG[256], attention_sm90.SHORT[256]
        seen.append((attention_sm90.SECTIONS[256].causal_mb, long.flush, short.flush))
        return torch.empty(0)

    for name in attention_prefill.VARIANTS:
        changed = attention_prefill.variant(name, call, 256)
        assert changed is not None
        changed()
    call()
    assert seen == [(8, False, False), (16, False, False), (32, True, True), (32, False, False)]
    assert attention_prefill.variant("flush", call, 128) is None  # there is room for the queries of two tiles
