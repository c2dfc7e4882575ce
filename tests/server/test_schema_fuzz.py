"""schemathesis against the server, data that fit its published schema and data that do not: no 5xx, no answer that
its schema, or OpenAI's where OpenAI has one, does not describe.

Nothing is left out: every operation, every check, NUL and surrogates allowed. One check is told that a 400 is an
answer to data that fit the schema, since a schema cannot say that two fields exclude each other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemas import SCHEMAS, closed, valid
from schemathesis.config import SchemathesisConfig
from served import Served, events, served

OPENAI = {
    "/v1/models": "ListModelsResponse",
    "/v1/models/{name}": "Model",
    "/v1/completions": "CreateCompletionResponse",
    "/v1/chat/completions": "CreateChatCompletionResponse",
}
CONTEXT = 96
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 4095}, "minItems": 1, "maxItems": 30}
NARROW = {
    "prompt": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 30}, IDS]},
    "tokens": IDS,
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 20},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 20},
    "min_tokens": {"type": "null"},
    "stop_token_ids": {"type": "null"},
    "stream_options": {"type": "null"},
    "tool_choice": {"type": "null"},
    "top_logprobs": {"type": "null"},
    "best_of": {"type": "null"},
    "logit_bias": {"type": "null"},
    "response_format": {"anyOf": [{"type": "null"}, {"enum": [{"type": "json_object"}, {"type": "text"}]}]},
}
"""What of a field this model takes in any company."""
CALM = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A short context and few outputs, so that what is generated takes little time."""
    few = ("--set", "max_n=3", "--set", "max_best_of=3", "--set", "max_prompts=3")
    with served("--max-num-seqs", "8", "--max-model-len", str(CONTEXT), *few) as running:
        yield running


def published(server: Served, examples: int, **phases: Any) -> Any:
    """The server's own schema, with OpenAI's for OpenAI's answers."""
    raw = server.client.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions", "/detokenize"):  # half of what is made is of this model
        body = raw["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        for name, narrow in NARROW.items():
            if name in body:
                body[name] = {"anyOf": [narrow, body[name]]}
    raw["components"] = copy.deepcopy(SCHEMAS["components"])
    for path, name in OPENAI.items():
        (method,) = raw["paths"][path].values()
        method["responses"]["200"]["content"]["application/json"]["schema"] = {"$ref": f"#/components/schemas/{name}"}
        for status, answer in method["responses"].items():
            if status != "200":
                answer["content"]["application/json"]["schema"] = {"$ref": "#/components/schemas/ErrorResponse"}
    config = SchemathesisConfig.from_dict(
        {
            "base-url": server.url,
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404"]}},
            "generation": {"max-examples": examples, "mode": "all"},
            "phases": phases,
        }
    )
    return schemathesis.openapi.from_dict(raw, config=config)


@pytest.fixture(scope="module")
def brief(server: Served) -> Any:
    return published(server, 6, coverage={"enabled": False})


@pytest.fixture(scope="module")
def thorough(server: Served) -> Any:
    return published(server, 250)


BRIEF = schemathesis.pytest.from_fixture("brief")
THOROUGH = schemathesis.pytest.from_fixture("thorough")


def checked(case: Any, server: Served) -> None:
    """Every check of schemathesis; and of a stream, every event by itself."""
    answer = case.call()
    case.validate_response(answer)
    if answer.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        chat = case.path.endswith("chat/completions")
        for one in events(answer.text):
            if "error" in one:
                valid(one, "ErrorResponse")
            elif chat:
                valid(one, "CreateChatCompletionStreamResponse")
            else:
                valid(closed(one), "CreateCompletionResponse")
    assert "Traceback" not in answer.text


@BRIEF.parametrize()
@CALM
def test_every_answer_is_described(case: Any, server: Served) -> None:
    checked(case, server)


@pytest.mark.slow
@THOROUGH.parametrize()
@CALM
def test_every_answer_is_described_thoroughly(case: Any, server: Served) -> None:
    checked(case, server)


def test_afterwards_nothing_has_changed(sound: Served) -> None:
    """The two tests above are many; here is their check."""
