"""/v1/chat/completions: messages in, a message out, with tools and JSON where asked for.

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
from ridgeline.server import tools
from ridgeline.server.answers import Answer, event
from ridgeline.server.formats import chat_logprobs, finish_reason, usage
from ridgeline.server.intake import Plan, body_of, plan_chat, read_body
from ridgeline.server.jobs import Job
from ridgeline.server.openapi import COMPLETED, described
from ridgeline.server.requests import ChatRequest
from ridgeline.server.settings import ServerSettings
from ridgeline.server.state import State
from ridgeline.server.tools import Call, CallReader


class ChatWriter:
    """Answers of one request."""

    def __init__(self, body: ChatRequest, plan: Plan, settings: ServerSettings) -> None:
        self.body = body
        self.plan = plan
        self._settings = settings
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": "ridgeline",
        }
        options = body.stream_options
        self._counts = options is not None and options.include_usage
        self._counts_always = options is not None and options.continuous_usage_stats
        self._told: dict[int, int] = {}
        self._ended: set[int] = set()
        self._readers: dict[int, CallReader] = {}

    def _reader(self, index: int) -> CallReader | None:
        """Who looks for calls in an output; None if there are no tools."""
        body = self.body
        if tools.described(body) is None:
            return None
        if index not in self._readers:
            names = [tool.function.name for tool in body.tools or ()]
            self._readers[index] = CallReader(
                names, tools.is_forced(body), self._settings.max_tool_text_bytes, body.parallel_tool_calls
            )
        return self._readers[index]

    def opening(self) -> Iterator[bytes]:
        for index in range(self.body.n):
            yield self._event(index, {"role": "assistant", "content": ""}, None, None)

    def news(self, place: int, job: Job) -> Iterator[bytes]:
        for index, text, ids in job.delivery.news():
            if index in self._ended:
                continue
            output = job.output.outputs[index]
            ended = output.finish_reason is not None
            logprobs = self._logprobs(job, output, self._told.get(index, 0), ids)
            self._told[index] = self._told.get(index, 0) + len(ids)
            reader = self._reader(index)
            calls: list[Call] = []
            if reader is not None:
                before = len(reader.calls)
                text, calls = reader.push(text)
                if ended:
                    rest, more = reader.finish()
                    text, calls = text + rest, [*calls, *more]
                if calls:
                    delta = {"tool_calls": [{"index": before + at, **call.shown()} for at, call in enumerate(calls)]}
                    yield self._event(index, delta, None, None)
            if text or (logprobs is not None and ids):
                yield self._event(index, {"content": text}, logprobs, None)
            if ended:
                self._ended.add(index)
                yield self._event(index, {}, None, self._end(output, reader))

    def closing(self) -> Iterator[bytes]:
        if self._counts:
            yield event({**self._head, "choices": [], "usage": usage(self.plan.jobs)})

    def whole(self) -> dict[str, Any]:
        (job,) = self.plan.jobs
        choices = []
        for index, output in enumerate(job.output.outputs):
            text: str | None = output.text
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            reader = self._reader(index)
            if reader is not None:
                shown, _ = reader.push(output.text)
                rest, _ = reader.finish()
                message["content"] = (shown + rest).strip() or None if reader.calls else shown + rest
                if reader.calls:
                    message["tool_calls"] = [call.shown() for call in reader.calls]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(job, output, 0, tuple(output.token_ids)),
                    "finish_reason": self._end(output, reader),
                }
            )
        return {**self._head, "choices": choices, "usage": usage(self.plan.jobs)}

    def _end(self, output: CompletionOutput, reader: CallReader | None) -> str:
        end = finish_reason(output)
        return "tool_calls" if reader is not None and reader.calls and end == "stop" else end

    def _logprobs(self, job: Job, output: CompletionOutput, told: int, ids: tuple[int, ...]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        tables = (output.logprobs or [])[told : told + len(ids)]
        return chat_logprobs(job.tokenizer, ids, tables, self.body.top_logprobs or 0)

    def _event(self, index: int, delta: dict[str, Any], logprobs: Any, end: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}
        counted: dict[str, Any] = {}
        if self._counts_always:
            counted = {"usage": usage(self.plan.jobs)}
        return event({**self._head, "choices": [choice], **counted})


def router(state: State) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", **described(ChatRequest, state.settings, state.names, COMPLETED))
    async def chat_completions(request: Request) -> Response:
        state.open_face()
        body = read_body(ChatRequest, await body_of(request, state), state)
        plan = await plan_chat(request, body, state)
        return Answer(state, plan, ChatWriter(body, plan, state.settings), body.stream)

    return routes
