"""Seconds of a step from its spans, in microseconds of work: what schedulers, planners and simulations ask.

Knows a model's Price and a function from an op's cost to seconds (the floor of a machine, or a calibrated one).
It must not know where those seconds come from.

All but attention depends on the numbers of tokens and of sampled rows alone, so it is tabulated over few of
them and interpolated: between two points of the grid every op's time is near to linear.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from ridgeline.core.cost import Cost
from ridgeline.core.step import Spans
from ridgeline.perf.meter import Meter
from ridgeline.perf.price import Price

OpSeconds = Callable[[str, str, Cost], float]
"""(op's name, its kind, its cost) -> seconds of one call."""

EXACT = 16
"""Numbers up to which every one is a point of the grid."""
PER_OCTAVE = 4


class Table:
    """A function of a positive integer, evaluated on a grid that thins out, linear in between."""

    def __init__(self, function: Callable[[int], float]) -> None:
        self._function = function
        self._known: dict[int, float] = {}
        self._grid = list(range(EXACT + 1))

    def __call__(self, number: int) -> float:
        while self._grid[-1] < number:
            exponent = len(self._grid) - EXACT
            self._grid.append(round(EXACT * 2 ** (exponent / PER_OCTAVE)))
        place = bisect_left(self._grid, number)
        above = self._grid[place]
        if above == number:
            return self._at(number)
        below = self._grid[place - 1]
        share = (number - below) / (above - below)
        return self._at(below) * (1 - share) + self._at(above) * share

    def _at(self, number: int) -> float:
        if number not in self._known:
            self._known[number] = self._function(number)
        return self._known[number]


class StepSeconds:
    """Predicted seconds of steps of one model.

    op_s: seconds of one call of an op. step_s, request_s: what every step, and every request in it, takes beside
    its ops (launch gaps, the host).
    """

    def __init__(self, price: Price, op_s: OpSeconds, step_s: float = 0.0, request_s: float = 0.0) -> None:
        self.price = price
        self.op_s = op_s
        self.step_s = step_s
        self.request_s = request_s
        self._body = Table(lambda tokens: self._metered(tokens, 0))
        self._head = Table(lambda rows: self._metered(rows, rows) - self._metered(rows, 0))

    def __call__(self, spans: Spans, rows: int) -> float:
        """Seconds of a step with these spans that samples `rows` rows."""
        attention = sum(times * self.op_s("attention", "contraction", cost) for times, cost in self.price.calls(spans))
        overhead = self.step_s + self.request_s * len(spans.new)
        return overhead + self.dense(sum(spans.new), rows) + attention

    def dense(self, tokens: int, rows: int) -> float:
        """Seconds of all ops but attention."""
        return self._body(tokens) + (self._head(rows) if rows else 0.0)

    def _metered(self, tokens: int, rows: int) -> float:
        """All ops but attention, of `tokens` tokens of which `rows` are sampled."""
        if not tokens:
            return 0.0
        meter: Meter = self.price.meter(Spans((1,) * tokens, (1,) * tokens), rows)
        return sum(self.op_s(name, meter.kinds[name], cost) for name, cost in meter.calls if name != "attention")
