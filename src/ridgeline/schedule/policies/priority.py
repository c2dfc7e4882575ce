"""The lowest `priority` value first, then the first to come; the urgent push out the less urgent.

Knows priorities and arrivals. Must not know anything else of a request.
"""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.core.request import Request
from ridgeline.schedule.policy import Policy
from ridgeline.schedule.queue import Queue, Rank


class Priority:
    """Strict priorities: as long as urgent requests come, the others wait."""

    def rank(self, request: Request, arrival: int) -> Rank:
        return (request.priority, arrival)

    def gather(self, queue: Queue, running: int, seats: int, more_to_come: bool) -> None:
        """Nothing to gather: whoever is first may start."""

    def admits(self, request: Request) -> bool:
        return True

    def displaces(self, waiting: Request, running: Request) -> bool:
        return waiting.priority < running.priority

    def victim(self, candidates: Sequence[Request]) -> Request:
        return candidates[-1]


POLICY: type[Policy] = Priority
