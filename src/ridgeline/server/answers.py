"""From jobs to answers: one JSON object, or a stream of events; with deadlines, and an eye on the client.

Knows jobs, ASGI and how an answer is written, by a Writer. It must not know which endpoint asked. Whatever way an
answer ends, its jobs end with it and its place is given back.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from starlette.responses import Response

from ridgeline.core.request import RequestMetrics
from ridgeline.server.edge import Receive, Scope, Send
from ridgeline.server.errors import ApiError, internal, queue_timeout, request_timeout
from ridgeline.server.intake import Plan
from ridgeline.server.jobs import Job
from ridgeline.server.state import State

DONE = b"data: [DONE]\n\n"
SCORE_BYTES = 80
"""About what a log-probability takes in an event."""


def encoded(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


class Writer(Protocol):
    """One endpoint's way of saying what jobs have brought."""

    @abstractmethod
    def opening(self) -> Iterator[bytes]:
        """Events before any token."""

    @abstractmethod
    def news(self, place: int, job: Job) -> Iterator[bytes]:
        """Events of what the job at this place has brought since the last call."""

    @abstractmethod
    def closing(self) -> Iterator[bytes]:
        """Events after the last token."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The answer as one object."""


class Answer(Response):
    """An ASGI response that runs its jobs. stream: as events. max_tokens: as asked, for metrics."""

    def __init__(self, state: State, plan: Plan, writer: Writer, stream: bool) -> None:
        self.state = state
        self.plan = plan
        self.writer = writer
        self.stream = stream
        self.background = None
        self._gone = False
        self._cut_off = ""
        self._late: ApiError | None = None
        self.blocked_since: float | None = None
        self._started = False
        self._abort: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, plan = self.state, self.plan
        loop = asyncio.get_running_loop()
        settings = state.settings
        self._abort = scope.get("extensions", {}).get("abort")
        timers = [loop.call_later(settings.request_timeout_s, self._time_is_up, False)]
        if settings.queue_timeout_s is not None:
            timers.append(loop.call_later(settings.queue_timeout_s, self._time_is_up, True))
        watcher = asyncio.create_task(self._watch(receive))
        state.streams.add(self)
        try:
            state.admission.enter(plan.ticket, plan.jobs[0].requests[0].priority, self._start, self._refuse)
            if self.stream:
                await self._streamed(send)
            else:
                await self._collected(send)
        finally:
            watcher.cancel()
            for timer in timers:
                timer.cancel()
            state.streams.discard(self)
            plan.ticket.release()
            for job in plan.jobs:
                if not job.ended:
                    state.supervisor.abort(job)
                state.metrics.ended(job.output, len(job.requests), job.requests[0].max_tokens)
                state.live.ended(job.output)
            self._note(scope)

    def _note(self, scope: Scope) -> None:
        """For the log: counts and ends, never text."""
        outputs = [one for job in self.plan.jobs for one in job.output.outputs]
        metrics = [job.output.metrics for job in self.plan.jobs if job.output.metrics is not None]
        params = self.plan.jobs[0].requests[0].params
        scope["ridgeline.log"] = {
            "n": self.plan.shown,
            "max_tokens": self.plan.jobs[0].requests[0].max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "cached_tokens": sum(job.output.num_cached_tokens for job in self.plan.jobs),
            "prompt_tokens": sum(len(job.requests[0].tokens) for job in self.plan.jobs),
            "completion_tokens": sum(len(one.token_ids) for one in outputs),
            "finish": sorted({one.finish_reason or "abort" for one in outputs}),
            "stream": self.stream,
            "gone": self._gone,
            **({"cut_off": self._cut_off} if self._cut_off else {}),
            **_times(metrics),
        }

    def _start(self) -> None:
        for job in self.plan.jobs:
            self.state.supervisor.submit(job)

    def _refuse(self, error: ApiError) -> None:
        for job in self.plan.jobs:
            job.fail(error)

    # What may happen meanwhile

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.hang_up()

    def hang_up(self) -> None:
        """Nobody reads any more."""
        self._gone = True
        self.plan.news.set()

    def _time_is_up(self, only_queued: bool) -> None:
        queued = not any(job.running for job in self.plan.jobs)
        if only_queued and not queued:
            return
        self._late = queue_timeout(self.state.settings.retry_after_s) if queued else request_timeout()
        self.plan.news.set()

    def stalled(self, now: float) -> str:
        """Why its reader must be let go: "time", it has not read for too long; "size", too much waits for it; or ""."""
        since = self.blocked_since
        if since is None:
            return ""
        settings = self.state.settings
        if now - since > settings.stall_timeout_s:
            return "time"
        return "size" if self.unread_bytes() > settings.max_stream_bytes else ""

    def unread_bytes(self) -> int:
        """About how much waits to be told."""
        untold = [job.delivery.untold() for job in self.plan.jobs]
        return sum(characters + SCORE_BYTES * scores for characters, scores in untold)

    def cut_off(self, reason: str) -> None:
        """Let go of a reader that does not read, whatever is in its buffers."""
        self._cut_off = reason
        self.hang_up()
        if self._abort is not None:
            self._abort()

    # The two kinds

    async def _collected(self, send: Send) -> None:
        plan = self.plan
        while not all(job.ended for job in plan.jobs):
            await plan.news.wait()
            plan.news.clear()
            error = self._error()
            if error is not None:
                raise error
            if self._gone:
                return
        error = self._error()
        if error is not None:
            raise error
        body = encoded(self.writer.whole())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        for job in plan.jobs:
            job.told = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _error(self) -> ApiError | None:
        """The first thing that went wrong."""
        for job in self.plan.jobs:
            if job.error is not None:
                return job.error
        return self._late

    async def _streamed(self, send: Send) -> None:
        """Errors before the first event are ordinary answers; after it, an event of their own."""
        plan, writer = self.plan, self.writer
        left = dict(enumerate(plan.jobs))
        while left:
            await plan.news.wait()
            plan.news.clear()
            if self._gone:
                return
            error = self._error()
            if error is not None:
                if not self._started:
                    raise error
                await self._send(send, event(error.body()) + DONE, last=True)
                return
            try:
                parts: list[bytes] = []
                for place, job in [*left.items()]:
                    parts += writer.news(place, job)
                    if job.ended:
                        del left[place]
            except Exception:
                if not self._started:
                    raise
                await self._send(send, event(internal().body()) + DONE, last=True)
                raise
            if parts:
                if not self._started:
                    await self._open(send)
                    parts = [*writer.opening(), *parts]
                for job in plan.jobs:
                    job.told = True
                await self._send(send, b"".join(parts), last=False)
        await self._send(send, b"".join(writer.closing()) + DONE, last=True)

    async def _open(self, send: Send) -> None:
        self._started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send(self, send: Send, body: bytes, last: bool) -> None:
        if not self._started:
            await self._open(send)
        self.blocked_since = time.monotonic()
        try:
            await send({"type": "http.response.body", "body": body, "more_body": not last})
        finally:
            self.blocked_since = None


def _times(metrics: Sequence[RequestMetrics]) -> dict[str, float]:
    """Seconds of a request's parts, as far as it came: of its first prompt."""
    if not metrics:
        return {}
    one = metrics[0]
    moments = (one.arrival_s, one.first_scheduled_s, one.first_token_s, one.finished_s)
    parts = {"queue_s": (0, 1), "prefill_s": (1, 2), "ttft_s": (0, 2), "decode_s": (2, 3), "e2e_s": (0, 3)}
    found = {}
    for name, (begin, end) in parts.items():
        earlier, later = moments[begin], moments[end]
        if moments[1] is not None and earlier is not None and later is not None:
            found[name] = round(max(later - earlier, 0.0), 4)
    return found


async def sweep(state: State, every_s: float = 0.5) -> None:
    """For ever: cut off readers that do not read."""
    while True:
        await asyncio.sleep(every_s)
        now = time.monotonic()
        for one in [*state.streams]:
            if isinstance(one, Answer) and (reason := one.stalled(now)):
                one.cut_off(reason)
