"""One step after the other, with an executor that computes nothing: events, records, and what a failure leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from ridgeline.core.clock import VirtualClock
from ridgeline.core.request import FinishReason, Request, SamplingParams
from ridgeline.core.step import UNREAD, StepPlan, StepRecord, StepResult, TokenScore
from ridgeline.engine.engine import Engine
from ridgeline.engine.interrupt import Uninterrupted
from ridgeline.kv.cache import KVCache
from ridgeline.schedule import Scheduler, make_policy


class Broken(Exception):
    pass


class Toy:
    """Executor and handle in one: each step takes 0.5 s and yields its number as every token."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.plans: list[StepPlan] = []
        self.read: list[int] = []
        self.fails_at: int | None = None
        self.late = False
        self.late_failure: int | None = None
        self.closed = False

    def run(self, plan: StepPlan) -> Toy:
        self.plans.append(plan)
        if len(self.plans) == self.fails_at:
            raise Broken
        self.clock.advance(0.5)
        return Late(self, plan) if self.late else self

    def result(self) -> StepResult:
        return self.result_of(self.plans[-1])

    def result_of(self, plan: StepPlan) -> StepResult:
        self.read.append(plan.number)
        tokens = {c.request_id: TokenScore(plan.number) for c in plan.chunks if c.sampling is not None}
        return StepResult(tokens, device_s=0.5)

    def close(self) -> None:
        self.closed = True


@dataclass
class Late:
    """The handle of one step of a Toy that is read late: reading it may fail."""

    toy: Toy
    plan: StepPlan

    def result(self) -> StepResult:
        if self.plan.number == self.toy.late_failure:
            raise Broken
        return self.toy.result_of(self.plan)


def engine_of(
    blocks: int = 16,
    predict: Callable[[StepPlan], float] | None = None,
    budget: int = 32,
    overlap: bool = False,
) -> tuple[Engine, Toy]:
    clock = VirtualClock()
    cache = KVCache(block_size=16, num_blocks=blocks)
    scheduler = Scheduler(cache, make_policy("fcfs"), max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=128)
    toy = Toy(clock)
    toy.late = overlap
    return Engine(scheduler, toy, clock, predict, overlap), toy


def request(name: str, tokens: int, most: int = 4, leader: Request | None = None) -> Request:
    return Request(name, list(range(tokens)), tokens, SamplingParams(max_tokens=most), most, leader=leader)


def assert_empty(engine: Engine) -> None:
    cache = engine.scheduler.cache
    assert not engine.has_work
    cache.check()
    assert cache.free_blocks == cache.num_blocks


def test_steps_until_there_is_no_work() -> None:
    engine, _ = engine_of()
    engine.add(request("a", 40))
    engine.add(request("b", 3, most=2))
    tokens: dict[str, int] = {}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request.request_id] = tokens.get(event.request.request_id, 0) + (event.token is not None)
    assert tokens == {"a": 4, "b": 2}
    assert engine.step() == []
    assert_empty(engine)


def test_arrival_is_stamped_once() -> None:
    engine, toy = engine_of()
    toy.clock.advance(3.0)
    first, second = request("a", 3), request("b", 3)
    second.arrival_s = 1.5
    engine.add(first)
    engine.add(second)
    assert (first.arrival_s, second.arrival_s) == (3.0, 1.5)


def test_the_first_step_is_stamped_once() -> None:
    """A prompt in two chunks, and one that waits behind it: queued until their first chunk, not their last."""
    engine, _ = engine_of()
    long, late = request("a", 40), request("b", 3)
    engine.add(long)
    engine.add(late)
    while engine.has_work:
        engine.step()
    assert (long.scheduled_s, late.scheduled_s) == (0.0, 0.5)


def test_records_say_what_was_decided_predicted_and_measured() -> None:
    engine, _ = engine_of(predict=lambda plan: 0.1 * plan.num_tokens)
    records: list[StepRecord] = []
    engine.listeners.append(records.append)
    engine.add(request("a", 40, most=3))
    engine.add(request("b", 5, most=3))
    while engine.has_work:
        engine.step()
    assert [record.spans for record in records] == [
        ((32, 32),),
        ((8, 40), (5, 5)),
        ((1, 41), (1, 6)),
        ((1, 42), (1, 7)),
    ]
    assert [record.kind for record in records] == ["prefill", "prefill", "decode", "decode"]
    assert [record.sampled for record in records] == [0, 2, 2, 2]
    assert [record.predicted_s for record in records] == pytest.approx([3.2, 1.3, 0.2, 0.2])
    assert [record.start_s for record in records] == [0.0, 0.5, 1.0, 1.5]
    assert all(record.device_s == 0.5 and record.host_s == 0 for record in records)
    assert [record.running for record in records] == [1, 2, 2, 0]
    assert [record.waiting for record in records] == [1, 0, 0, 0]
    assert records[-1].free_blocks == 16
    assert [record.preempted for record in records] == [0] * 4


