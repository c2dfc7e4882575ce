"""One driver for benchmarks and simulations: requests arrive on a clock, the engine steps, times are kept.

Knows the engine's face and a clock. It must not know whether either is real: with a VirtualClock the wait for
the next arrival is a jump, with the wall's it is a sleep. Nothing else differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ridgeline.core.clock import Clock, VirtualClock
from ridgeline.core.errors import RidgelineError
from ridgeline.core.request import Request, SamplingParams
from ridgeline.schedule import Event, Scheduler
from ridgeline.workload.arrivals import Job, prompt_ids
from ridgeline.workload.measure import Served


class Stepped(Protocol):
    """What is driven: an Engine."""

    clock: Clock
    scheduler: Scheduler

    def add(self, request: Request) -> None: ...

    @property
    def has_work(self) -> bool: ...

    def step(self) -> list[Event]: ...


def drive(
    engine: Stepped,
    jobs: Sequence[Job],
    vocabulary: int,
    seed: int = 0,
    concurrency: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Served]:
    """Serve all jobs to their forced output length; times of every token, in the jobs' order.

    concurrency: a closed loop: no more than so many requests are in the engine at a time, and a job that waits
    for its turn arrives when it gets it. progress(done, total) hears of finished requests.
    """
    clock = engine.clock
    begin = clock.now()
    order = sorted(range(len(jobs)), key=lambda index: jobs[index].arrival_s)
    served = [Served(job.prompt_tokens, begin + job.arrival_s) for job in jobs]
    names = {f"job-{index}": index for index in order}
    waiting = iter([*order, None])
    upcoming = next(waiting)
    active = done = 0
    while upcoming is not None or engine.has_work:
        while upcoming is not None and (concurrency is None or active < concurrency):
            arrival = begin + jobs[upcoming].arrival_s
            if arrival > clock.now() and (concurrency is None or engine.has_work or active):
                break
            if concurrency is not None:
                served[upcoming].arrival_s = max(arrival, clock.now())
            try:
                engine.add(request_of(jobs[upcoming], upcoming, served[upcoming].arrival_s, vocabulary, seed))
                active += 1
            except RidgelineError as error:
                served[upcoming].error = str(error)
                done += 1
            upcoming = next(waiting)
        if not engine.has_work:
            if upcoming is None:
                break
            _wait(clock, begin + jobs[upcoming].arrival_s)
            continue
        # A batch of the static policy waits for those who may still join it, unless nobody can.
        engine.scheduler.more_to_come = upcoming is not None and (concurrency is None or active < concurrency)
        events = engine.step()
        now = clock.now()
        if not events and not engine.scheduler.running and upcoming is not None:
            _wait(clock, begin + jobs[upcoming].arrival_s)
        for event in events:
            one = served[names[event.request.request_id]]
            if event.token is not None:
                one.token_times_s.append(now)
            if event.finish is not None:
                one.cached_tokens, one.preemptions = event.request.cached_tokens, event.request.preemptions
                active -= 1
                done += 1
                if progress is not None:
                    progress(done, len(jobs))
    return served


def request_of(job: Job, number: int, arrival_s: float, vocabulary: int, seed: int) -> Request:
    """A greedy Request of the job's lengths on random tokens."""
    params = SamplingParams(temperature=0, max_tokens=job.output_tokens, ignore_eos=True, detokenize=False)
    return Request(
        request_id=f"job-{number}",
        tokens=prompt_ids(job, number, vocabulary, seed),
        prompt_len=job.prompt_tokens,
        params=params,
        max_tokens=job.output_tokens,
        arrival_s=arrival_s,
    )


def _wait(clock: Clock, until_s: float) -> None:
    left = until_s - clock.now()
    if left <= 0:
        return
    if isinstance(clock, VirtualClock):
        clock.advance(left)
    else:
        time.sleep(left)
