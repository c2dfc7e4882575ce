"""One step after the other: choose who runs, run it, commit what came back; with overlap, one step late.

Knows the scheduler, an executor and a clock, by their contracts. It must not know devices, text, or
whether time is real.

Overlap: while the device works on a step, the host plans and dispatches the next one, and only then reads the
results of the first. Steps whose next one needs a token's value (`Scheduler.may_run_ahead`) are read at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ridgeline.core.clock import Clock
from ridgeline.core.request import Request
from ridgeline.core.step import Spans, StepPlan, StepRecord, StepResult, Verified
from ridgeline.core.tree import TokenTree
from ridgeline.engine.executor import Executor, Handle
from ridgeline.schedule import Event, Scheduler
from ridgeline.schedule.scheduler import NO_DRAFTS, NO_DRAWS, Choice
from ridgeline.speculate.speculator import Speculator


@dataclass(slots=True)
class _Flight:
    """A step that was dispatched and not read yet. Times on the engine's clock."""

    plan: StepPlan
    handle: Handle
    start_s: float
    dispatched_s: float
    predicted_s: float | None
    preempted: int
    draft_s: float


class Engine:
    """Requests go in with `add`; each `step` returns what happened to them.

    predict(plan) -> seconds, if given, is asked before each step and lands in its record. Listeners
    get every StepRecord. overlap: read a step's results only when the next one has been dispatched; tokens
    are the same, each comes one call of `step` later. retreats: requests of a step that fails wait again,
    instead of ending with it. speculator: drafts trees for the requests of each step. A tree follows tokens that
    have been read, so results are read at once while trees pay, and as `overlap` says while they do not.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        predict: Callable[[StepPlan], float] | None = None,
        overlap: bool = False,
        retreats: bool = False,
        speculator: Speculator | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.predict = predict
        self.overlap = overlap
        self.retreats = retreats
        self.speculator = speculator
        self.failed: tuple[str, ...] = ()
        """Requests of the step that failed last."""
        self.listeners: list[Callable[[StepRecord], None]] = []
        self._read_s = 0.0  # when results were read last
        self._flights: deque[_Flight] = deque()  # at most one between two steps
        self._events: list[Event] = []

    def add(self, request: Request) -> None:
        """Queue a request; it has been validated."""
        request.arrival_s = request.arrival_s or self.clock.now()
        self.scheduler.add(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request at once; its blocks return. None if it is not here (any more)."""
        request = self.scheduler.abort(request_id)
        self._forget(request_id)
        self._let_go()
        return request

    def finish(self, request_id: str, at_token: int, stop_reason: str) -> Request | None:
        """End a request at its output token `at_token`, because the owner of its text found a stop string."""
        request = self.scheduler.finish(request_id, at_token, stop_reason)
        self._forget(request_id)
        self._let_go()
        return request

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return self.scheduler.has_work or bool(self._events)

    def step(self) -> list[Event]:
        """Run one step and return what the steps that were read have brought.

        Empty if there was nothing to run, or if the step is under way and nothing was before it.
        If the executor raises, the requests of the step have ended (what it wrote of them is unknown), or with
        `retreats` all who ran wait again; their blocks are back, and the error goes on to the caller. Events of
        a step read before it in the same call come with the next call.
        """
        start = self.clock.now()
        preempted = self.scheduler.preemptions
        if self._flights and self.speculator is not None and self.speculator.pays(len(self.scheduler.running)):
            self._read(self._flights.popleft())
        chosen = self.scheduler.choose()
        drafts = self._drafts(chosen)
        plan = self.scheduler.plan(chosen, drafts, self.speculator.draws if self.speculator and drafts else NO_DRAWS)
        if plan is not None:
            for request, _ in chosen:
                if request.scheduled_s is None:
                    request.scheduled_s = start
            self._dispatch(plan, start, self.scheduler.preemptions - preempted)
        most = 1 if self.overlap else 0
        while self._flights and (plan is None or len(self._flights) > most or not self.scheduler.may_run_ahead):
            self._read(self._flights.popleft())
        self._let_go()
        events, self._events = self._events, []
        return events

    def _drafts(self, chosen: Sequence[Choice]) -> Mapping[str, TokenTree]:
        """Trees for the requests of a step. If drafting fails, the step does."""
        if self.speculator is None or not chosen:
            return NO_DRAFTS
        scheduler = self.scheduler
        try:
            return self.speculator.draft(chosen, scheduler.room, scheduler.deepest, scheduler.cache.table)
        except BaseException:
            plan = scheduler.plan(chosen)
            if plan is not None:
                self._fail(plan)
            raise

    def _forget(self, request_id: str) -> None:
        if self.speculator is not None:
            self.speculator.forget(request_id)

    def _dispatch(self, plan: StepPlan, start_s: float, preempted: int) -> None:
        predicted_s = None if self.predict is None else self.predict(plan)
        try:
            handle = self.executor.run(plan)
        except BaseException:
            self._fail(plan)
            raise
        draft_s = 0.0 if self.speculator is None else self.speculator.last_draft_s
        self._flights.append(_Flight(plan, handle, start_s, self.clock.now(), predicted_s, preempted, draft_s))

    def _read(self, flight: _Flight) -> None:
        """Wait for a step's results and commit them."""
        try:
            result = flight.handle.result()
        except BaseException:
            self._fail(flight.plan)
            raise
        read_s = self.clock.now()
        events = self.scheduler.commit(flight.plan, result)
        self._events += events
        if self.speculator is not None:
            now = self.clock.now()
            began_s = max(flight.start_s + flight.draft_s, self._read_s)  # a step under way before it held it up
            self.speculator.learn(flight.plan, result, now - began_s)
            self._read_s = now
            for event in events:
                if event.finish is not None:
                    self.speculator.forget(event.request.request_id)
        if self.listeners:
            self._record(flight, result, read_s)

    def _fail(self, plan: StepPlan) -> None:
        self.failed = tuple(chunk.request_id for chunk in plan.chunks)
        if not self.retreats:
            self.scheduler.give_up(plan)
            return
        self._flights.clear()
        self.scheduler.retreat()

    def _let_go(self) -> None:
        """A step under way whose requests have all ended is not waited for, and leaves no record."""
        if self._flights and not self.scheduler.has_work:
            self.scheduler.give_up(self._flights.popleft().plan)

    def _record(self, flight: _Flight, result: StepResult, read_s: float) -> None:
        plan, now = flight.plan, self.clock.now()
        spans = Spans(tuple(c.new for c in plan.chunks), tuple(c.visible for c in plan.chunks))
        if self.overlap:  # what lies between dispatch and reading is the device's time, or another step's
            host_s = flight.dispatched_s - flight.start_s - flight.draft_s + now - read_s
        else:
            host_s = now - flight.start_s - result.device_s - flight.draft_s
        record = StepRecord(
            number=plan.number,
            kind=plan.kind,
            spans=tuple(zip(spans.new, spans.visible)),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            free_blocks=self.scheduler.cache.free_blocks,
            preempted=flight.preempted,
            start_s=flight.start_s,
            host_s=host_s,
            device_s=result.device_s,
            predicted_s=flight.predicted_s,
            sampled=len(result.sampled) + len(result.accepted),
            padding=result.padding,
            drafted=sum(len(chunk.tree) for chunk in plan.chunks if chunk.tree is not None),
            accepted=sum(len(one.nodes) for one in result.accepted.values()),
            draft_s=flight.draft_s,
            verified=tuple(
                Verified(chunk.token_ids[-1], chunk.tree, result.accepted[chunk.request_id].nodes)
                for chunk in plan.chunks
                if chunk.tree is not None
            ),
        )
        for listener in self.listeners:
            listener(record)

    def close(self) -> None:
        """Give back the executor's memory."""
        self.executor.close()
