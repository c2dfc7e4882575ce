"""/v1/completions: prompts as text or ids, several at once, with echo and best_of.

Knows the request and what its answers look like. It must not know engines.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.core.request import CompletionOutput
from ridgeline.server.answers import Answer, event
from ridgeline.server.formats import completion_logprobs, finish_reason, usage
from ridgeline.server.intake import Plan, body_of, plan_completion, read_body
from ridgeline.server.jobs import Job
from ridgeline.server.openapi import COMPLETED, described
from ridgeline.server.requests import CompletionRequest
from ridgeline.server.state import State


class CompletionWriter:
    """Answers of one request."""

    def __init__(self, body: CompletionRequest, plan: Plan, model: str, created: int) -> None:
        self.body = body
        self.plan = plan
        self.only_echo = body.max_tokens == 0
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": "ridgeline",
        }
        options = body.stream_options
        self._counts = options is not None and options.include_usage
        self._counts_always = options is not None and options.continuous_usage_stats
        self._offsets: dict[tuple[int, int], int] = {}
        self._told: dict[tuple[int, int], int] = {}
        self._ended: set[tuple[int, int]] = set()

    def opening(self) -> Iterator[bytes]:
        yield from ()

    def news(self, place: int, job: Job) -> Iterator[bytes]:
        for index, text, ids in job.delivery.news():
            output = job.output.outputs[index]
            key = (place, index)
            ended = output.finish_reason is not None
            if key in self._ended:
                continue
            if self.only_echo:
                if not ended:
                    continue
                text, ids = "", ()
            logprobs = None
            first = key not in self._told
            if self.body.logprobs is not None:
                logprobs = self._logprobs(key, job, output, ids, first)
            if first and self.body.echo:
                text = self._prompt(job) + text
            self._told[key] = self._told.get(key, 0) + len(ids)
            if not text and not ended and not (logprobs and logprobs["tokens"]):
                continue
            if ended:
                self._ended.add(key)
            yield self._event(place * self.body.n + index, text, logprobs, self._end(output) if ended else None)

    def closing(self) -> Iterator[bytes]:
        if self._counts:
            yield event({**self._head, "choices": [], "usage": self._usage()})

    def whole(self) -> dict[str, Any]:
        choices = []
        for place, job in enumerate(self.plan.jobs):
            for index, output in enumerate(self._best(job)):
                ids = () if self.only_echo else tuple(output.token_ids)
                logprobs = None
                if self.body.logprobs is not None:
                    logprobs = self._logprobs((place, index), job, output, ids, True)
                text = "" if self.only_echo else output.text
                if self.body.echo:
                    text = self._prompt(job) + text
                choices.append(
                    {
                        "text": text,
                        "index": place * self.body.n + index,
                        "logprobs": logprobs,
                        "finish_reason": self._end(output),
                    }
                )
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return usage(self.plan.jobs, self.only_echo)

    def _end(self, output: CompletionOutput) -> str:
        return "length" if self.only_echo else finish_reason(output)

    def _event(self, index: int, text: str, logprobs: Any, end: str | None) -> bytes:
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": end}
        counted = {"usage": self._usage()} if self._counts_always else {"usage": None} if self._counts else {}
        return event({**self._head, "choices": [choice], **counted})

    def _best(self, job: Job) -> list[CompletionOutput]:
        """The n outputs to show: of best_of, those with the highest mean log-probability."""
        outputs = job.output.outputs
        if len(outputs) > self.body.n:

            def mean(output: CompletionOutput) -> float:
                return (output.cumulative_logprob or 0.0) / max(len(output.token_ids), 1)

            outputs = sorted(outputs, key=mean, reverse=True)[: self.body.n]
        return outputs

    def _prompt(self, job: Job) -> str:
        return job.text if job.text is not None else job.tokenizer.decode(job.output.prompt_token_ids)

    def _logprobs(
        self, key: tuple[int, int], job: Job, output: CompletionOutput, ids: tuple[int, ...], first: bool
    ) -> dict[str, Any]:
        """Of these ids, with the prompt's in front if it is echoed and nothing has been told yet."""
        told = 0 if first else self._told.get(key, 0)
        top = self.body.logprobs or 0
        tables: list[Any] = list((output.logprobs or [])[told : told + len(ids)])
        tokens = list(ids)
        if first and self.body.echo:
            prompt, scores = job.output.prompt_token_ids, job.output.prompt_logprobs or []
            skip = 1 if job.text is not None and prompt and prompt[0] in job.tokenizer.special_ids else 0
            tokens = [*prompt[skip:], *tokens]
            tables = [*scores[skip : len(prompt)], *tables]
        found, self._offsets[key] = completion_logprobs(
            job.tokenizer, tokens, tables, top, self._offsets.get(key, 0) if not first else 0
        )
        return found


def router(state: State) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/completions", **described(CompletionRequest, state.settings, state.names, COMPLETED))
    async def completions(request: Request) -> Response:
        state.open_face()
        body = read_body(CompletionRequest, await body_of(request, state), state)
        plan = await plan_completion(request, body, state)
        return Answer(state, plan, CompletionWriter(body, plan, body.model, int(time.time())), body.stream)

    return routes
