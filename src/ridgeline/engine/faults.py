"""Faults on order: what tests and soaks let go wrong in a step, at a named point.

Knows plans. It must not know requests' owners; and nothing here runs unless the engine's owner allowed it.
"""

from __future__ import annotations

import os
import signal
import time

from ridgeline.core.step import StepPlan
from ridgeline.engine.executor import Executor, Handle

KINDS = ("token", "raise", "memory", "hang", "kill", "slow")


class FaultyExecutor:
    """An executor in which things go wrong when told to.

    order(kind, value): "token": every step with a request whose tokens hold the id `value` raises; "raise",
    "memory": the next `value` steps raise, the latter for want of memory; "hang": the next step never ends;
    "kill": the process is killed in the next step; "slow": from now on a step takes `value` ms longer.
    """

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self._poisonous: set[int] = set()
        self._raises = {"raise": 0, "memory": 0}
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
        elif kind == "slow":
            self._slower_s = value / 1e3
        else:
            self._hangs, self._kills = kind == "hang", kind == "kill"

    def run(self, plan: StepPlan) -> Handle:
        if self._kills:
            os.kill(os.getpid(), signal.SIGKILL)
        while self._hangs:
            time.sleep(60)
        if self._slower_s:
            time.sleep(self._slower_s)
        for kind, error in (("raise", RuntimeError), ("memory", MemoryError)):
            if self._raises[kind]:
                self._raises[kind] -= 1
                raise error("a fault on order")
        for chunk in plan.chunks:
            if chunk.sampling is not None and self._poisonous.intersection(chunk.sampling.tokens):
                raise RuntimeError("a fault on order")
        return self.inner.run(plan)

    def close(self) -> None:
        self.inner.close()
