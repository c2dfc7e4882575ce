"""From the bytes of a request to jobs with a place reserved: read, checked, admitted, tokenized, in this order.

Knows bodies, admission and text intake. It must not know responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.request import SamplingParams
from ridgeline.server import tools
from ridgeline.server.admission import Ticket
from ridgeline.server.edge import check_media_type, declared_length, salt_of, too_large
from ridgeline.server.errors import ApiError, invalid, refused
from ridgeline.server.jobs import Job
from ridgeline.server.messages import read_messages, read_switches
from ridgeline.server.requests import Body, ChatRequest, CompletionRequest, Sampled, check_limits, check_sizes, read
from ridgeline.server.state import INLINE_CHARACTERS, Face, State
from ridgeline.server.strict_json import parse

COLDEST = 1e-5
"""Temperatures below it are greedy: dividing by them leaves one token anyway."""
CHARACTERS_A_TOKEN = 4
LARGE_BODY = 256 * 1024

Result = TypeVar("Result")


@dataclass
class Plan:
    """Jobs with their place. shown: how many of each job's outputs the client wants."""

    jobs: list[Job]
    ticket: Ticket
    face: Face
    shown: int
    news: asyncio.Event


async def body_of(request: HttpRequest, state: State) -> dict[str, Any]:
    """The request's JSON object, read within its limits. ApiError 400, 408, 413, 415."""
    settings, scope = state.settings, request.scope
    check_media_type(scope)
    declared_length(scope, settings.max_body_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body_bytes:
                    raise too_large(settings.max_body_bytes)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, "the body came too slowly", None, "body_timeout") from None
    raw = b"".join(parts)
    depth, values = settings.max_json_depth, settings.max_json_values
    if len(raw) < LARGE_BODY:
        return parse(raw, depth, values)
    return await aside(state, lambda: parse(raw, depth, values))


async def aside(state: State, work: Callable[[], Result]) -> Result:
    """Work that would hold up the event loop, in a thread."""
    return await asyncio.get_running_loop().run_in_executor(state.threads, work)


def read_body(kind: type[Body], values: dict[str, Any], state: State) -> Body:
    """A body as its model, within every limit that is a setting."""
    check_sizes(values, state.settings, None if state.face is None else state.face.facts.max_model_len)
    body = read(kind, values)
    if isinstance(body, Sampled):
        check_limits(body, state.settings)
        if body.priority and state.settings.engine.get("scheduling_policy", "fcfs") != "priority":
            raise invalid("priority", "priority needs a server with --scheduling-policy priority")
    return body


def sampling_of(body: CompletionRequest | ChatRequest, face: Face) -> SamplingParams:
    """A body's parameters over the checkpoint's defaults. ApiError 400."""
    defaults = face.defaults
    values: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        given = getattr(body, name)
        values[name] = getattr(defaults, name) if given is None else given
    if values["temperature"] < COLDEST or values["top_p"] == 0:
        values.update(temperature=0.0, top_p=1.0)
    for name in (
        "n", "presence_penalty", "frequency_penalty", "stop", "stop_token_ids", "bad_words", "ignore_eos",
        "min_tokens", "include_stop_str_in_output", "skip_special_tokens",
    ):  # fmt: skip
        values[name] = getattr(body, name)
    values["logit_bias"] = {int(token): amount for token, amount in (body.logit_bias or {}).items()}
    values["seed"] = body.seed if body.seed is not None else face.random.getrandbits(62)
    if isinstance(body, CompletionRequest):
        values["max_tokens"] = body.max_tokens or (None if body.max_tokens is None else 1)
        values["n"] = max(body.n, body.best_of or 0)
        values["logprobs"] = body.logprobs
        if body.best_of is not None and body.best_of > body.n and body.logprobs is None:
            values["logprobs"] = 0  # to know which are best
        if body.echo and body.logprobs is not None:
            values["prompt_logprobs"] = body.logprobs
    else:
        most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        values["max_tokens"] = most
        values["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    try:
        return SamplingParams(**values)
    except InvalidArgument as error:
        raise refused(error) from None


async def plan_completion(request: HttpRequest, body: CompletionRequest, state: State) -> Plan:
    """Jobs of /v1/completions: one a prompt."""
    face = state.open_face(body.model)
    prompts = _prompts(body)
    params = sampling_of(body, face)
    for prompt in prompts:
        if isinstance(prompt, str):
            face.check_length(prompt, "prompt")
    characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    tokens = characters // CHARACTERS_A_TOKEN + sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))
    ticket = state.admission.reserve(len(prompts) * params.n, tokens)
    salt = salt_of(request.scope, state.settings, body.cache_salt)

    def made() -> list[Any]:
        return [face.intake.requests("", prompt, params, body.priority, salt) for prompt in prompts]

    return await _planned(state, face, ticket, body, made, characters, "", "", shown=body.n)


async def plan_chat(request: HttpRequest, body: ChatRequest, state: State) -> Plan:
    """The one job of /v1/chat/completions."""
    face = state.open_face(body.model)
    messages = read_messages(body.messages, state.settings)
    switches = read_switches(body.chat_template_kwargs)
    params = sampling_of(body, face)
    characters = characters_of(messages) + sum(len(str(tool)) for tool in tools.described(body) or ())
    face.check_length_of(characters, "messages")
    grammar, param = tools.grammar_of(body)
    ticket = state.admission.reserve(params.n, characters // CHARACTERS_A_TOKEN)
    salt = salt_of(request.scope, state.settings, body.cache_salt)

    def made() -> list[Any]:
        text, ids = face.conversations.ids(messages, body.add_generation_prompt, tools.described(body), switches)
        prompt = {"prompt": text, "prompt_token_ids": ids}
        try:
            return [face.intake.requests("", prompt, params, body.priority, salt)]
        except InvalidArgument as error:
            if error.parameter == "prompt":
                error.parameter = "messages"
            raise

    return await _planned(state, face, ticket, body, made, characters, grammar, param, shown=body.n)


def characters_of(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(message.get("content") or "") for message in messages)


def _prompts(body: CompletionRequest) -> list[Any]:
    prompt = body.prompt
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif isinstance(prompt[0], int):
        prompts = [prompt]
    else:
        prompts = list(prompt)
    if not all(prompts):
        raise invalid("prompt", "prompt: is empty; at least one token is needed")
    return prompts


async def _planned(
    state: State,
    face: Face,
    ticket: Ticket,
    body: CompletionRequest | ChatRequest,
    made: Callable[[], list[Any]],
    characters: int,
    grammar: str,
    param: str,
    shown: int,
) -> Plan:
    """Tokenize, and check the grammar; the place is given back if either refuses."""
    arrival_s = time.perf_counter()
    try:
        found = made() if characters <= INLINE_CHARACTERS else await aside(state, made)
        if grammar:
            await face.grammars.check(grammar, param)
    except InvalidArgument as error:
        ticket.release()
        raise refused(error) from None
    except BaseException:
        ticket.release()
        raise
    news = asyncio.Event()
    jobs = []
    for text, requests in found:
        job = Job.of(text, requests, face.tokenizer, grammar, arrival_s, body.stream)
        job.changed = news
        job.on_first_token = partial(ticket.computed, len(requests[0].tokens))
        jobs.append(job)
    ticket.counted(sum(len(requests[0].tokens) for _, requests in found))
    return Plan(jobs, ticket, face, shown, news)
