"""What runs a StepPlan: a device, or its price. The engine cannot tell which.

Knows the contract only.
"""

from __future__ import annotations

from typing import Protocol

from ridgeline.core.step import StepPlan, StepResult


class Handle(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step and return what it produced."""
        ...


class Executor(Protocol):
    """Runs steps in the order given."""

    def run(self, plan: StepPlan) -> Handle: ...

    def close(self) -> None:
        """Give back all memory. No run may follow."""
        ...
