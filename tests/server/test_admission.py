"""Places: counted, given back, refused when there are none or when an objective would be missed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ridgeline.engine.messages import Ready, Stepped
from ridgeline.server.admission import Admission, Pace
from ridgeline.server.errors import ApiError, shutting_down
from ridgeline.server.settings import ServerSettings

FACTS = Ready("x", 100, [0], 64, 4, 32, 5, 16, 100, 1, {}, {}, [], 0.1)


def admission(floors: dict[str, Any] | None = None, **settings: Any) -> Admission:
    made = Admission(ServerSettings(**settings))
    made.open(replace(FACTS, floors=floors or {}))
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
    one.heard(step("prefill", 100, 0.1))
    one.heard(step("decode", 4, 0.02))
    assert one.reserve(1, 1000).tokens == 1000  # nobody is there: it is served as fast as it can be
    with pytest.raises(ApiError):
        one.reserve(1, 10)
    one.tokens = 100
    assert one.predicted(1, 10) == pytest.approx({"ttft": 0.11, "tpot": 0.02})
    one.reserve(1, 10)
    with pytest.raises(ApiError):
        one.reserve(1, 60)


FLOORS = {"decode": [[1.0, 0.010], [2.0, 0.012], [4.0, 0.016]], "prefill": [[1.0, 0.001], [32.0, 0.032]]}


def test_forecasts_are_floors_times_what_steps_have_taken_of_them() -> None:
    """Before any step the floor itself is the forecast; then each kind of step has a factor of its own."""
    pace = Pace(FLOORS)
    assert pace.decode_s(3) == pytest.approx(0.014)
    assert pace.prefill_s(80, 32) == pytest.approx(0.080)
    pace.heard(step("decode", 1, 0.020))  # one request: twice its floor
    assert pace.decode_s(4) == pytest.approx(0.032)
    assert pace.prefill_s(80, 32) == pytest.approx(0.080)
    pace.heard(step("mixed", 32, 0.096))
    assert pace.prefill_s(80, 32) == pytest.approx(0.240)
    for _ in range(200):
        pace.heard(step("decode", 1, 0.010))
    assert pace.decode_s(4) == pytest.approx(0.016)


def entered(one: Admission, rows: int, started: list[str], name: str, priority: int = 0) -> Any:
    ticket = one.reserve(rows, 1)
    one.enter(ticket, priority, lambda: started.append(name), lambda error: started.append(f"{name}: {error.code}"))
    return ticket


def test_who_would_slow_everyone_waits_at_the_door() -> None:
    """14 ms a token are met by three at once. The fourth waits, lower priorities before higher ones, then in order."""
    one = admission(slo={"tpot": 0.0141}, floors=FLOORS)
    assert one.fair_seats() == 3
    started: list[str] = []
    first = entered(one, 2, started, "first")
    second = entered(one, 1, started, "second")
    third = entered(one, 2, started, "third")
    later = entered(one, 1, started, "later", priority=1)
    sooner = entered(one, 1, started, "sooner", priority=-1)
    assert started == ["first", "second"]
    assert one.predicted(1, 1)["tpot"] <= 0.0141
    second.release()
    assert started == ["first", "second", "sooner"]
    third.release()  # it has given up
    first.release()
    assert started == ["first", "second", "sooner", "later"]
    later.release()
    sooner.release()
    assert (one.rows, one.seated) == (0, 0)


def test_a_request_that_never_meets_the_objective_runs_alone() -> None:
    one = admission(slo={"tpot": 0.001}, floors=FLOORS)
    started: list[str] = []
    first = entered(one, 4, started, "first")
    entered(one, 1, started, "second")
    assert started == ["first"]
    first.release()
    assert started == ["first", "second"]


def test_steps_that_get_faster_open_the_door() -> None:
    one = admission(slo={"tpot": 0.0141}, floors=FLOORS)
    started: list[str] = []
    for name in "abcd":
        entered(one, 1, started, name)
    assert started == ["a", "b", "c"]
    one.heard(step("decode", 1, 0.005))  # half the floor: the model was too careful
    assert started == ["a", "b", "c", "d"]


def test_whoever_waits_is_told_of_the_end() -> None:
    one = admission(slo={"tpot": 0.001}, floors=FLOORS)
    started: list[str] = []
    for name in "ab":
        entered(one, 1, started, name)
    one.empty(shutting_down(1))
    assert started == ["a", "b: shutting_down"]


def test_waiting_for_a_seat_counts_towards_the_first_token() -> None:
    one = admission(slo={"ttft": 10.0}, max_queued=100, floors=FLOORS)
    before = one.predicted(4, 1)["ttft"]
    one.reserve(4, 0)
    assert one.predicted(4, 1)["ttft"] == pytest.approx(before + 4 * 16 * 0.016 / 4)
