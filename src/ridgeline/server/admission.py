"""Who gets in: so many requests and prompt tokens at a time, reserved before any work is done for them.

Knows counts, the floors of steps that the engine told of, and how long steps have been. It must not know requests'
contents or HTTP. With objectives, a request whose first token would come too late is refused, and one that would make
everyone's tokens too slow waits at the door until others have left.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ridgeline.engine.messages import Ready, Stepped
from ridgeline.perf.card import Line
from ridgeline.server.errors import ApiError, internal, invalid, overloaded
from ridgeline.server.settings import ServerSettings

logger = logging.getLogger("ridgeline.server")

QUEUE_FACTOR = 4
SMOOTHING = 0.1
KEPT = 0.998
"""What a step leaves of earlier counts of tokens and ends."""
FIRST_GUESS_TOKENS = 16
"""Tokens of an output, until some have ended: OpenAI's default for completions."""


class Pace:
    """What steps will take: their floor by the performance model, times what steps have taken of it so far.

    Without floors (nobody knows the machine's roofs) a decode step counts as one unit and a prefill as its tokens.
    """

    def __init__(self, floors: Mapping[str, Any] | None = None) -> None:
        self._decode = _line((floors or {}).get("decode"), ((1.0, 1.0),))
        self._prefill = _line((floors or {}).get("prefill"), ((1.0, 1.0), (2.0, 2.0)))
        known = 1.0 if floors else None
        self._decode_factor: float | None = known
        self._prefill_factor: float | None = known
        self._heard = {"decode": False, "prefill": False}
        self._tokens = self._ends = 0.0

    def heard(self, step: Stepped) -> None:
        """A step has been: of decodes alone, or with prompt tokens in it."""
        if step.kind == "decode" and step.running:
            taken = step.step_s / self._decode(step.running)
            self._decode_factor = _smoothed(self._decode_factor, taken, self._first("decode"))
        elif step.kind and step.new_tokens:
            taken = step.step_s / self._prefill(step.new_tokens)
            self._prefill_factor = _smoothed(self._prefill_factor, taken, self._first("prefill"))
        self._tokens = KEPT * self._tokens + len(step.numbers)
        self._ends = KEPT * self._ends + len(step.ended)

    def _first(self, kind: str) -> bool:
        first, self._heard[kind] = not self._heard[kind], True
        return first

    def decode_s(self, requests: int) -> float:
        """A decode step of so many requests."""
        return self._decode(max(requests, 1)) * (self._decode_factor or 0.0)

    def prefill_s(self, tokens: int, a_step: int) -> float:
        """So many prompt tokens, in steps of at most `a_step`."""
        whole, rest = divmod(tokens, max(a_step, 1))
        units = whole * self._prefill(a_step) + (self._prefill(rest) if rest else 0.0)
        return units * (self._prefill_factor or 0.0)

    def vacant_s(self, seats: int) -> float:
        """Until the next of so many seats falls vacant."""
        tokens = (self._tokens + FIRST_GUESS_TOKENS) / (self._ends + 1)
        return tokens * self.decode_s(seats) / max(seats, 1)


def _line(points: Any, otherwise: tuple[tuple[float, float], ...]) -> Line:
    return Line(tuple((float(number), float(seconds)) for number, seconds in points) if points else otherwise)


def _smoothed(old: float | None, new: float, first: bool) -> float:
    """The first measured value replaces what was assumed."""
    return new if old is None or first else old + SMOOTHING * (new - old)


class Ticket:
    """Room for some requests. Give it back once, whatever happened."""

    def __init__(self, admission: Admission, rows: int, tokens: int) -> None:
        self._admission = admission
        self.rows, self.tokens = rows, tokens
        self.seated = False
        self.held = True

    def counted(self, tokens: int) -> None:
        """The prompt has been tokenized: this many."""
        if self.held:
            self._admission.tokens += tokens - self.tokens
            self.tokens = tokens

    def computed(self, tokens: int) -> None:
        """So many of its prompt tokens are computed: they are not ahead of anyone any more."""
        self.counted(self.tokens - tokens)

    def release(self) -> None:
        if self.held:
            self.held = False
            self._admission.left(self)


