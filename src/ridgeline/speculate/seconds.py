"""Seconds of a step by its number of rows, from what steps have taken.

Knows a stopwatch's readings. It must not know what was timed. A price for the sizer that needs no model of the
machine: a few points are measured at start, and every step sharpens them.
"""

from __future__ import annotations

from bisect import bisect_left

SHARE = 0.1
"""How much of a new reading goes into a point."""

OUTLIER = 3.0
"""A reading beyond this many times what was expected is the machine's doing, not the step's: it is cut to that."""


class Seconds:
    """A function of rows: measured points, straight lines between them, never falling."""

    def __init__(self, points: dict[int, float]) -> None:
        """points: rows -> seconds, at least one."""
        self._points = dict(points)
        self._settle()

    def __call__(self, rows: int) -> float:
        known, values = self._rows, self._values
        place = bisect_left(known, rows)
        if place < len(known) and known[place] == rows:
            return values[place]
        if place == 0:
            return values[0]
        if place == len(known):  # beyond the last point: on along the last line
            if len(known) == 1:
                return values[0] * rows / known[0]
            slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
            return values[-1] + slope * (rows - known[-1])
        low, high = known[place - 1], known[place]
        share = (rows - low) / (high - low)
        return values[place - 1] * (1 - share) + values[place] * share

    def learn(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long: the two points around it move."""
        expected = self(rows)
        change = SHARE * (min(seconds, OUTLIER * expected) - expected)
        place = bisect_left(self._rows, rows)
        exact = place < len(self._rows) and self._rows[place] == rows
        for near in self._rows[place : place + 1] if exact else self._rows[max(place - 1, 0) : place + 1]:
            self._points[near] = max(self._points[near] + change, 0.0)
        self._settle()

    def _settle(self) -> None:
        self._rows = sorted(self._points)
        best = 0.0
        self._values = []
        for rows in self._rows:
            best = max(best, self._points[rows])
            self._values.append(best)
