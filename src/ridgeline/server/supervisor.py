"""The engine's process seen from the server: started, listened to, restarted when it dies, given up when it must be.

Knows processes, the channel and jobs. It must not know HTTP. A job that has told its client nothing survives a death
of the engine: it is sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from ridgeline.core.errors import RidgelineError
from ridgeline.core.step import TokenScore
from ridgeline.engine.messages import (
    Abort,
    Beat,
    ChannelError,
    Failed,
    Fault,
    Finish,
    Frames,
    Loading,
    Message,
    Ready,
    Refused,
    Start,
    Stepped,
    Stop,
    Submit,
    encode,
)
from ridgeline.server.errors import ApiError, engine_restarted, internal
from ridgeline.server.jobs import Job, scores_by_number
from ridgeline.server.settings import ServerSettings

logger = logging.getLogger("ridgeline.server")
TICK_S = 0.1


class Phase(StrEnum):
    """Where the engine is."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"
    FAILED = "failed"


class _Wire(asyncio.Protocol):
    """The server's end of the channel."""

    def __init__(self, take: Callable[[Message], None], lost: Callable[[], None]) -> None:
        self._frames = Frames()
        self._take = take
        self._lost = lost
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.push(data):
                self._take(message)
        except ChannelError as error:
            logger.error("the engine's process does not speak our messages: %s", error)
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()


