"""A prompt on its way through the server: what was asked, what has come back, and who waits for it.

Knows intake's requests, delivery and messages. It must not know HTTP responses or processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ridgeline.core.request import FinishReason, Request, RequestOutput, SamplingParams
from ridgeline.core.step import TokenScore
from ridgeline.engine.messages import Submit
from ridgeline.server.errors import ApiError
from ridgeline.text.delivery import Delivery, Stopped
from ridgeline.text.tokenizer import Tokenizer

_DEFAULTS = SamplingParams()
_NOT_SENT = ("n", "seed", "stop", "bad_words", "detokenize", "skip_special_tokens", "include_stop_str_in_output")
"""Parameters that are the server's own to carry out."""


def wire_params(params: SamplingParams) -> dict[str, Any]:
    """SamplingParams as a Submit carries them: what differs from the defaults and concerns the engine."""
    values: dict[str, Any] = {}
    for one in fields(params):
        value = getattr(params, one.name)
        if one.name not in _NOT_SENT and value != getattr(_DEFAULTS, one.name):
            values[one.name] = list(value) if isinstance(value, tuple) else value
    if params.logit_bias:
        values["logit_bias"] = {str(token): amount for token, amount in params.logit_bias.items()}
    return values


@dataclass(slots=True, eq=False)
class Job:
    """One prompt and its samples.

    numbers: of its requests in the engine; changed when it is sent again. changed: set when there is news.
    streaming: news means any token, not only the end. told: something has left for the client. running: the engine
    has begun with it. error: why it ended badly. on_first_token: called once, when its prompt is computed.
    """

    text: str | None
    requests: list[Request]
    tokenizer: Tokenizer
    grammar: str
    arrival_s: float
    streaming: bool
    numbers: list[int]
    delivery: Delivery
    changed: asyncio.Event
    told: bool = False
    running: bool = False
    replays: int = 0
    error: ApiError | None = None
    on_first_token: Callable[[], None] | None = None

    @classmethod
    def of(
        cls,
        text: str | None,
        requests: list[Request],
        tokenizer: Tokenizer,
        grammar: str,
        arrival_s: float,
        streaming: bool,
    ) -> Job:
        """A job that is not sent yet."""
        delivery = Delivery("", text, requests, tokenizer)
        return cls(text, requests, tokenizer, grammar, arrival_s, streaming, [], delivery, asyncio.Event())

    @property
    def output(self) -> RequestOutput:
        return self.delivery.output

    @property
    def ended(self) -> bool:
        return self.error is not None or self.delivery.output.finished

    def submit(self, numbers: Sequence[int]) -> Submit:
        """The message that starts it, under these numbers; whatever an earlier start brought is forgotten."""
        self.numbers = list(numbers)
        first = self.requests[0]
        for number, request in zip(numbers, self.requests):
            request.request_id = str(number)
            request.arrival_s, request.scheduled_s = self.arrival_s, None
        self.delivery = Delivery(str(numbers[0]), self.text, self.requests, self.tokenizer)
        self.running = False
        return Submit(
            numbers=self.numbers,
            seeds=[request.seed for request in self.requests],
            ids=first.tokens,
            params=wire_params(first.params),
            max_tokens=first.max_tokens,
            eos_ids=sorted(first.eos_ids),
            bad_word_ids=[list(word) for word in first.bad_word_ids],
            priority=first.priority,
            salt=first.salt,
            arrival_s=self.arrival_s,
            grammar=self.grammar,
        )

    # What the engine says of it

    def scheduled(self, number: int, scheduled_s: float, cached: int) -> None:
        request = self.requests[self.numbers.index(number)]
        request.scheduled_s, request.cached_tokens = scheduled_s, cached
        self.running = True
        self.delivery.scheduled(request)

    def token(self, number: int, score: TokenScore, now_s: float) -> Stopped | None:
        if self.on_first_token is not None:
            self.on_first_token()
            self.on_first_token = None
        _, stopped = self.delivery.push(str(number), score, now_s)
        if self.streaming or (stopped is not None and self.ended):
            self.changed.set()
        return stopped

    def finished(self, number: int, reason: str, stop: int | None, preemptions: int, now_s: float) -> None:
        self.requests[self.numbers.index(number)].preemptions = preemptions
        self.delivery.finish(str(number), FinishReason(reason), stop, now_s)
        if self.streaming or self.ended:
            self.changed.set()

    def fail(self, error: ApiError) -> None:
        """It ends here, badly."""
        if not self.ended:
            self.error = error
        self.changed.set()

    def open_numbers(self) -> list[int]:
        """Numbers of its requests that the engine may still work on."""
        return [int(name) for name in self.delivery.unfinished] if self.numbers else []


Score = tuple[float, int, tuple[tuple[int, float], ...]]


def scores_by_number(rows: Sequence[Sequence[Any]]) -> Mapping[int, Iterator[Score]]:
    """A Stepped's scores: of each request that asked, those of its tokens one by one (drafts bring several)."""
    found: dict[int, list[Score]] = {}
    for number, logprob, rank, others in rows:
        found.setdefault(number, []).append((logprob, rank, tuple((token, value) for token, value in others)))
    return {number: iter(scores) for number, scores in found.items()}
