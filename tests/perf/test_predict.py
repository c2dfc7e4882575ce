"""Predicted seconds of steps: exact where they must be, near where the grid is thin, and quick."""

from __future__ import annotations

import time

import pytest
import torch

from ridgeline.core.step import Spans
from ridgeline.models import build_model, parse_config
from ridgeline.perf.hardware import find
from ridgeline.perf.predict import StepSeconds, Table
from ridgeline.perf.price import Price
from ridgeline.perf.roofline import Roofline

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def price() -> Price:
    return Price(build_model(parse_config(CONFIG), torch.device("meta"), torch.bfloat16, 4096), 64, torch.bfloat16)


def exact(price: Price, spans: Spans, rows: int, roofline: Roofline) -> float:
    meter = price.meter(spans, rows)
    return sum(roofline.seconds(cost, meter.kinds[name]) for name, cost in meter.calls)


@pytest.mark.parametrize(
    ("new", "visible"),
    [((1,), (700,)), ((1,) * 23, (900,) * 23), ((300,), (300,)), ((1,) * 77 + (901,), (64,) * 77 + (1000,))],
)
def test_near_the_sum_of_the_floors(price: Price, new: tuple[int, ...], visible: tuple[int, ...]) -> None:
    roofline = Roofline.of(find("h200"), "bfloat16")
    seconds = StepSeconds(price, lambda name, kind, cost: roofline.seconds(cost, kind))
    spans = Spans(new, visible)
    tolerance = 1e-9 if len(new) == 1 and new[0] == 1 else 0.02
    assert seconds(spans, len(new)) == pytest.approx(exact(price, spans, len(new), roofline), rel=tolerance)


def test_overheads_are_added(price: Price) -> None:
    seconds = StepSeconds(price, lambda name, kind, cost: 0.0, step_s=1.0, request_s=0.5)
    assert seconds(Spans((1, 1, 4), (5, 6, 7)), 3) == 2.5


def test_microseconds_once_cached(price: Price) -> None:
    roofline = Roofline.of(find("h200"), "bfloat16")
    seconds = StepSeconds(price, lambda name, kind, cost: roofline.seconds(cost, kind))
    spans = Spans((1,) * 64, tuple(range(500, 564)))
    seconds(spans, 64)
    best = min(_timed(lambda: seconds(spans, 64)) for _ in range(50))
    assert best < 500e-6


def _timed(call: object) -> float:
    assert callable(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_the_table_is_exact_on_its_grid_and_linear_between() -> None:
    asked: list[int] = []

    def square(number: int) -> float:
        asked.append(number)
        return float(number * number)

    table = Table(square)
    assert [table(one) for one in (0, 3, 16, 32, 64)] == [0, 9, 256, 1024, 4096]
    assert 57 * 57 <= table(57) <= 57 * 57 * 1.01
    count = len(asked)
    table(57)
    assert len(asked) == count
