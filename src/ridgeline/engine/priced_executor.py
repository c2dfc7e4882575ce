"""Answers a StepPlan with its price: the executor of simulations.

Knows plans and a price in seconds. It must not know models or devices; scheduling and caching around it are
the engine's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ridgeline.core.clock import VirtualClock
from ridgeline.core.step import StepPlan, StepResult, TokenScore


class PricedHandle:
    """A step that has taken its time already."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class PricedExecutor:
    """An Executor that computes nothing: the clock moves on by a step's price, tokens are drawn at random.

    seconds(plan): device time of a step; host_s(plan): time that the engine's own work takes around it on a
    real clock (scheduling, preparation, commit), which a virtual one must be told.
    """

    def __init__(
        self,
        seconds: Callable[[StepPlan], float],
        clock: VirtualClock,
        vocabulary: int,
        host_s: Callable[[StepPlan], float] = lambda plan: 0.0,
        seed: int = 0,
    ) -> None:
        self.seconds = seconds
        self.host_s = host_s
        self.clock = clock
        self.vocabulary = vocabulary
        self._draw = random.Random(seed)

    def run(self, plan: StepPlan) -> PricedHandle:
        result = StepResult(device_s=self.seconds(plan))
        self.clock.advance(result.device_s + self.host_s(plan))
        for chunk in plan.chunks:
            if chunk.sampling is not None:
                result.sampled[chunk.request_id] = TokenScore(self._draw.randrange(self.vocabulary))
        return PricedHandle(result)

    def close(self) -> None: ...
