"""First come, first served; the last to come is the first to yield its blocks.

Knows arrivals. Must not know anything else of a request.
"""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.core.request import Request
from ridgeline.schedule.policy import Policy
from ridgeline.schedule.queue import Queue, Rank


class FirstComeFirstServed:
    """Continuous batching in order of arrival (Orca, Yu et al., OSDI 2022)."""

    def rank(self, request: Request, arrival: int) -> Rank:
        return (arrival,)

    def gather(self, queue: Queue, running: int, seats: int, more_to_come: bool) -> None:
        """Nothing to gather: whoever is first may start."""

    def admits(self, request: Request) -> bool:
        return True

    def displaces(self, waiting: Request, running: Request) -> bool:
        return False

    def victim(self, candidates: Sequence[Request]) -> Request:
        return candidates[-1]


POLICY: type[Policy] = FirstComeFirstServed
