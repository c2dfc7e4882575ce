"""Explained steps: the parts make the whole, impossible results are refused, advice names the worst first."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from ridgeline import LLM
from ridgeline.cli.main import application
from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import StepRecord
from ridgeline.perf.limit import LimitCurve
from ridgeline.perf.timer import TimedCall
from ridgeline.study import explain as study
from ridgeline.study.explain import MeasurementError, _explained, explain
from ridgeline.workload.arrivals import equal

SLOW = LimitCurve("cpu", ((1 << 15, 1e13),), 1e15)
"""A machine so fast that nothing here comes near: what is measured is never above the limit."""


@pytest.fixture
def slow_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "measure_curve", lambda device, dtype, own: SLOW)
    return


@pytest.mark.usefixtures("slow_limit")
def test_the_parts_make_the_step() -> None:
    with LLM(max_num_seqs=2, enable_prefix_caching=False, max_model_len=128) as llm:
        steps = explain(llm.built, equal(2, 20, 6), rounds=2)
        assert not llm.built.engine.listeners
        assert not llm.built.engine.has_work
    kinds = {one.kind: one for one in steps}
    assert set(kinds) == {"prefill", "decode"}
    decode = kinds["decode"]
    assert decode.tokens == 2
    assert decode.steps == 2 * 5
    assert {one.op for one in decode.ops} >= {"linear", "attention", "norm", "rope_kv_write", "sample"}
    for one in steps:
        parts = one.floor_s + one.kernels_s + one.gaps_s + one.host_s
        assert parts == pytest.approx(one.step_s)
        assert 0 < one.limit_share < 1
        assert one.advice


def record(kind: str = "decode", host: float = 1e-4, device: float = 1e-3) -> StepRecord:
    return StepRecord(0, kind, ((1, 9),), 1, 0, 9, 0, 0.0, host, device)


def test_faster_than_the_limit_is_an_error_of_measurement() -> None:
    curve = LimitCurve("cpu", ((1024, 1e9),), 1e12)
    call = TimedCall("linear", "contraction", Cost(flops=1e6, read_bytes=1e6), 0.9e-3)
    with pytest.raises(
        MeasurementError, match=r"linear \(decode\) took 900.0 µs a step where the limit .* is 1000.0 µs"
    ):
        _explained("decode", [record()], [[call]], [1.2e-3], curve)
    just = TimedCall("linear", "contraction", Cost(flops=1e6, read_bytes=1e6), 0.96e-3)
    found = _explained("decode", [record()], [[just]], [1.2e-3], curve)
    assert found.gaps_s == pytest.approx(0.04e-3)
    assert found.observer_s == pytest.approx(0.1e-3)


def test_worst_offenders_first() -> None:
    curve = LimitCurve("cpu", ((1024, 1e9),), 1e12)
    calls = [
        TimedCall("attention", "contraction", Cost(read_bytes=1e5), 2e-4),
        TimedCall("linear", "contraction", Cost(read_bytes=1e5), 6e-4),
        TimedCall("norm", "normalization", Cost(read_bytes=1e3), 2e-6),
    ]
    found = _explained("decode", [record(host=3e-4, device=1e-3)], [calls], [1.3e-3], curve)
    starts = [sentence.split(" ")[0] for sentence in found.advice]
    assert starts == ["linear", "scheduling", "between", "attention"]
    assert not any("norm" in sentence.split(" ")[0] for sentence in found.advice)


@pytest.mark.usefixtures("slow_limit")
def test_command() -> None:
    arguments = ["explain", "--prompt-len", "8", "--output-len", "4", "--rounds", "1", "--json"]
    found = json.loads(CliRunner().invoke(application, arguments, catch_exceptions=False).stdout)
    keys = {"kind", "steps", "step_s", "floor_s", "kernels_s", "gaps_s", "host_s", "padding_s", "limit_share", "ops"}
    assert all(keys <= set(one) for one in found["steps"])
    with pytest.raises(InvalidArgument, match="batch"):
        CliRunner().invoke(application, ["explain", "--batch", "0"], catch_exceptions=False)
    assert torch.get_num_threads() >= 1
