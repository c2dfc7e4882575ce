"""What a policy decides: who goes first, who may start, who must yield.

Knows requests and counts. Must not know blocks or budgets: the scheduler asks a policy only when it matters,
and keeps the promises (no deadlock, no starvation of the first in rank) whatever the policy answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ridgeline.core.request import Request
from ridgeline.schedule.queue import Queue, Rank


class Policy(Protocol):
    """One way of ordering requests. A file in `policies/` whose `POLICY` names such a class is a policy."""

    def rank(self, request: Request, arrival: int) -> Rank:
        """Place of a request among all others, fixed when it is added: lower goes first.

        arrival: 0 for the first request ever added, and so on; with it in the rank no two are alike.
        """
        ...

    def gather(self, queue: Queue, running: int, seats: int, more_to_come: bool) -> None:
        """Called once a step before anyone is admitted, with the number of running requests and all seats.

        more_to_come: somebody knows that further requests will arrive.
        """
        ...

    def admits(self, request: Request) -> bool:
        """Whether the first of the queue may start now. If not, nobody behind it may either.

        Once nothing runs and no more is to come, it must be True, or the engine would stand still.
        """
        ...

    def displaces(self, waiting: Request, running: Request) -> bool:
        """Whether a running request must yield its seat or blocks to a waiting one.

        Only ever True for one that ranks behind the waiting one.
        """
        ...

    def victim(self, candidates: Sequence[Request]) -> Request:
        """Who yields blocks: one of the given running requests, which are in rank order, at least one."""
        ...