class Admission:
    """Counts what is in the server. Open once the engine is ready."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.rows = self.tokens = 0
        self.seated = 0
        self.refused = 0
        self.seats = 0
        self.most_rows = 0
        self._a_step = 1
        self.pace = Pace()
        self._door: list[tuple[int, int, Ticket, Callable[[], None], Callable[[ApiError], None]]] = []
        self._order = itertools.count()

    def open(self, facts: Ready) -> None:
        """The engine's seats are known."""
        queued = self._settings.max_queued
        self.seats = facts.max_num_seqs
        self.most_rows = self.seats + (QUEUE_FACTOR * self.seats if queued is None else queued)
        self._a_step = facts.max_num_batched_tokens
        self.pace = Pace(facts.floors)

    def reserve(self, rows: int, tokens: int, param: str = "n") -> Ticket:
        """Room for a prompt of about `tokens` tokens and `rows` outputs. ApiError 429, or 400 if it never fits."""
        if rows > self.most_rows:
            raise invalid(param, f"{param}: {rows} outputs at once are more than the {self.most_rows} that fit here")
        most_tokens = self._settings.max_queued_tokens
        busy = self.rows + rows > self.most_rows
        if most_tokens is not None and self.tokens and self.tokens + tokens > most_tokens:
            busy = True
        if busy or self._would_miss(rows, tokens):
            self.refused += 1
            raise self._overloaded()
        self.rows += rows
        self.tokens += tokens
        return Ticket(self, rows, tokens)

    def enter(
        self, ticket: Ticket, priority: int, start: Callable[[], None], refuse: Callable[[ApiError], None]
    ) -> None:
        """start() at once, or when enough have left for the objective; lower priorities first, then in order."""
        heapq.heappush(self._door, (priority, next(self._order), ticket, start, refuse))
        self._let_in()

    def left(self, ticket: Ticket) -> None:
        """A ticket has been given back."""
        self.rows -= ticket.rows
        self.tokens -= ticket.tokens
        if ticket.seated:
            self.seated -= ticket.rows
        elif any(one[2] is ticket for one in self._door):
            self._door = [one for one in self._door if one[2] is not ticket]
            heapq.heapify(self._door)
        self._let_in()

    def heard(self, step: Stepped) -> None:
        """A step tells how fast steps are; those at the door may fit now."""
        self.pace.heard(step)
        if self._door:
            self._let_in()

    def empty(self, error: ApiError) -> None:
        """Whoever waits at the door is told this."""
        door, self._door = self._door, []
        for *_, refuse in door:
            refuse(error)

    def fair_seats(self) -> int:
        """How many outputs may run at once for everyone's tokens to come within the objective; at least one."""
        objective = self._settings.slo.get("tpot")
        if objective is None:
            return self.most_rows
        low, high = 1, max(self.seats, 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.pace.decode_s(middle) <= objective else (low, middle - 1)
        return low

    def _let_in(self) -> None:
        seats = self.fair_seats()
        while self._door:
            _, _, ticket, start, refuse = self._door[0]
            if self.seated and self.seated + ticket.rows > seats:
                return
            heapq.heappop(self._door)
            ticket.seated = True
            self.seated += ticket.rows
            try:
                start()
            except Exception:  # whoever left or was heard of just now has no part in it
                logger.exception("a request could not be started")
                refuse(internal())

    def predicted(self, rows: int, tokens: int) -> Mapping[str, float]:
        """Seconds to the first token, and of each further one, for a request that came now."""
        pace, seats = self.pace, min(self.fair_seats(), self.seats)
        ttft = pace.prefill_s(self.tokens + tokens, self._a_step)
        beyond = max(self.rows + rows - seats, 0)
        return {
            "ttft": ttft + beyond * pace.vacant_s(seats),
            "tpot": pace.decode_s(min(self.rows + rows, seats)),
        }

    def _would_miss(self, rows: int, tokens: int) -> bool:
        objective = self._settings.slo.get("ttft")
        return objective is not None and bool(self.rows) and self.predicted(rows, tokens)["ttft"] > objective

    def _overloaded(self) -> ApiError:
        wait_s = self.pace.prefill_s(self.tokens, self._a_step)
        return overloaded(max(self._settings.retry_after_s, min(int(wait_s), 60)))
