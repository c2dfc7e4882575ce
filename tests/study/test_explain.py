"""Explained steps: the parts make the whole, impossible results are refused, advice names the worst first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ridgeline import LLM
from ridgeline.cli.main import application
from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans, StepRecord
from ridgeline.perf.card import Card, Grid, Line
from ridgeline.perf.limit import LimitCurve
from ridgeline.perf.timer import TimedCall
from ridgeline.study import explain as study
from ridgeline.study.explain import MeasurementError, _explained, advice, explain, exposed
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


@pytest.mark.slow
def test_the_floor_is_never_above_what_was_measured() -> None:
    """Against the limit curve of this very machine: `explain` refuses an op that is above it by more than 5 %."""
    with LLM(max_num_seqs=4, enable_prefix_caching=False, max_model_len=512) as llm:
        for batch, prompt in ((1, 16), (4, 16), (4, 300)):
            for one in explain(llm.built, equal(batch, prompt, 12), rounds=2):
                assert one.floor_s < one.step_s
                assert 0 < one.limit_share < 1


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


def test_padded_rows_are_told() -> None:
    """Three requests in a graph of four: a fourth of the rows, at the pace of the others."""
    curve = LimitCurve("cpu", ((1024, 1e9),), 1e12)
    with LLM(max_num_seqs=2, enable_prefix_caching=False, max_model_len=64) as llm:
        price = llm.built.price
    spans = Spans((1, 1, 1), (9, 9, 9))
    meter = price.meter(spans, 3)
    calls = [TimedCall(name, meter.kinds[name], cost, 2 * cost.bytes / 1e9 + 1e-9) for name, cost in meter.calls]
    step = StepRecord(0, "decode", ((1, 9),) * 3, 3, 0, 9, 0, 0.0, 1e-4, 0.2, sampled=3, padding=1)
    found = _explained("decode", [step], [calls], [0.2], curve, price)
    whole, without = (price.step(Spans((1,) * n, (1,) * n), n) for n in (4, 3))
    attention = [price.attention(Spans((1,) * n, (1,) * n)).bytes for n in (4, 3)]
    more = whole.bytes - without.bytes - attention[0] + attention[1]
    assert found.padding == 1
    assert found.padding_s == pytest.approx(2 * more / 1e9, rel=0.01)
    assert found.as_dict()["padding_s"] == found.padding_s
    assert _explained("decode", [replace(step, padding=0)], [calls], [0.2], curve, price).padding_s == 0
    wide = replace(found, padding_s=0.1)
    assert "1 rows a step are computed for nobody" in advice(wide)[1]


def test_overlapped_steps_show_what_the_device_waited_for() -> None:
    starts, took = (0.0, 1.0, 2.5, 3.0), (0.9, 1.0, 0.6, 0.5)
    steps = [replace(record(host=0.4, device=device), start_s=start) for start, device in zip(starts, took)]
    found = exposed(steps)
    assert [one.host_s for one in found] == pytest.approx([0.1, 0.5, 0.0])
    assert [one.device_s for one in found] == [0.9, 1.0, 0.6]


def a_card() -> Card:
    """Of the embedded model, as small as a card can be."""
    return Card(
        device="here",
        model="model",
        dtype="float32",
        made="",
        body=Line(((1, 4e-4), (8, 5e-4))),
        head=Line(((1, 1e-4),)),
        decode=Grid((1,), (1, 16), ((1e-4, 2.5e-4),)),
        prefill=Grid((8,), (0,), ((1e-4,),)),
        longest=16,
        step_s=1e-4,
        request_s=0.0,
        ops_scale=1.0,
        host_step_s=1e-4,
        host_request_s=0.0,
        loop_step_s=1e-5,
        loop_request_s=0.0,
        residual=0.07,
    )


def test_a_card_beside_the_steps() -> None:
    card = a_card()
    curve = LimitCurve("cpu", ((1024, 1e9),), 1e12)
    call = TimedCall("linear", "contraction", Cost(flops=1e6, read_bytes=1e5), 0.9e-3)
    step = replace(record(), sampled=1)
    found = _explained(
        "decode", [step, replace(step, spans=((1, 17),))], [[call]], [1.2e-3], curve, card=card
    ).predicted
    assert found is not None
    assert found.attention_s == pytest.approx((card.decode(1, 9) + card.decode(1, 17)) / 2)
    assert (found.other_ops_s, found.around_s, found.host_s) == pytest.approx((5e-4, 1e-4, 1e-4))
    assert found.step_s == pytest.approx((1 + found.error) * 1.1e-3)
    assert (found.residual, found.beyond) == (0.07, 0.5)


def test_a_limit_that_was_measured_too_low_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    low = LimitCurve("cpu", ((1 << 15, 1e6),), 1e6)  # nothing is as slow as that: all ops come out above it
    answers = iter([low, SLOW, low, low])
    monkeypatch.setattr(study, "measure_curve", lambda device, dtype, own: next(answers))
    with LLM(max_num_seqs=1, enable_prefix_caching=False, max_model_len=64) as llm:
        assert explain(llm.built, equal(1, 8, 4), rounds=1)[0].curve.flops_per_s == 1e15
        with pytest.raises(MeasurementError, match="above what this machine can do"):
            explain(llm.built, equal(1, 8, 4), rounds=1)


@pytest.mark.usefixtures("slow_limit")
def test_card_and_picture(tmp_path: Path) -> None:
    common = ("explain", "--prompt-len", "8", "--output-len", "4", "--rounds", "1")
    made = a_card()
    made.save(tmp_path / "card.json")
    arguments = [*common, "--card", str(tmp_path / "card.json"), "--plot", str(tmp_path / "steps.svg")]
    shown = CliRunner(env={"COLUMNS": "120"}).invoke(application, arguments, catch_exceptions=False).stdout
    assert "card, ms" in shown
    assert "its own error bar is 7.0%" in " ".join(shown.split())
    assert (tmp_path / "steps.svg").stat().st_size > 10_000
    replace(made, model="another").save(tmp_path / "card.json")
    with pytest.raises(InvalidArgument, match="card: is of another in float32"):
        CliRunner().invoke(application, arguments, catch_exceptions=False)


@pytest.mark.usefixtures("slow_limit")
def test_the_demo_ends_with_a_short_table() -> None:
    arguments = ["generate", "x = 1", "--max-tokens", "4", "--explain"]
    done = CliRunner().invoke(application, arguments, catch_exceptions=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert any("where a decode step's" in line for line in lines)
    assert any("around the ops" in line for line in lines)
    assert len(lines) < 20
    with pytest.raises(InvalidArgument, match="explain: goes with one PROMPT"):
        CliRunner().invoke(application, [*arguments, "--json"], catch_exceptions=False)


@pytest.mark.usefixtures("slow_limit")
def test_command() -> None:
    arguments = ["explain", "--prompt-len", "8", "--output-len", "4", "--rounds", "1", "--json"]
    found = json.loads(CliRunner().invoke(application, arguments, catch_exceptions=False).stdout)
    keys = {"kind", "steps", "step_s", "floor_s", "kernels_s", "gaps_s", "host_s", "padding_s", "limit_share", "ops"}
    assert all(keys <= set(one) for one in found["steps"])
    with pytest.raises(InvalidArgument, match="batch"):
        CliRunner().invoke(application, ["explain", "--batch", "0"], catch_exceptions=False)
    assert torch.get_num_threads() >= 1
