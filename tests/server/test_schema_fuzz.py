"""schemathesis against the server, data that fit its published schema and data that do not: no 5xx, no answer that
its schema, or OpenAI's where OpenAI has one, does not describe.

Nothing is left out: every operation, every check, NUL and surrogates allowed. One check is told that a 400 is an
answer to data that fit the schema, since a schema cannot say that two fields exclude each other.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemas import SCHEMAS, closed, valid
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from served import Served, events, served

OPENAI = {
    "/v1/models": "ListModelsResponse",
    "/v1/models/{name}": "Model",
    "/v1/completions": "CreateCompletionResponse",
    "/v1/chat/completions": "CreateChatCompletionResponse",
}
CONTEXT = 96
EXPECTED = ["2xx", "400", "404"]
"""Of data that fit the schema: a schema cannot say that two fields exclude each other."""
OPERATIONS = (
    "POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "POST /detokenize", "GET /v1/models",
    "GET /v1/models/{name}", "GET /health", "GET /ready", "GET /metrics", "GET /version", "GET /server_info",
)  # fmt: skip
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


def described(server: Served) -> dict[str, Any]:
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
    return raw


def published(server: Served) -> Any:
    """The schema as schemathesis reads it."""
    config = {"base-url": server.url, "checks": {"positive_data_acceptance": {"expected-statuses": EXPECTED}}}
    return schemathesis.openapi.from_dict(described(server), config=SchemathesisConfig.from_dict(config))


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


def test_no_operation_is_left_out(server: Served) -> None:
    raw = server.client.get("/openapi.json").json()
    assert {f"{method.upper()} {path}" for path, found in raw["paths"].items() for method in found} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, mode) for label in OPERATIONS for mode in GenerationMode if mode.is_positive or label.startswith("POST")],
)
def test_every_answer_is_described(server: Served, label: str, mode: GenerationMode) -> None:
    """Data that do not fit are for those who take some: any text may stand in a path."""
    method, path = label.split()
    operation = published(server)[path][method]

    @settings(CALM, max_examples=6)
    @given(operation.as_strategy(generation_mode=mode))
    def whatever_comes(case: Any) -> None:
        checked(case, server)

    whatever_comes()


@pytest.mark.slow
def test_schemathesis_itself_finds_nothing(server: Served, tmp_path: Path) -> None:
    """Its command, with all its phases: examples, coverage of every constraint, fuzzing, links."""
    schema, config = tmp_path / "openapi.json", tmp_path / "schemathesis.toml"
    schema.write_text(json.dumps(described(server)), encoding="utf-8")
    config.write_text("[checks.positive_data_acceptance]\nexpected-statuses = " + json.dumps(EXPECTED) + "\n")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    options = ["--mode", "all", "--max-examples", "150", "--seed", "1", "--continue-on-failure"]
    done = subprocess.run(
        [*command, "--config-file", str(config), "--no-color", "run", str(schema), "--url", server.url, *options],
        capture_output=True, text=True, timeout=1200, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "Traceback" not in "".join(server.log)


def test_afterwards_nothing_has_changed(sound: Served) -> None:
    """The tests above are many; here is their check."""