class Supervisor:
    """One engine process at a time, and the jobs it works on.

    heard(message) learns of every Stepped and Beat, gap(seconds) of the time between two tokens of a request.
    ready(facts) runs once, before the first request is let in.
    """

    def __init__(
        self,
        settings: ServerSettings,
        ready: Callable[[Ready], Any],
        heard: Callable[[Stepped | Beat], None] = lambda message: None,
        gap: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.settings = settings
        self.phase = Phase.STARTING
        self.reason = ""
        self.facts: Ready | None = None
        self.loading = Loading("starting", 0, 0)
        self.steps = 0
        self.steps_before = 0
        self.restarts = 0
        self.replayed = 0
        self.heard_s = time.monotonic()
        self.progress_s = time.monotonic()
        self.beat: Beat | None = None
        self.ended = asyncio.Event()
        self._ready = ready
        self._heard = heard
        self._gap = gap
        self._last_s: dict[int, float] = {}
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._deaths: deque[float] = deque()
        self._process: asyncio.subprocess.Process | None = None
        self._wire: _Wire | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._waiting: list[Job] = []
        self._engine_seed = random.SystemRandom()

    # For others

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def jobs(self) -> set[Job]:
        """Jobs that have not ended."""
        return {*self._jobs.values(), *self._waiting}

    @property
    def silent_s(self) -> float:
        """How long the engine has said nothing."""
        return time.monotonic() - self.heard_s

    @property
    def stuck_s(self) -> float:
        """How long there has been no step, though there were requests; an engine that is silent makes none either."""
        return time.monotonic() - self.progress_s

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name="supervisor")

    def submit(self, job: Job) -> None:
        """Let the engine begin. Only while ready, or restarting."""
        if self.phase is Phase.READY:
            self._send_job(job)
        else:
            self._waiting.append(job)

    def abort(self, job: Job) -> None:
        """The job is not wanted any more."""
        if job in self._waiting:
            self._waiting.remove(job)
        numbers = [number for number in job.numbers if self._jobs.pop(number, None) is not None]
        for number in numbers:
            self._last_s.pop(number, None)
        if numbers:
            self._send(Abort(numbers))

    def fault(self, kind: str, value: int) -> None:
        """Order a fault (Start must have allowed it)."""
        self._send(Fault(kind, value))

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the engine's process; killed if it takes longer."""
        self._stopping = True
        self._send(Stop())
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), grace_s)
            except TimeoutError:
                self._kill()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._kill()
        if self.phase is not Phase.FAILED:
            self.phase = Phase.STOPPED

    # The process

    async def _supervise(self) -> None:
        try:
            while not self._stopping:
                await self._live()
                if self._stopping:
                    return
                if self.phase is Phase.FAILED:
                    break
                self._died()
                if self.phase is Phase.FAILED:
                    break
                pause = min(self.settings.backoff_s * 2 ** (len(self._deaths) - 1), self.settings.most_backoff_s)
                await asyncio.sleep(pause)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("supervision failed")
            self._give_up(f"the engine cannot be started: {type(error).__name__}")
        self.ended.set()

    async def _live(self) -> None:
        """One life of an engine's process, from its start to its death."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._lost = asyncio.Event()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for name in [one for one in environment if one.endswith("API_KEY") or one == "RIDGELINE_API_KEYS"]:
            del environment[name]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ridgeline.engine.process",
            str(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        theirs.close()
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        wire = _Wire(self._take, self._lost.set)
        await loop.create_unix_connection(lambda: wire, sock=ours)
        self._wire = wire
        began = self.heard_s = time.monotonic()
        roofs = {} if self.facts is None else self.facts.roofs
        self._send(Start(dict(self.settings.engine), faults=self.settings.faults, roofs=roofs))
        while not self._lost.is_set():
            try:
                await asyncio.wait_for(self._lost.wait(), TICK_S * 5)
            except TimeoutError:
                limit = self.settings.watchdog_s if self.phase is Phase.READY else self.settings.start_timeout_s
                since = self.progress_s if self.phase is Phase.READY else began
                if time.monotonic() - since > limit:
                    logger.error("the engine has made no progress for %.0f s: it is killed", limit)
                    break
        self._kill()
        await self._process.wait()
        self._wire = None

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._wire is not None and self._wire.transport is not None:
            self._wire.transport.abort()

    def _died(self) -> None:
        """Sort the jobs of a dead engine, and decide whether there will be another."""
        now = time.monotonic()
        code = None if self._process is None else self._process.returncode
        logger.error("the engine's process has ended (status %s)", code)
        if self.facts is None and self.phase is Phase.STARTING and code == 0:
            self._give_up("the engine ended before it was ready")
            return
        self.phase = Phase.RESTARTING
        self.restarts += 1
        self.steps_before += self.steps
        self.steps = 0
        jobs = list(dict.fromkeys(self._jobs.values()))
        self._jobs.clear()
        self._last_s.clear()
        kept: list[Job] = []
        for job in jobs:
            if job.told or (job.running and job.replays >= self.settings.max_replays):
                job.fail(engine_restarted())
            else:
                job.replays += job.running
                kept.append(job)
        self.replayed += len(kept)
        self._waiting = kept + self._waiting
        self._deaths.append(now)
        while self._deaths and now - self._deaths[0] > self.settings.restart_window_s:
            self._deaths.popleft()
        if len(self._deaths) > self.settings.max_restarts:
            self._give_up(f"the engine died {len(self._deaths)} times")

    def _give_up(self, reason: str) -> None:
        self.phase = Phase.FAILED
        self.reason = reason
        for job in self.jobs:
            job.fail(engine_restarted())
        self._jobs.clear()
        self._waiting.clear()
        self.ended.set()

    # Messages

    def _send(self, message: Message) -> None:
        if self._wire is not None and self._wire.transport is not None and not self._wire.transport.is_closing():
            self._wire.transport.write(encode(message))

    def _send_job(self, job: Job) -> None:
        numbers = [next(self._numbers) for _ in job.requests]
        submit: Submit = job.submit(numbers)
        for number in numbers:
            self._jobs[number] = job
        self._send(submit)

    def _take(self, message: Message) -> None:
        self.heard_s = time.monotonic()
        match message:
            case Stepped():
                self._stepped(message)
            case Beat():
                if message.steps != self.steps or not message.requests:
                    self.progress_s = self.heard_s
                self.steps, self.beat = message.steps, message
                self._heard(message)
            case Loading():
                self.loading = message
            case Failed():
                job = self._jobs.get(message.number)
                if job is not None:
                    self._fail(job, internal())
            case Ready():
                self._is_ready(message)
            case Refused():
                self._give_up(message.message)
            case _:
                raise ChannelError(f"{type(message).__name__} is not for an owner")

    def _is_ready(self, facts: Ready) -> None:
        if self.facts is None:
            try:
                self._ready(facts)
            except RidgelineError as error:
                self._give_up(" ".join(str(error).split()))
                self._kill()
                return
        self.facts = facts
        self.phase = Phase.READY
        self.progress_s = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            if not job.ended:
                self._send_job(job)

    def _fail(self, job: Job, error: ApiError) -> None:
        self.abort(job)
        job.fail(error)

    def _stepped(self, step: Stepped) -> None:
        """Tokens to their jobs. What goes wrong with one job ends that one alone."""
        now = time.perf_counter()
        self.steps = step.step
        self.progress_s = self.heard_s
        jobs = self._jobs
        scores = scores_by_number(step.scores) if step.scores else {}
        for number, scheduled_s, cached in step.firsts:
            if number in jobs:
                jobs[number].scheduled(number, scheduled_s, cached)
        for number, rows in step.prompts:
            if number in jobs:
                jobs[number].delivery.prompt_scores([_prompt_score(row) for row in rows])
        for number, token in zip(step.numbers, step.tokens):
            job = jobs.get(number)
            if job is None:
                continue
            before = self._last_s.get(number)
            if before is not None:
                self._gap(now - before)
            self._last_s[number] = now
            try:
                score = TokenScore(token, *next(scores[number])) if number in scores else TokenScore(token)
                stopped = job.token(number, score, now)
            except Exception:
                logger.exception("tokens could not be delivered")
                self._fail(job, internal())
                continue
            if stopped is not None:
                del jobs[number], self._last_s[number]
                self._send(Finish(number, stopped.at_token, stopped.stop))
        for number, reason, stop, preemptions in step.ended:
            job = jobs.pop(number, None)
            self._last_s.pop(number, None)
            if job is not None:
                job.finished(number, reason, stop, preemptions, now)
        self._heard(step)


def _prompt_score(row: Sequence[Any]) -> TokenScore:
    """A row of Stepped.prompts."""
    return TokenScore(row[0], row[1], row[2], tuple((token, value) for token, value in row[3]))
