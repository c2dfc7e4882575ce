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


def test_rows_are_free_up_to_the_next_size() -> None:
    """A step of 17 rows runs at 32, one of 16 at 16; beyond the last size there are straight lines again."""
    seconds = Seconds({16: 1.0, 32: 1.5, 64: 2.5}, sizes=(16, 32, 64))
    assert [seconds(rows) for rows in (1, 16, 17, 32, 33, 64, 96)] == pytest.approx([1.0, 1.0, 1.5, 1.5, 2.5, 2.5, 3.5])
    for _ in range(300):
        seconds.learn(17, 2.0)
        seconds.learn(3, 1.0)
    assert seconds(32) == pytest.approx(2.0, rel=0.05)
    assert seconds(16) == pytest.approx(1.0, rel=0.05)
    assert seconds.copy()(18) == seconds(32)
