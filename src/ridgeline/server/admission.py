"""Who gets in: so many requests and prompt tokens at a time, reserved before any work is done for them.

Knows counts, and how fast steps have been. It must not know requests' contents or HTTP. With objectives, who would
miss them is refused; who would only have to wait, waits.
"""

from __future__ import annotations

from collections.abc import Mapping

from ridgeline.engine.messages import Ready, Stepped
from ridgeline.server.errors import ApiError, invalid, overloaded
from ridgeline.server.settings import ServerSettings

QUEUE_FACTOR = 4
SMOOTHING = 0.1


class Pace:
    """Seconds of a prompt token and of a decode step, smoothed over what steps have taken."""

    def __init__(self) -> None:
        self.token_s: float | None = None
        self.step_s: float | None = None
        self.decoding = 0

    def heard(self, step: Stepped) -> None:
        if step.kind == "decode":
            self.step_s = _smoothed(self.step_s, step.step_s)
        elif step.new_tokens:
            self.token_s = _smoothed(self.token_s, step.step_s / step.new_tokens)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)


class Ticket:
    """Room for some requests. Give it back once, whatever happened."""

    def __init__(self, admission: Admission, rows: int, tokens: int) -> None:
        self._admission = admission
        self.rows, self.tokens = rows, tokens
        self._held = True

    def counted(self, tokens: int) -> None:
        """The prompt has been tokenized: this many."""
        if self._held:
            self._admission.tokens += tokens - self.tokens
            self.tokens = tokens

    def computed(self, tokens: int) -> None:
        """So many of its prompt tokens are computed: they are not ahead of anyone any more."""
        self.counted(self.tokens - tokens)

    def release(self) -> None:
        if self._held:
            self._held = False
            self._admission.rows -= self.rows
            self._admission.tokens -= self.tokens


class Admission:
    """Counts what is in the server. facts: None until the engine is ready."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.rows = self.tokens = 0
        self.refused = 0
        self.seats = 0
        self.most_rows = 0
        self.pace = Pace()

    def open(self, facts: Ready) -> None:
        """The engine's seats are known."""
        queued = self._settings.max_queued
        self.seats = facts.max_num_seqs
        self.most_rows = self.seats + (QUEUE_FACTOR * self.seats if queued is None else queued)

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

    def predicted(self, rows: int, tokens: int) -> Mapping[str, float]:
        """Seconds to the first token, and of each further one, for a request that came now."""
        pace = self.pace
        ttft = (self.tokens + tokens) * (pace.token_s or 0.0)
        beyond = max(self.rows + rows - self.seats, 0)
        if beyond:  # a seat must fall vacant first: outputs end one by one, about one a step in a full batch
            ttft += beyond * (pace.step_s or 0.0)
        return {"ttft": ttft, "tpot": pace.step_s or 0.0}

    def _would_miss(self, rows: int, tokens: int) -> bool:
        objectives = self._settings.slo
        if not objectives or not self.rows:
            return False
        return self.predicted(rows, tokens)["ttft"] > objectives.get("ttft", float("inf"))

    def _overloaded(self) -> ApiError:
        wait_s = self.tokens * (self.pace.token_s or 0.0)
        return overloaded(max(self._settings.retry_after_s, min(int(wait_s), 60)))
