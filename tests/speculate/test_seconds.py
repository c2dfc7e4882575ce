"""Prices from readings: between points, beyond them, and what a reading changes."""

from __future__ import annotations

import random

import pytest

from ridgeline.speculate.seconds import OUTLIER, Seconds, rising


def test_lines_between_points_and_on_beyond_them() -> None:
    seconds = Seconds({1: 1.0, 3: 2.0, 5: 6.0})
    assert [seconds(rows) for rows in (0, 1, 2, 3, 4, 5, 7)] == pytest.approx([1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 10.0])
    assert Seconds({4: 2.0})(8) == pytest.approx(4.0)


def test_it_never_falls() -> None:
    assert rising([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert rising([]) == []
    draw = random.Random(0)
    values = [draw.random() for _ in range(50)]
    risen = rising(values)
    assert risen == sorted(risen)
    assert sum(risen) == pytest.approx(sum(values))


def test_readings_are_found_out() -> None:
    """A machine three times as fast as at the start: seen at one number of rows, believed of all."""
    seconds = Seconds({1: 3.0, 2: 3.3, 9: 6.0})
    for _ in range(200):
        seconds.learn(2, 1.1)
    assert seconds(2) == pytest.approx(1.1, rel=1e-3)
    assert seconds(9) < 5.0
    for _ in range(400):
        seconds.learn(9, 2.0)
        seconds.learn(1, 1.0)
    assert [seconds(rows) for rows in (1, 9)] == pytest.approx([1.0, 2.0], rel=0.05)


def test_one_outlier_is_cut() -> None:
    seconds = Seconds({1: 1.0})
    seconds.learn(1, 1000.0)
    assert 1.0 < seconds(1) < 1.0 + 0.2 * OUTLIER


def test_a_copy_learns_alone() -> None:
    seconds = Seconds({1: 1.0, 2: 2.0})
    seconds.learn(1, 1.5)
    other = seconds.copy()
    assert other(1) == pytest.approx(seconds(1))
    before = seconds(1)
    other.learn(1, 3.0)
    assert seconds(1) == before < other(1)
