"""Places: counted, given back, refused when there are none or when an objective would be missed."""

from __future__ import annotations

from typing import Any

import pytest

from ridgeline.engine.messages import Ready, Stepped
from ridgeline.server.admission import Admission
from ridgeline.server.errors import ApiError
from ridgeline.server.settings import ServerSettings

FACTS = Ready("x", 100, [0], 64, 4, 32, 5, 16, 100, 1, {}, {}, [], 0.1)


def admission(**settings: Any) -> Admission:
    made = Admission(ServerSettings(**settings))
    made.open(FACTS)
    return made


def step(kind: str, new_tokens: int, seconds: float) -> Stepped:
    return Stepped(1, [], [], [], [], [], [], kind, new_tokens, seconds, seconds, None, 1, 0, 1, 0, 0, 0, 0)


def test_places_are_counted_and_given_back_once() -> None:
    one = admission(max_queued=2)
    tickets = [one.reserve(2, 10) for _ in range(3)]
    with pytest.raises(ApiError) as refused:
        one.reserve(1, 1)
    assert (refused.value.status, refused.value.code) == (429, "server_overloaded")
    assert refused.value.retry_after_s
    for ticket in tickets:
        ticket.release()
        ticket.release()
    assert (one.rows, one.tokens, one.refused) == (0, 0, 1)


def test_the_queue_is_four_times_the_seats() -> None:
    assert admission().most_rows == 20
    assert admission(max_queued=0).most_rows == 4


def test_what_never_fits_is_no_matter_of_waiting() -> None:
    with pytest.raises(ApiError) as refused:
        admission(max_queued=0).reserve(5, 1)
    assert (refused.value.status, refused.value.param) == (400, "n")


def test_tokens_are_counted_as_they_become_known() -> None:
    one = admission(max_queued_tokens=100)
    first = one.reserve(1, 500)  # the first is let in whatever its length
    first.counted(90)
    with pytest.raises(ApiError):
        one.reserve(1, 20)
    second = one.reserve(1, 10)
    first.computed(90)
    assert one.tokens == 10
    second.release()
    first.release()
    assert one.tokens == 0


def test_an_objective_refuses_who_would_miss_it() -> None:
    """A prompt token takes 1 ms: 100 tokens ahead are 100 ms."""
    one = admission(slo={"ttft": 0.15})
    one.pace.heard(step("prefill", 100, 0.1))
    one.pace.heard(step("decode", 4, 0.02))
    assert one.reserve(1, 1000).tokens == 1000  # nobody is there: it is served as fast as it can be
    with pytest.raises(ApiError):
        one.reserve(1, 10)
    one.tokens = 100
    assert one.predicted(1, 10) == pytest.approx({"ttft": 0.11, "tpot": 0.02})
    one.reserve(1, 10)
    with pytest.raises(ApiError):
        one.reserve(1, 60)
