"""The queue: ready requests by rank, followers aside."""

from __future__ import annotations

import pytest

from ridgeline.core.request import Request, SamplingParams
from ridgeline.schedule.queue import Queue


def named(name: str) -> Request:
    return Request(name, [1], 1, SamplingParams(), 1)


def names(queue: Queue) -> list[str]:
    return [request.request_id for request in queue]


def test_ready_requests_come_in_rank_order() -> None:
    queue = Queue()
    for name, rank in (("c", (1, 2)), ("a", (0, 3)), ("b", (1, 1))):
        queue.push(named(name), rank)
    assert names(queue) == ["a", "b", "c"]
    assert [request.request_id for request in queue.first(2)] == ["a", "b"]
    head = queue.head()
    assert head is not None
    assert head.request_id == "a"


def test_followers_stand_aside_until_released() -> None:
    queue = Queue()
    queue.follow("leader", named("f"), (0,))
    queue.follow("leader", named("g"), (1,))
    queue.push(named("z"), (5,))
    assert len(queue) == 3
    assert names(queue) == ["f", "g", "z"]
    assert queue.head() is queue.get("z")
    assert [request.request_id for request in queue.release("leader")] == ["f", "g"]
    assert queue.release("leader") == []
    assert queue.head() is queue.get("f")


def test_removal_from_wherever_it_waits() -> None:
    queue = Queue()
    ready, follower = named("r"), named("f")
    queue.push(ready, (0,))
    queue.follow("leader", follower, (1,))
    queue.remove(follower)
    assert "f" not in queue
    assert queue.release("leader") == []
    queue.remove(ready)
    assert len(queue) == 0
    assert queue.head() is None
    with pytest.raises(KeyError):
        queue.remove(ready)
