"""What a step will take, said before it runs: its floor under the machine's roofs, times what steps like it took.

Knows the performance model and plans. It must not know requests. What is learned is one number a
class of work and size: how many times its floor such a step takes, a mean that forgets. A class that was not seen yet
is judged by its nearest relative; the very first step by its floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.core.step import Spans, StepPlan, StepRecord
from ridgeline.engine.build import Built
from ridgeline.perf.roofline import Roofline
from ridgeline.perf.roofs import roofs_here
from ridgeline.perf.step_floor import StepFloor
from ridgeline.run.prepare import spans_of

Counted = Callable[[Spans, int], tuple[float, float]]
"""(spans, sampled rows) -> (FLOPs, bytes): a StepFloor."""

MEMORY = 0.1
"""Weight of the newest step in what was learned."""
MOST_WAITING = 64
"""Steps that were foretold and never told of (they failed) are forgotten beyond this."""


@dataclass(frozen=True, slots=True)
class Foretold:
    """A step's floor, as FLOPs, bytes, and seconds under the roofs; and what it is like."""

    flops: float
    bytes: float
    floor_s: float
    like: tuple[str, int]


class Forecast:
    """Asked before every step (`predict`) and told of each afterwards (`learn`)."""

    def __init__(self, counted: Counted, roofline: Roofline) -> None:
        self.roofline = roofline
        self._counted = counted
        self._factors: dict[tuple[str, int], float] = {}
        self._waiting: dict[int, Foretold] = {}

    def predict(self, plan: StepPlan) -> float:
        """Seconds on the device."""
        spans = spans_of(plan)
        rows = sum((chunk.sampling is not None) + len(chunk.behind) for chunk in plan.chunks)
        flops, moved = self._counted(spans, rows)
        floor_s = self.roofline.seconds(Cost(flops, moved))
        like = plan.kind, sum(spans.new).bit_length()
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.clear()
        self._waiting[plan.number] = Foretold(flops, moved, floor_s, like)
        return floor_s * self._factor(like)

    def floors(self, seats: int, tokens: int, context: int) -> dict[str, list[list[float]]]:
        """Least seconds of decode steps by requests, each with so much context, and of prefill steps by tokens."""

        def floor_s(spans: Spans, rows: int) -> float:
            return self.roofline.seconds(Cost(*self._counted(spans, rows)))

        decode = [[float(rows), floor_s(Spans((1,) * rows, (context,) * rows), rows)] for rows in _powers(seats)]
        prefill = [[float(new), floor_s(Spans((new,), (new,)), 1)] for new in _powers(tokens)]
        return {"decode": decode, "prefill": prefill}

    def learn(self, record: StepRecord) -> Foretold | None:
        """A step has ended; what was foretold of it, None if nothing was."""
        found = self._waiting.pop(record.number, None)
        if found is None or record.device_s <= 0 or found.floor_s <= 0:
            return found
        taken = record.device_s / found.floor_s
        known = self._factors.get(found.like)
        self._factors[found.like] = taken if known is None else known + MEMORY * (taken - known)
        return found

    def _factor(self, like: tuple[str, int]) -> float:
        """Times its floor that such a step takes."""
        if like in self._factors or not self._factors:
            return self._factors.get(like, 1.0)
        kind, size = like
        near = min(self._factors, key=lambda one: (one[0] != kind, abs(one[1] - size)))
        return self._factors[near]


def _powers(most: int) -> list[int]:
    """1, 2, 4, … and the most."""
    return [*(1 << exponent for exponent in range((most - 1).bit_length())), most]


def forecast_of(built: Built, given: Mapping[str, Any]) -> tuple[Forecast | None, dict[str, Any]]:
    """An engine's forecast, and its roofs as messages have them; (None, {}) where nobody knows the roofs.

    given: the roofs, if they were found before.
    """
    if given:
        values = dict(given)
    else:
        config = built.config
        found = roofs_here(torch.device(config.device), config.dtype, built.ledger.weight_bytes)
        if found is None:
            return None, {}
        values = {**asdict(found[0]), "source": found[1]}
    roofline = Roofline(values["matrix_flops"], values["vector_flops"], values["bytes_per_s"])
    return Forecast(StepFloor(built.price, built.config.max_num_batched_tokens), roofline), values
