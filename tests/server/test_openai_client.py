"""OpenAI's own Python client against the server, and every answer against OpenAI's schemas."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import jsonschema
import openai
import pytest
from schemas import closed, valid
from served import CANARY, Served, events
from test_inputs import BAD_CHATS, BAD_COMPLETIONS, JSON

from ridgeline.server.errors import overloaded, starting

USER: list[Any] = [{"role": "user", "content": "def add(a, b):"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_the_schemas_do_refuse() -> None:
    for name in ("CreateChatCompletionResponse", "CreateCompletionResponse", "ErrorResponse", "ListModelsResponse"):
        with pytest.raises(jsonschema.ValidationError):
            valid({"choices": [{}]}, name)


def test_models(client: openai.OpenAI, server: Served) -> None:
    assert [one.id for one in client.models.list()] == ["ridgeline"]
    assert client.models.retrieve("ridgeline").owned_by == "ridgeline"
    valid(server.client.get("/v1/models").json(), "ListModelsResponse")
    valid(server.client.get("/v1/models/ridgeline").json(), "Model")


@pytest.mark.parametrize(
    "more",
    [
        {}, {"n": 2, "temperature": 1.0}, {"logprobs": 3}, {"echo": True, "logprobs": 0}, {"stop": [")", "\n"]},
        {"best_of": 2, "temperature": 1.0}, {"max_tokens": 0, "echo": True, "logprobs": 1}, {"prompt": [[1, 2], [3]]},
    ],
    ids=str,
)  # fmt: skip
def test_completions(client: openai.OpenAI, server: Served, more: dict[str, Any]) -> None:
    body = {**CANARY, "seed": 1, **more}
    answer = client.completions.create(**body)
    assert answer.usage is not None
    valid(server.post("/v1/completions", body).json(), "CreateCompletionResponse")
    if "best_of" in more:
        return
    texts = dict.fromkeys(range(len(answer.choices)), "")
    for one in events(server.post("/v1/completions", {**body, "stream": True}).text):
        valid(closed(one), "CreateCompletionResponse")
    for part in client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in answer.choices]
    assert part.usage == answer.usage.model_copy(update={"prompt_tokens_details": part.usage.prompt_tokens_details})


@pytest.mark.parametrize(
    "more",
    [
        {}, {"n": 3, "temperature": 1.0}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 4},
        {"max_completion_tokens": 5}, {"stop": "\n"}, {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}}, {"tools": [WEATHER, CLOCK]},
        {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 100},
        {"tools": [WEATHER], "tool_choice": "none"}, {"user": "a", "store": True, "metadata": {"k": "v"}},
    ],
    ids=str,
)  # fmt: skip
def test_chats(client: openai.OpenAI, server: Served, more: dict[str, Any]) -> None:
    body = {"model": "ridgeline", "messages": USER, "max_tokens": 20, "temperature": 0.0, "seed": 2, **more}
    answer = client.chat.completions.create(**body)
    valid(server.post("/v1/chat/completions", body).json(), "CreateChatCompletionResponse")
    raw = events(server.post("/v1/chat/completions", {**body, "stream": True}).text)
    for one in raw:
        valid(one, "CreateChatCompletionStreamResponse")
    texts = dict.fromkeys(range(len(answer.choices)), "")
    calls: dict[int, Any] = {}
    for part in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                calls[call.index] = (call.function.name, call.function.arguments)
    assert list(texts.values()) == [choice.message.content or "" for choice in answer.choices]
    whole = [(one.function.name, one.function.arguments) for one in answer.choices[0].message.tool_calls or ()]
    assert list(calls.values()) == whole
    assert part.usage.completion_tokens == answer.usage.completion_tokens


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 150},
                       "kind": {"enum": ["cat", "dog"]}},
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    }  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
    for seed in range(8):
        answer = client.chat.completions.create(
            model="ridgeline", messages=USER, response_format=form, max_tokens=200, temperature=1.0, seed=seed,
            n=2, frequency_penalty=0.5, logprobs=True, top_logprobs=2,
        )  # fmt: skip
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content or ""), schema)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_tool_is_called(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            model="ridgeline", messages=USER, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=200,
            temperature=1.0, seed=seed,
        )  # fmt: skip
        (one,) = answer.choices
        assert one.finish_reason == "tool_calls"
        (call,) = one.message.tool_calls or ()
        assert one.message.content is None
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        else:
            assert choice == "required"


def test_a_conversation_with_a_call_in_it(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "now?"}]},
    ]
    answer = client.chat.completions.create(model="ridgeline", messages=messages, tools=[WEATHER], max_tokens=4)
    assert answer.choices[0].message.role == "assistant"


@pytest.mark.parametrize(("path", "table"), [("completions", BAD_COMPLETIONS), ("chat/completions", BAD_CHATS)])
def test_every_refusal_is_openais(server: Served, path: str, table: list[Any]) -> None:
    for _, changes, *_ in table:
        if len(str(changes)) < 10_000:
            base = CANARY if path == "completions" else {"model": "ridgeline", "messages": USER}
            valid(server.post(f"/v1/{path}", {**base, **changes}).json(), "ErrorResponse")


def test_errors_become_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(**{**CANARY, "n": 0})
    assert bad.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(**{**CANARY, "model": "other"})
    assert missing.value.code == "model_not_found"


def test_the_client_tries_again_when_told_to(server: Served) -> None:
    """What stands between is busy at first: this server's 429 and 503 with Retry-After, then its answer."""
    refusals = [overloaded(0), starting(0)]
    asked: list[str] = []

    class Between(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            if refusals:
                error = refusals.pop(0)
                status, answer = error.status, error.encoded()
            else:
                status, answer = 200, server.client.post(self.path, content=body, headers=JSON).content
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    between = HTTPServer(("127.0.0.1", 0), Between)
    threading.Thread(target=between.serve_forever, daemon=True).start()
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{between.server_port}/v1", api_key="none") as patient:
            assert patient.completions.create(**CANARY).choices[0].text == server.canary()
        assert asked == ["/v1/completions"] * 3
    finally:
        between.shutdown()
