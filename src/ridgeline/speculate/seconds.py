"""Seconds of a step by its number of rows, from what steps have taken.

Knows a stopwatch's readings. It must not know what was timed. A price for the sizer that needs no model of the
machine: a few points are measured at start, and every step sharpens them.

A choice compares numbers of rows, of which few are seen while it holds. So a reading moves all points a little
(contexts grow, a machine slows down: that is common to all) and those beside it more.

Steps that are captured have sizes, and up to the next one rows cost nothing: a straight line between two of them would
say that a full step costs nearly what the next larger one does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

COMMON, OWN = 0.05, 0.1
"""How much of what a reading is off by goes into all points, and how much of the rest into those beside it."""

OUTLIER = 3.0
"""A reading beyond this many times what was expected is the machine's doing, not the step's: it is cut to that."""


class Seconds:
    """A function of rows: measured points, straight lines between them, never falling."""

    def __init__(self, points: dict[int, float], sizes: Sequence[int] = ()) -> None:
        """points: rows -> seconds, at least one. sizes: numbers of rows that steps are padded to."""
        self.sizes = tuple(sorted(sizes))
        self._rows = sorted(points)
        self._points = [points[rows] for rows in self._rows]
        self._scale = 1.0
        self._values = rising(self._points)

    def __call__(self, rows: int) -> float:
        known, values = self._rows, self._values
        rows = self._padded(rows)
        place = bisect_left(known, rows)
        if place < len(known) and known[place] == rows:
            return self._scale * values[place]
        if place == 0:
            return self._scale * values[0]
        if place == len(known):  # beyond the last point: on along the last line
            if len(known) == 1:
                return self._scale * values[0] * rows / known[0]
            slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
            return self._scale * (values[-1] + slope * (rows - known[-1]))
        low, high = known[place - 1], known[place]
        share = (rows - low) / (high - low)
        return self._scale * (values[place - 1] * (1 - share) + values[place] * share)

    def copy(self) -> Seconds:
        """The same function, which learns by itself from here on."""
        return Seconds({rows: self._scale * value for rows, value in zip(self._rows, self._points)}, self.sizes)

    def _padded(self, rows: int) -> int:
        place = bisect_left(self.sizes, rows)
        return self.sizes[place] if place < len(self.sizes) else rows

    def learn(self, rows: int, seconds: float, own: float = OWN) -> None:
        """A step of so many rows took so long. own: how much of what that is off by goes into the points beside it."""
        expected = self(rows)
        if expected <= 0.0:
            return
        off = min(seconds / expected, OUTLIER) - 1.0
        self._scale *= 1.0 + COMMON * off
        rows = self._padded(rows)
        place = bisect_left(self._rows, rows)
        exact = place < len(self._rows) and self._rows[place] == rows
        beside = range(place, place + 1) if exact else range(max(place - 1, 0), min(place + 1, len(self._rows)))
        for near in beside:
            self._points[near] *= 1.0 + own * (off - COMMON * off)
        self._values = rising(self._points)


def rising(values: Sequence[float]) -> list[float]:
    """The nearest numbers that never fall: runs that fall become their mean."""
    runs: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while runs and runs[-1][0] * count > total * runs[-1][1]:
            above, more = runs.pop()
            total, count = total + above, count + more
        runs.append((total, count))
    return [total / count for total, count in runs for _ in range(count)]
