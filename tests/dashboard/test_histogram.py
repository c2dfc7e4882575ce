"""Distributions of the recent past: edges, counts, quantiles, and what is forgotten."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from ridgeline.dashboard.histogram import EDGES_S, Histogram


def test_edges_rise_twenty_a_decade() -> None:
    assert all(low < high for low, high in pairwise(EDGES_S))
    assert (EDGES_S[0], EDGES_S[-1]) == (1e-5, 100.0)
    assert EDGES_S.index(1.0) - EDGES_S.index(0.1) == 20


def test_nothing_observed_has_no_quantiles() -> None:
    assert Histogram(60).as_dict(0.0) == {
        "count": 0, "edges_s": [], "counts": [], "p50_s": None, "p90_s": None, "p99_s": None,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_every_value_is_in_the_bar_that_its_edges_say(seed: int) -> None:
    draw = random.Random(seed)
    values = [10 ** draw.uniform(-6, 2.5) for _ in range(300)]
    histogram = Histogram(60)
    for value in values:
        histogram.add(0.0, value)
    found = histogram.as_dict(1.0)
    edges, counts = found["edges_s"], found["counts"]
    assert len(edges) == len(counts) + 1
    assert sum(counts) == found["count"] == len(values)
    assert counts[0]
    assert counts[-1]
    for count, low, high in zip(counts, edges, edges[1:]):
        assert count == sum(low < value <= high for value in values)


def test_quantiles_are_values_that_were_seen() -> None:
    histogram = Histogram(60)
    for value in range(1, 101):
        histogram.add(0.0, value / 1000)
    found = histogram.as_dict(0.0)
    assert (found["p50_s"], found["p90_s"], found["p99_s"]) == (0.051, 0.091, 0.100)


def test_the_past_is_forgotten() -> None:
    histogram = Histogram(window_s=60, most=10)
    histogram.add(0.0, 5.0)
    histogram.add(30.0, 1.0)
    assert histogram.as_dict(60.0)["count"] == 2
    assert histogram.as_dict(60.1)["count"] == 1
    for number in range(50):
        histogram.add(61.0, number + 1.0)
    assert histogram.as_dict(61.0)["count"] == 10
