"""Forecasts: floors at first, then what steps like these took; nothing is kept of steps that failed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, Spans, StepPlan, StepRecord
from ridgeline.core.tree import TokenTree
from ridgeline.engine.forecast import MOST_WAITING, Forecast
from ridgeline.perf.roofline import Roofline

ROOFLINE = Roofline(matrix_flops=1e12, vector_flops=1e12, bytes_per_s=1e11)


def counted(spans: Spans, rows: int) -> tuple[float, float]:
    """A model that reads 1 GB a step and 1 MB a token and a row."""
    return 1e6 * sum(spans.new), 1e9 + 1e6 * (sum(spans.new) + rows)


def plan(number: int, *new: int, tree: TokenTree | None = None) -> StepPlan:
    sampling = Sampling(SamplingParams(), 0, 1, (), 1)
    behind = () if tree is None else (sampling,) * len(tree)
    chunks = tuple(
        Chunk(f"r{at}", (1,) * count, 5, (0,), sampling, tree=tree, behind=behind) for at, count in enumerate(new)
    )
    return StepPlan(number, chunks)


def record(of: StepPlan, device_s: float) -> StepRecord:
    return StepRecord(
        number=of.number, kind=of.kind, spans=(), running=1, waiting=0, free_blocks=1, preempted=0, start_s=0.0,
        host_s=0.0, device_s=device_s,
    )  # fmt: skip


def test_the_first_step_is_foretold_by_its_floor() -> None:
    forecast = Forecast(counted, ROOFLINE)
    one = plan(1, 1, 1)
    assert forecast.predict(one) == pytest.approx(1.004e9 / 1e11)
    found = forecast.learn(record(one, 0.02))
    assert found is not None
    assert (found.flops, found.bytes, found.floor_s) == (2e6, 1.004e9, pytest.approx(0.01004))


def test_steps_of_a_kind_are_learned_and_forgotten_slowly() -> None:
    forecast = Forecast(counted, ROOFLINE)
    for number in range(3):
        step = plan(number, 1, 1)
        forecast.predict(step)
        forecast.learn(record(step, 0.02008))  # twice the floor
    assert forecast.predict(plan(3, 1, 1)) == pytest.approx(0.02008)
    for number in range(100):
        step = plan(number, 1, 1)
        forecast.predict(step)
        forecast.learn(record(step, 0.03012))
    assert forecast.predict(plan(100, 1, 1)) == pytest.approx(0.03012, rel=1e-3)


def test_an_unknown_class_is_judged_by_its_nearest_relative() -> None:
    forecast = Forecast(counted, ROOFLINE)
    for step, factor in ((plan(0, 1), 2.0), (plan(1, *(1,) * 64), 3.0), (plan(2, 40), 5.0)):
        floor_s = forecast.predict(step) if step.number == 0 else None
        if floor_s is None:
            forecast.predict(step)
        tokens = step.num_tokens
        floor_s = (1e9 + 1e6 * (tokens + len(step.chunks))) / 1e11
        forecast.learn(record(step, factor * floor_s))
    assert forecast.predict(plan(3, 1, 1)) == pytest.approx(2.0 * 1.004e9 / 1e11)
    assert forecast.predict(plan(4, *(1,) * 40)) == pytest.approx(3.0 * 1.08e9 / 1e11)
    assert forecast.predict(plan(5, 300)) == pytest.approx(5.0 * 1.301e9 / 1e11)


def test_rows_of_trees_are_counted() -> None:
    forecast = Forecast(counted, ROOFLINE)
    step = plan(1, 1, tree=TokenTree.chain((3, 4)))
    assert forecast.predict(step) == pytest.approx((1e9 + 1e6 * (3 + 3)) / 1e11)


def test_steps_that_never_end_are_not_kept() -> None:
    forecast = Forecast(counted, ROOFLINE)
    for number in range(10 * MOST_WAITING):
        forecast.predict(plan(number, 1))
    assert len(forecast._waiting) <= MOST_WAITING
    assert forecast.learn(record(plan(0, 1), 0.1)) is None
    last = plan(10 * MOST_WAITING - 1, 1)
    assert forecast.learn(replace(record(last, 0.0))) is not None  # no time: nothing is learned
    assert forecast.predict(plan(9999, 1)) == pytest.approx(1.002e9 / 1e11)
