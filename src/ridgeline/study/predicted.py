"""Steps that ran beside what a card says of them: how far off, class of work by class of work.

Knows step records and cards. It must not know how either is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans, StepRecord
from ridgeline.perf.card import Card
from ridgeline.workload.measure import quantile


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """Errors of one class of work, relative: |predicted / measured - 1| at two quantiles, and that of the sum, signed.

    beyond: share of the steps that lie beyond what the card measured.
    """

    kind: str
    steps: int
    median: float
    p90: float
    bias: float
    beyond: float

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True)
class PredictedSteps:
    """points: (class of work, predicted, measured seconds on the device) of every step."""

    points: tuple[tuple[str, float, float], ...]
    rows: tuple[PredictionRow, ...]

    @classmethod
    def of(cls, card: Card, steps: Sequence[StepRecord]) -> PredictedSteps:
        """InvalidArgument if no step ran."""
        points, beyond = [], []
        for one in steps:
            if one.device_s > 0:
                new, visible = zip(*one.spans)
                spans = Spans(new, visible)
                points.append((one.kind, card.device_s(spans, one.rows), one.device_s))
                beyond.append(not card.covers(spans))
        if not points:
            raise InvalidArgument("card", "has nothing to say: no step ran")
        kinds = [kind for kind, _, _ in points]
        rows = [
            _row(kind, [point for point in points if point[0] == kind], [b for k, b in zip(kinds, beyond) if k == kind])
            for kind in sorted(set(kinds))
        ]
        return cls(tuple(points), (*rows, _row("all", points, beyond)))

    def as_dict(self) -> dict[str, Any]:
        return {"rows": [one.as_dict() for one in self.rows]}


def _row(kind: str, points: Sequence[tuple[str, float, float]], beyond: Sequence[bool]) -> PredictionRow:
    errors = sorted(abs(predicted / measured - 1) for _, predicted, measured in points)
    bias = sum(predicted for _, predicted, _ in points) / sum(measured for _, _, measured in points) - 1
    return PredictionRow(
        kind, len(points), quantile(errors, 0.5), quantile(errors, 0.9), bias, sum(beyond) / len(points)
    )
