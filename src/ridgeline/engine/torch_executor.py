"""Runs StepPlans on a device with torch.

Knows the Runner and how to time it. It must not know requests.
"""

from __future__ import annotations

import time

from ridgeline.core.step import StepPlan, StepResult
from ridgeline.run.runner import Runner


class TorchHandle:
    """A finished step (results are on the host when `run` returns)."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class TorchExecutor:
    """An Executor around a Runner; device_s is the time from dispatch to the results on the host."""

    def __init__(self, runner: Runner) -> None:
        self.runner: Runner | None = runner

    def run(self, plan: StepPlan) -> TorchHandle:
        assert self.runner is not None, "the executor is closed"
        start = time.perf_counter()
        result = self.runner.run(plan)
        result.device_s = time.perf_counter() - start
        return TorchHandle(result)

    def close(self) -> None:
        self.runner = None
