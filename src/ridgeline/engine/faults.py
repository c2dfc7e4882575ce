"""Faults on order: what tests and soaks let go wrong in a step, at a named point.

Knows plans. It must not know requests' owners; and nothing here runs unless the engine's owner allowed it.
"""

from __future__ import annotations

import os
import signal
import time

from ridgeline.core.request import Constraint
from ridgeline.core.step import StepPlan
from ridgeline.engine.executor import Executor, Handle

KINDS = ("token", "raise", "memory", "device", "grammar", "hang", "kill", "slow")


ERRORS: dict[str, Exception] = {
    "raise": RuntimeError("a fault on order"),
    "memory": MemoryError("a fault on order"),
    "device": RuntimeError("CUDA error: a fault on order"),
}


class _BreakingConstraint:
    """Raises when it has taken a token."""

    def __init__(self, inner: Constraint) -> None:
        self._inner = inner
        self._taken = False

    def mask(self) -> bytes:
        if self._taken:
            raise RuntimeError("a fault on order")
        return self._inner.mask()

    def accept(self, token: int) -> bool:
        self._taken = True
        return self._inner.accept(token)


class FaultyExecutor:
    """An executor in which things go wrong when told to.

    order(kind, value): "token": every step with a request whose tokens hold the id `value` raises; "raise",
    "memory", "device": the next `value` steps raise, the second for want of memory, the third as a lost device does;
    "grammar": the next `value` grammars raise at their second token; "hang": the next step never ends;
    "kill": the process is killed in the next step; "slow": from now on a step takes `value` ms longer.
    """

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self._poisonous: set[int] = set()
        self._raises = {"raise": 0, "memory": 0, "device": 0}
        self._grammars = 0
        self._hangs = self._kills = False
        self._slower_s = 0.0

    def order(self, kind: str, value: int) -> None:
        """Raises ValueError for a kind that is not one of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"no fault is called {kind!r}")
        if kind == "token":
            self._poisonous.add(value)
        elif kind in self._raises:
            self._raises[kind] = value
        elif kind == "grammar":
            self._grammars = value
        elif kind == "slow":
            self._slower_s = value / 1e3
        else:
            self._hangs, self._kills = kind == "hang", kind == "kill"

    def constraint(self, inner: Constraint) -> Constraint:
        """A grammar, made to break if that was ordered."""
        if not self._grammars:
            return inner
        self._grammars -= 1
        return _BreakingConstraint(inner)

    def run(self, plan: StepPlan) -> Handle:
        if self._kills:
            os.kill(os.getpid(), signal.SIGKILL)
        while self._hangs:
            time.sleep(60)
        if self._slower_s:
            time.sleep(self._slower_s)
        for kind, error in ERRORS.items():
            if self._raises[kind]:
                self._raises[kind] -= 1
                raise error
        for chunk in plan.chunks:
            if chunk.sampling is not None and self._poisonous.intersection(chunk.sampling.tokens):
                raise RuntimeError("a fault on order")
        return self.inner.run(plan)

    def close(self) -> None:
        self.inner.close()
