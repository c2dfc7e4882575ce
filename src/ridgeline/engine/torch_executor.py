"""Runs StepPlans on a device with torch.

Knows the Runner. It must not know requests.
"""

from __future__ import annotations

from ridgeline.core.step import StepPlan
from ridgeline.run.runner import Runner, Step


class TorchExecutor:
    """An Executor around a Runner; device_s is the device's own time, from a step's first copy to its last."""

    def __init__(self, runner: Runner) -> None:
        self.runner: Runner | None = runner

    def run(self, plan: StepPlan) -> Step:
        assert self.runner is not None, "the executor is closed"
        return self.runner.start(plan)

    def close(self) -> None:
        """Wait for what is under way, and let go of all."""
        if self.runner is not None:
            self.runner.close()
        self.runner = None
