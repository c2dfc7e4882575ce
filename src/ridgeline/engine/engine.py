"""One step after the other: choose who runs, run it, commit what came back.

Knows the scheduler, an executor and a clock, by their contracts. It must not know devices, text, or
whether time is real.
"""

from __future__ import annotations

from collections.abc import Callable

from ridgeline.core.clock import Clock
from ridgeline.core.request import Request
from ridgeline.core.step import Spans, StepPlan, StepRecord, StepResult
from ridgeline.engine.executor import Executor
from ridgeline.schedule import Event, Scheduler


class Engine:
    """Requests go in with `add`; each `step` returns what happened to them.

    predict(plan) -> seconds, if given, is asked before each step and lands in its record. Listeners
    get every StepRecord.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        predict: Callable[[StepPlan], float] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.predict = predict
        self.listeners: list[Callable[[StepRecord], None]] = []

    def add(self, request: Request) -> None:
        """Queue a request; it has been validated."""
        request.arrival_s = request.arrival_s or self.clock.now()
        self.scheduler.add(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request at once; its blocks return. None if it is not here (any more)."""
        return self.scheduler.abort(request_id)

    def finish(self, request_id: str, at_token: int, stop_reason: str) -> Request | None:
        """End a request at its output token `at_token`, because the owner of its text found a stop string."""
        return self.scheduler.finish(request_id, at_token, stop_reason)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[Event]:
        """Run one step; an empty list if there was nothing to run.

        If the executor raises, the requests of the step have ended (what it wrote of them is unknown) and
        their blocks are back; the error goes on to the caller.
        """
        start = self.clock.now()
        preempted = self.scheduler.preemptions
        chosen = self.scheduler.choose()
        plan = self.scheduler.plan(chosen)
        if plan is None:
            return []
        for request, _ in chosen:
            if request.scheduled_s is None:
                request.scheduled_s = start
        predicted = None if self.predict is None else self.predict(plan)
        try:
            result = self.executor.run(plan).result()
        except BaseException:
            for chunk in plan.chunks:
                self.scheduler.abort(chunk.request_id)
            self.scheduler.commit(plan, StepResult())  # lets go of the blocks that it would have copied
            raise
        events = self.scheduler.commit(plan, result)
        if self.listeners:
            self._record(plan, start, result, predicted, self.scheduler.preemptions - preempted)
        return events

    def _record(
        self, plan: StepPlan, start: float, result: StepResult, predicted: float | None, preempted: int
    ) -> None:
        spans = Spans(tuple(c.new for c in plan.chunks), tuple(c.visible for c in plan.chunks))
        record = StepRecord(
            number=plan.number,
            kind=plan.kind,
            spans=tuple(zip(spans.new, spans.visible)),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            free_blocks=self.scheduler.cache.free_blocks,
            preempted=preempted,
            start_s=start,
            host_s=self.clock.now() - start - result.device_s,
            device_s=result.device_s,
            predicted_s=predicted,
            sampled=len(result.sampled),
        )
        for listener in self.listeners:
            listener(record)

    def close(self) -> None:
        """Give back the executor's memory."""
        self.executor.close()