def test_preemptions_are_on_record() -> None:
    engine, _ = engine_of(blocks=8, budget=128)
    records: list[StepRecord] = []
    engine.listeners.append(records.append)
    for name in "abc":
        engine.add(request(name, 30, most=60))
    while engine.has_work:
        engine.step()
    assert sum(record.preempted for record in records) == engine.scheduler.preemptions > 0
    assert_empty(engine)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_an_executor_that_raises_leaves_nothing_of_its_step(step: int) -> None:
    """Samples of one prompt copy its last block on write: those blocks must come back as well."""
    engine, toy = engine_of()
    leader = request("a", 20, most=9)
    for one in (leader, request("b", 20, most=9, leader=leader), request("c", 20, most=9, leader=leader)):
        engine.add(one)
    toy.fails_at = step
    for _ in range(step - 1):
        engine.step()
    with pytest.raises(Broken):
        engine.step()
    if step == 2:
        assert toy.plans[-1].copies, "the test shows nothing"
    ended = {chunk.request_id for chunk in toy.plans[-1].chunks}
    for one in "abc":
        engine.abort(one)
    assert ended
    assert_empty(engine)
    engine.add(request("d", 20))
    while engine.has_work:
        engine.step()
    assert_empty(engine)


def test_those_who_were_not_in_the_broken_step_go_on() -> None:
    engine, toy = engine_of()
    engine.add(request("a", 32))
    waiting = request("b", 5)
    engine.add(waiting)
    toy.fails_at = 1
    with pytest.raises(Broken):
        engine.step()
    while engine.has_work:
        engine.step()
    assert waiting.finish is FinishReason.LENGTH
    assert engine.abort("a") is None
    assert_empty(engine)


def test_abort_finish_and_close() -> None:
    engine, toy = engine_of()
    engine.add(request("a", 20, most=50))
    for _ in range(5):
        engine.step()
    ended = engine.finish("a", 2, "stop")
    assert ended is not None
    assert (ended.output_len, ended.finish, ended.stop_reason) == (2, FinishReason.STOP, "stop")
    assert engine.abort("a") is None
    assert engine.finish("a", 1, "stop") is None
    assert_empty(engine)
    engine.close()
    assert toy.closed


# Overlap


def outputs(engine: Engine) -> dict[str, list[int]]:
    """Run to the end; each request's tokens."""
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            assert event.token is not None
            found.setdefault(event.request.request_id, []).append(event.token.token)
    return found


def test_a_step_is_read_when_the_next_one_is_under_way() -> None:
    engine, toy = engine_of(overlap=True)
    engine.add(request("a", 3))
    assert engine.step() == []
    assert (len(toy.plans), toy.read) == (1, [])
    assert [event.token for event in engine.step()] == [TokenScore(1)]
    assert (len(toy.plans), toy.read) == (2, [1])
    assert list(toy.plans[1].chunks[0].token_ids) == [UNREAD]
    assert outputs(engine) == {"a": [2, 3, 4]}
    assert len(toy.plans) == 4, "the end by length is foreseen: nothing is computed beyond it"
    assert_empty(engine)


def test_overlap_changes_no_token() -> None:
    """Tokens are step numbers here, so requests that start together must agree to the last one."""
    found = []
    for overlap in (False, True):
        engine, _ = engine_of(overlap=overlap)
        for name, most in (("a", 4), ("b", 7), ("c", 1)):
            engine.add(request(name, 5, most))
        found.append(outputs(engine))
        assert_empty(engine)
    assert found[0] == found[1]


def test_a_surplus_token_is_dropped() -> None:
    """The third token ends the output; the fourth is under way by then."""
    engine, toy = engine_of(overlap=True)
    one = request("a", 3, most=50)
    one.eos_ids = frozenset({3})
    engine.add(one)
    assert outputs(engine) == {"a": [1, 2, 3]}
    assert (one.finish, one.output_len, len(toy.plans), toy.read) == (FinishReason.STOP, 3, 4, [1, 2, 3])
    assert_empty(engine)
    engine.add(request("a", 3, most=1))
    assert outputs(engine) == {"a": [5]}, "the id is free again, and the old surplus is nobody's"


