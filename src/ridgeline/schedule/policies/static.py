"""Naive batching, as lectures draw it: collect a batch, run it to its end, collect the next.

Knows who is in the batch. Must not know anything else of a request. It is here to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.core.request import Request
from ridgeline.schedule.policy import Policy
from ridgeline.schedule.queue import Queue, Rank


class Static:
    """A batch is the first b waiting requests, b being the seats; nobody joins until all of it have ended.

    It starts when b are waiting; with fewer, only when no more are known to come. A member that finds no
    blocks, or loses them, stays in the batch. Samples that follow a leader count as members of their own.
    """

    def __init__(self) -> None:
        # The requests themselves, not their ids: an id may come back once its request has ended.
        self._batch: frozenset[Request] = frozenset()

    def rank(self, request: Request, arrival: int) -> Rank:
        return (arrival,)

    def gather(self, queue: Queue, running: int, seats: int, more_to_come: bool) -> None:
        if running or any(queue.get(member.request_id) is member for member in self._batch):
            return
        enough = len(queue) >= seats or not more_to_come
        self._batch = frozenset(queue.first(seats)) if enough else frozenset()

    def admits(self, request: Request) -> bool:
        return request in self._batch

    def displaces(self, waiting: Request, running: Request) -> bool:
        return False

    def victim(self, candidates: Sequence[Request]) -> Request:
        return candidates[-1]


POLICY: type[Policy] = Static
