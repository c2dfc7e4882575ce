"""Load on an OpenAI-compatible endpoint: jobs are sent when they arrive, and every token of the answers is timed.

Knows the completions and chat APIs as any such server speaks them, and a client. It must not know engines. Times
count from the moment at which a job was to arrive, not from when this client got round to it: a client that falls
behind makes the figures worse, never better, and says by how much it was late.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.workload.arrivals import Job, prompt_ids
from ridgeline.workload.http import Answer, Client, HttpError, events
from ridgeline.workload.measure import Served

COMPLETIONS, CHAT = "completions", "chat"
PATHS = {COMPLETIONS: "/v1/completions", CHAT: "/v1/chat/completions"}
WORDS = (
    "ridge", "line", "stone", "river", "cloud", "north", "path", "light", "snow", "field", "wind", "tree", "lake",
    "morning", "valley", "slope", "rock", "summit", "trail", "grass", "bird", "fog", "sun", "rain", "hut", "bridge",
)  # fmt: skip
NO_ANSWER, BROKEN, TIMEOUT = "connection", "stream", "timeout"
"""Ends that no status names: no answer at all, one that broke off or told of an error, one that took too long."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked of whom.

    endpoint: "completions" takes prompts as token ids below `vocabulary`, or as text with vocabulary None; "chat"
    takes text, about a word a token. ignore_eos: ask for the whole output length, which OpenAI's own API does not
    know. extra: further fields of the body; those of the same name win, objects are merged.
    """

    model: str
    endpoint: str = COMPLETIONS
    vocabulary: int | None = 1000
    ignore_eos: bool = True
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.endpoint not in PATHS:
            raise InvalidArgument("endpoint", f"must be one of {', '.join(PATHS)}, not {self.endpoint!r}")

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]

    def body(self, job: Job, number: int) -> dict[str, Any]:
        """The request of a job, as JSON."""
        found: dict[str, Any] = {
            "model": self.model,
            "max_tokens": job.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            found["ignore_eos"] = True
        if self.endpoint == CHAT:
            found["messages"] = [{"role": "user", "content": words(job, number, self.seed)}]
        elif self.vocabulary is None:
            found["prompt"] = words(job, number, self.seed)
        else:
            found["prompt"] = prompt_ids(job, number, self.vocabulary, self.seed)
        for name, value in self.extra.items():
            before = found.get(name)
            found[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
        return found


@dataclass(slots=True)
class Outcome:
    """What became of one job.

    status: of the answer, None without one. end: "" if it was served to its end, else the status as text, or one
    of NO_ANSWER, BROKEN, TIMEOUT. detail: what the server said. late_s: from when it was to arrive to when it was
    sent. told_tokens: as the server counted them.
    """

    served: Served
    status: int | None = None
    end: str = NO_ANSWER
    detail: str = ""
    late_s: float = 0.0
    told_tokens: int | None = None


def words(job: Job, number: int, seed: int = 0) -> str:
    """Words that no prompt of another number begins with, about as many as the job has prompt tokens."""
    draw = random.Random(f"words {seed} {number}")
    return " ".join(draw.choices(WORDS, k=max(job.prompt_tokens, 1)))


async def load(
    client: Client,
    target: Target,
    jobs: Sequence[Job],
    concurrency: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Outcome]:
    """Send all jobs and wait for all answers; outcomes in the jobs' order. Never raises because of an answer.

    concurrency: at most so many requests under way. If all jobs arrive at once that is a closed loop, and a job
    arrives when it gets its turn; otherwise a job that waits for its turn is late, and its times say so.
    """
    closed = concurrency is not None and all(job.arrival_s == 0 for job in jobs)
    bodies = [json.dumps(target.body(job, number)).encode() for number, job in enumerate(jobs)]
    begin = clock()
    outcomes = [Outcome(Served(job.prompt_tokens, begin + job.arrival_s)) for job in jobs]
    places = None if concurrency is None else asyncio.Semaphore(concurrency)
    done = 0

    async def one(number: int) -> None:
        nonlocal done
        outcome = outcomes[number]
        try:
            if closed:
                outcome.served.arrival_s = clock()
            outcome.late_s = clock() - outcome.served.arrival_s
            await ask(client, target, bodies[number], outcome, clock)
        finally:
            if places is not None:
                places.release()
            done += 1
            if progress is not None:
                progress(done, len(jobs))

    tasks = []
    for number in sorted(range(len(jobs)), key=lambda place: jobs[place].arrival_s):
        wait_s = outcomes[number].served.arrival_s - clock()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        if places is not None:
            await places.acquire()
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    return outcomes


async def ask(
    client: Client, target: Target, body: bytes, outcome: Outcome, clock: Callable[[], float] = time.perf_counter
) -> None:
    """One request; what comes of it goes into `outcome`."""
    try:
        async with asyncio.timeout(target.timeout_s):
            answer = await client.ask("POST", target.path, body)
            outcome.status = answer.status
            try:
                if answer.status == 200:
                    await _stream(answer, outcome, clock)
                else:
                    outcome.end = str(answer.status)
                    outcome.detail = said(await answer.read())
            finally:
                answer.close()
    except TimeoutError:
        outcome.end, outcome.detail = TIMEOUT, f"longer than {target.timeout_s:g} s"
    except HttpError as error:
        outcome.end, outcome.detail = (NO_ANSWER if outcome.status is None else BROKEN), str(error)
    outcome.served.error = outcome.end or None


async def _stream(answer: Answer, outcome: Outcome, clock: Callable[[], float]) -> None:
    """Read a stream to its end; the time of every token."""
    deltas: list[Delta] = []
    counted, whole = 0, False
    async for data in events(answer):
        now = clock()
        if data == b"[DONE]":
            whole = True  # and on to the end of the body, so that the connection serves again
            continue
        try:
            part = json.loads(data)
            usage, choices = part.get("usage"), part.get("choices") or ()
            error = part.get("error")
        except (ValueError, AttributeError):
            outcome.end, outcome.detail = BROKEN, "an event that is no JSON object"
            return
        if error:
            outcome.end, outcome.detail = BROKEN, said(data)
            return
        if usage:
            outcome.told_tokens = int(usage.get("completion_tokens") or 0)
            outcome.served.prompt_tokens = int(usage.get("prompt_tokens") or outcome.served.prompt_tokens)
            details = usage.get("prompt_tokens_details") or {}
            outcome.served.cached_tokens = int(details.get("cached_tokens") or 0)
        size = sum(map(_size, choices))
        if size:
            known = _known(choices)
            if known is None and usage and outcome.told_tokens is not None:
                known = max(outcome.told_tokens - counted, 0)  # a server that counts as it goes
            counted += known or 0
            deltas.append(Delta(now, size, known))
    if not whole:
        outcome.end, outcome.detail = BROKEN, "the stream ended without [DONE]"
        return
    outcome.end = ""
    outcome.served.token_times_s = token_times(deltas, outcome.told_tokens)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer: when it came, how long its text is, and how many tokens it has, if the server said."""

    at_s: float
    characters: int
    tokens: int | None = None