def test_an_id_may_come_back_while_a_step_of_its_last_owner_is_under_way() -> None:
    engine, _ = engine_of(overlap=True)
    for name in "ab":
        engine.add(request(name, 3, most=9))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    again = request("a", 3, most=2)
    engine.add(again)
    found = outputs(engine)
    assert again.output_len == 2
    assert found["a"] == again.tokens[3:] == [4, 5]


def test_what_needs_values_on_the_host_is_read_at_once() -> None:
    engine, toy = engine_of(overlap=True)
    plain, penalized = request("a", 3, most=6), request("b", 3, most=2)
    penalized.params = SamplingParams(frequency_penalty=0.5, max_tokens=2)
    engine.add(plain)
    engine.add(penalized)
    for step in (1, 2):
        assert len(engine.step()) == 2
        assert toy.read[-1] == step
    assert engine.step() == []
    assert [len(engine.step()) for _ in range(4)] == [1] * 4
    assert_empty(engine)


def test_with_overlap_records_keep_steps_apart() -> None:
    engine, _ = engine_of(predict=lambda plan: 0.1 * plan.num_tokens, overlap=True)
    records: list[StepRecord] = []
    engine.listeners.append(records.append)
    engine.add(request("a", 40, most=3))
    while engine.has_work:
        engine.step()
    assert [record.spans for record in records] == [((32, 32),), ((8, 40),), ((1, 41),), ((1, 42),)]
    assert [record.number for record in records] == [1, 2, 3, 4]
    assert [record.predicted_s for record in records] == pytest.approx([3.2, 0.8, 0.1, 0.1])
    assert [record.start_s for record in records] == [0.0, 0.5, 1.0, 1.5]


def test_a_step_whose_reading_fails_ends_its_requests_alone() -> None:
    engine, toy = engine_of(overlap=True)
    engine.add(request("a", 32, most=5))
    engine.step()
    late = request("b", 5, most=3)
    engine.add(late)
    toy.late_failure = 1
    with pytest.raises(Broken):
        engine.step()
    assert engine.abort("a") is None
    assert len(outputs(engine)["b"]) == 3
    assert late.finish is FinishReason.LENGTH
    assert_empty(engine)


def test_events_read_before_a_failure_are_not_lost() -> None:
    """The first step ends well and the second, which must be read at once, does not."""
    engine, toy = engine_of(overlap=True)
    engine.add(request("a", 3, most=9))
    engine.step()
    penalized = request("b", 3, most=2)
    penalized.params = SamplingParams(frequency_penalty=0.5, max_tokens=2)
    engine.add(penalized)
    toy.late_failure = 2
    with pytest.raises(Broken):
        engine.step()
    assert engine.has_work
    assert [event.token for event in engine.step()] == [TokenScore(1)]
    assert_empty(engine)


def test_a_dispatch_that_fails_leaves_the_step_before_it() -> None:
    engine, toy = engine_of(overlap=True)
    engine.add(request("a", 10, most=9))
    engine.add(request("b", 10, most=1))
    engine.step()
    toy.fails_at = 2
    with pytest.raises(Broken):
        engine.step()
    found = outputs(engine)
    assert set(found) == {"b"}, "a was in the step that failed, b had its last token under way"
    assert_empty(engine)


def test_an_abort_of_all_leaves_nothing_under_way() -> None:
    engine, toy = engine_of(overlap=True)
    leader = request("a", 20, most=9)
    for one in (leader, request("b", 20, most=9, leader=leader)):
        engine.add(one)
    engine.step()
    engine.step()
    engine.abort("a")
    engine.finish("b", 0, "stop")
    assert_empty(engine)
    assert engine.step() == []
    assert toy.read == [1]


# Ctrl-C


def test_ctrl_c_waits_for_the_end_of_the_block() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_goes_before_ctrl_c() -> None:
    with pytest.raises(Broken), Uninterrupted():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise Broken
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handlers_of_others_are_left_alone() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_enter() -> None:
    errors = []

    def enter() -> None:
        try:
            with Uninterrupted():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert errors == []


def test_blocks_may_be_nested() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():  # noqa: PT012
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached == [True]
