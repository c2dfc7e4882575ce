"""Requests that wait: those that could start, in rank order, and apart from them those who follow a leader.

Knows requests and their ranks. Must not know blocks, budgets or policies.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import nsmallest

from ridgeline.core.request import Request

Rank = tuple[int, ...]
"""Who goes first: lower before higher, no two alike."""

Entry = tuple[Rank, Request]


class Queue:
    """Waiting requests.

    Invariant: a request is in it at most once, either ready or among the followers of one leader; the ready
    ones are sorted by rank. Followers are out of the way, so nobody waits behind a request that cannot start.
    """

    def __init__(self) -> None:
        self._members: dict[str, Entry] = {}
        self._ready: list[Entry] = []
        self._followers: dict[str, list[Entry]] = {}
        self._leaders: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._members

    def __iter__(self) -> Iterator[Request]:
        """All who wait, in rank order, followers included."""
        return iter(self.first(len(self)))

    def first(self, count: int) -> list[Request]:
        """The `count` lowest-ranked of all who wait, followers included."""
        return [request for _, request in nsmallest(count, self._members.values())]

    def get(self, request_id: str) -> Request | None:
        """The waiting request of that id, if there is one."""
        entry = self._members.get(request_id)
        return None if entry is None else entry[1]

    def head(self) -> Request | None:
        """The ready request that is next."""
        return self._ready[0][1] if self._ready else None

    def push(self, request: Request, rank: Rank) -> None:
        """A request that could start."""
        entry = self._members[request.request_id] = (rank, request)
        insort(self._ready, entry)

    def follow(self, leader_id: str, request: Request, rank: Rank) -> None:
        """A request that waits for another's prompt."""
        entry = self._members[request.request_id] = (rank, request)
        self._leaders[request.request_id] = leader_id
        insort(self._followers.setdefault(leader_id, []), entry)

    def release(self, leader_id: str) -> list[Request]:
        """The followers of a leader need not wait for it any longer: they become ready. Returns them."""
        released = self._followers.pop(leader_id, None)
        if released is None:
            return []
        for rank, request in released:
            del self._leaders[request.request_id]
            insort(self._ready, (rank, request))
        return [request for _, request in released]

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it waits. Raises KeyError if it does not."""
        entry = self._members.pop(request.request_id)
        leader_id = self._leaders.pop(request.request_id, None)
        group = self._ready if leader_id is None else self._followers[leader_id]
        del group[bisect_left(group, entry)]
        if leader_id is not None and not group:
            del self._followers[leader_id]