def token_times(deltas: Sequence[Delta], total: int | None) -> list[float]:
    """When each token came. total: tokens as the server counted them, None if it did not.

    A delta may carry several tokens. Where the server says how many, that holds; else what is left of the total is
    spread over the deltas by the length of their texts, at least one each. The first and the last time are exact.
    """
    if not deltas:
        return []
    if total is None or total <= len(deltas):
        counts = [one.tokens or 1 for one in deltas]
    elif all(one.tokens for one in deltas):
        counts = [one.tokens or 1 for one in deltas]
        counts[-1] += max(total - sum(counts), 0)  # tokens without a text, such as the end of sequence
    else:
        counts, whole = [1] * len(deltas), sum(one.characters for one in deltas)
        extra, seen, given = total - len(deltas), 0, 0
        for place, one in enumerate(deltas):
            seen += one.characters
            due = round(extra * seen / whole)
            counts[place] += due - given
            given = due
    return [one.at_s for one, count in zip(deltas, counts) for _ in range(count)]


def _size(choice: Mapping[str, Any]) -> int:
    """Characters that a choice of a chunk adds: text, reasoning, arguments of tools."""
    delta = choice.get("delta") or {}
    text = choice.get("text") or delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or ""
    calls = delta.get("tool_calls") or ()
    return len(text) + sum(len((one.get("function") or {}).get("arguments") or "") for one in calls)


def _known(choices: Iterable[Mapping[str, Any]]) -> int | None:
    """Tokens of a chunk, where it lists them."""
    ids = [choice["token_ids"] for choice in choices if choice.get("token_ids")]
    return sum(map(len, ids)) if ids else None


def said(body: bytes) -> str:
    """An error body's message and code, short."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        text = error if isinstance(error, str) else f"{error.get('code') or ''} {error.get('message') or ''}"
    except (ValueError, AttributeError):
        text = body.decode("utf-8", "replace")
    return " ".join(text.split())[:200]


def ends(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many were served ("ok") and how the others ended, the most frequent first."""
    return dict(Counter(one.end or "ok" for one in outcomes).most_common())
