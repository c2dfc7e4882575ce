"""Which request makes steps fail: found by letting halves of a failed step go alone.

Knows an Engine that retreats, and requests. It must not know messages or what went wrong. A request is acquitted
when it has brought a token; one that keeps failing alone is condemned, and everyone else goes on as if nothing had
been.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ridgeline.core.request import Constraint, FinishReason, Request
from ridgeline.engine.engine import Engine
from ridgeline.schedule import Event

logger = logging.getLogger("ridgeline.engine")

TRIES_ALONE = 3
"""So often may a request fail alone: a passing fault (no memory just now) is nobody's guilt."""
MOST_CONDEMNED = 3
"""So many condemned without one good step between: the engine is broken, not they."""


class EngineBroken(RuntimeError):
    """Steps fail whoever is in them."""


class GuardedConstraint:
    """A grammar's place in one output (core.request.Constraint), whose failure is its own request's and no step's.

    broke() is called once, when the grammar raises; from then on it allows everything, for a token that nobody
    will be told of.
    """

    def __init__(self, inner: Constraint, width: int, broke: Callable[[], None]) -> None:
        self._inner: Constraint | None = inner
        self._everything = b"\xff" * (-(-width // 32) * 4)
        self._broke = broke

    def mask(self) -> bytes:
        if self._inner is not None:
            try:
                return self._inner.mask()
            except Exception:
                self._fail()
        return self._everything

    def accept(self, token: int) -> bool:
        if self._inner is not None:
            try:
                return self._inner.accept(token)
            except Exception:
                self._fail()
        return False

    def _fail(self) -> None:
        logger.exception("a grammar failed")
        self._inner = None
        self._broke()


class Isolation:
    """Stands between the requests' owner and an engine, and holds back whoever must wait until a search ends.

    Invariant: each request that was added and has not ended is in the engine, in a group that is to be tried, or
    held, and in one of them only.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.retreats = True
        self._groups: deque[list[Request]] = deque()
        self._trial: dict[str, Request] = {}  # who has not brought a token yet
        self._held: dict[str, Request] = {}
        self._searching = False
        self._condemned_in_a_row = 0
        self._failed_alone: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return self.engine.has_work or self._searching

    def add(self, request: Request) -> None:
        """Queue a request; during a search it waits outside."""
        if self._searching:
            request.arrival_s = request.arrival_s or self.engine.clock.now()
            self._held[request.request_id] = request
        else:
            self.engine.add(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request wherever it is. None if it is not here (any more)."""
        request = self._outside(request_id)
        if request is not None:
            request.finish = FinishReason.ABORT
            return request
        self._trial.pop(request_id, None)
        return self.engine.abort(request_id)

    def finish(self, request_id: str, at_token: int, stop: str) -> Request | None:
        """End a request at its output token `at_token`."""
        request = self._outside(request_id)
        if request is not None:
            request.tokens = request.tokens[: request.prompt_len + at_token]
            request.finish, request.stop_reason = FinishReason.STOP, stop
            return request
        self._trial.pop(request_id, None)
        return self.engine.finish(request_id, at_token, stop)

    def _outside(self, request_id: str) -> Request | None:
        if request_id in self._held:
            return self._held.pop(request_id)
        for group in self._groups:
            for request in group:
                if request.request_id == request_id:
                    group.remove(request)
                    return request
        return None

    def step(self) -> list[Event]:
        """A step of the engine. Raises what the step raised; call `suspect` then."""
        if self._searching and not self._trial:
            self._next()
        events = self.engine.step()
        if events:
            self._condemned_in_a_row = 0
        if self._trial:
            for event in events:
                if event.token is not None or event.finish is not None:
                    self._trial.pop(event.request.request_id, None)
        return events

    def suspect(self) -> Request | None:
        """A step has failed: narrow the search. Returns the request that has been found guilty, already ended.

        Raises EngineBroken if one after the other is found guilty and no step succeeds.
        """
        failed = self.engine.failed
        waiting = list(self.engine.scheduler.waiting)
        names = {name for name in failed if name in self._trial} or set(failed)
        suspects = [one for one in waiting if one.request_id in names]
        if not self._searching:
            self._searching = True
            self._withdraw(waiting)
            self._held = {one.request_id: one for one in waiting if one.request_id not in names}
        else:
            self._withdraw(one for one in waiting if one.request_id in names or one.request_id in self._trial)
            unheard = [one for one in self._trial.values() if one.request_id not in names]
            if unheard:
                self._groups.appendleft(unheard)
        self._trial = {}
        if len(suspects) == 1:
            guilty = suspects[0]
            name = guilty.request_id
            self._failed_alone[name] = self._failed_alone.get(name, 0) + 1
            if self._failed_alone[name] < TRIES_ALONE:
                self._groups.appendleft(suspects)
                return None
            self._condemned_in_a_row += 1
            if self._condemned_in_a_row >= MOST_CONDEMNED:
                raise EngineBroken(f"{MOST_CONDEMNED} requests failed alone, one after the other")
            guilty.finish = FinishReason.ERROR
            return guilty
        half = -(-len(suspects) // 2)
        for group in (suspects[half:], suspects[:half]):
            if group:
                self._groups.appendleft(group)
        return None

    def _withdraw(self, requests: Iterable[Request]) -> None:
        """Take requests out of the engine, followers before those they follow."""
        for request in [*requests][::-1]:
            self.engine.scheduler.withdraw(request.request_id)

    def _next(self) -> None:
        """Begin the next trial; with none left, the search is over and those held go on."""
        while self._groups:
            group: Sequence[Request] = self._groups.popleft()
            if group:
                self._trial = {one.request_id: one for one in group}
                self._admit(group)
                return
        self._searching = False
        self._failed_alone.clear()
        held, self._held = self._held, {}
        self._admit(held.values())

    def _admit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.engine.add(request)
