"""What /openapi.json says of endpoints whose bodies are read by hand: bodies within this server's limits, and answers.

Knows request models, settings and the form of answers. It must not know handlers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ridgeline.server.requests import DEFAULTS, CompletionRequest, Strict
from ridgeline.server.settings import ServerSettings

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
ERROR = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERROR_STATUSES = (400, 401, 404, 405, 408, 413, 415, 429, 431, 500, 503, 504)
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
NULL = {"type": "null"}
COMPLETED: Mapping[str, Mapping[str, Any]] = {JSON: ANY_OBJECT, EVENTS: {"type": "string"}}
"""A completion or a chat, whole or as a stream."""


def object_of(**properties: str | Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object with all of these, given as types or schemas."""
    found = {name: {"type": one} if isinstance(one, str) else dict(one) for name, one in properties.items()}
    return {"type": "object", "required": list(found), "properties": found}


def described(
    body: type[Strict] | None = None,
    settings: ServerSettings | None = None,
    names: tuple[str, ...] = (),
    answer: Mapping[str, Mapping[str, Any]] | None = None,
    place: str = "",
) -> dict[str, Any]:
    """Arguments of a route: its body within the settings' limits, its answers by media type, and its errors.

    place: name of a part of the path that its handler reads.
    """
    refusal = {"description": "refused", "content": {JSON: {"schema": ERROR}}}
    responses: dict[int | str, dict[str, Any]] = dict.fromkeys(ERROR_STATUSES, refusal)
    content = {media: {"schema": schema} for media, schema in (answer or {JSON: ANY_OBJECT}).items()}
    extra: dict[str, Any] = {"responses": {"200": {"description": "answered", "content": content}}}
    if place:
        extra["parameters"] = [{"name": place, "in": "path", "required": True, "schema": {"type": "string"}}]
    if body is not None:
        assert settings is not None
        schema = body_schema(body, settings, names)
        extra["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return {"openapi_extra": extra, "responses": responses, "response_model": None}


def body_schema(body: type[Strict], settings: ServerSettings, names: tuple[str, ...]) -> dict[str, Any]:
    """The body as `requests.read` takes it. A field that may be left out may be null; so may any unknown one."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schema = _inlined(schema, schema.pop("$defs", {}))
    properties, required = schema["properties"], schema.get("required", [])
    for name, bounds in _bounds(body, settings, names).items():
        if name in properties:
            properties[name] = bounds
    for name in properties:
        if name not in required:
            properties[name] = {"anyOf": [properties[name], NULL]}
    for name, value in DEFAULTS.items():
        properties.setdefault(name, {"enum": [value, None] if value is not None else [None]})
    return {**schema, "additionalProperties": NULL}


def _integer(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def _bounds(body: type[Strict], settings: ServerSettings, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Fields whose bounds are settings, or are told less exactly by pydantic."""
    text = {"type": "string", "minLength": 1, "maxLength": settings.max_stop_characters}
    ids: dict[str, Any] = {"type": "array", "items": _integer(0, (1 << 31) - 1)}
    prompts = [{"type": "string", "minLength": 1}, {**ids, "minItems": 1}]
    several = [{"type": "array", "items": one, "minItems": 1, "maxItems": settings.max_prompts} for one in prompts]
    int64 = _integer(-(1 << 63), (1 << 63) - 1)
    switch = {"type": ["string", "boolean", "number"]}
    return {
        "model": {"enum": list(names)},
        "n": _integer(1, settings.max_n),
        **({"prompt": {"anyOf": [*prompts, *several]}} if body is CompletionRequest else {}),
        **({"logprobs": _integer(0, settings.max_logprobs)} if body is CompletionRequest else {}),
        "best_of": _integer(1, settings.max_best_of),
        "seed": int64,
        "priority": int64 if settings.engine.get("scheduling_policy") == "priority" else {"const": 0},
        "stop": {"anyOf": [text, {"type": "array", "items": text, "maxItems": settings.max_stop}]},
        "stop_token_ids": {**ids, "maxItems": settings.max_stop_token_ids},
        "bad_words": {"type": "array", "items": text, "maxItems": settings.max_bad_words},
        "logit_bias": {
            "type": "object",
            "maxProperties": settings.max_logit_bias,
            "patternProperties": {"^[0-9]{1,10}$": {"type": "number", "minimum": -100, "maximum": 100}},
            "additionalProperties": False,
        },
        "top_logprobs": _integer(0, settings.max_top_logprobs),
        "chat_template_kwargs": {
            "type": "object",
            "patternProperties": {"^[a-z][a-z_]{0,63}$": switch},
            "additionalProperties": False,
        },
    }


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references: ours are not deep."""
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(definitions[value["$ref"].rsplit("/", 1)[1]], definitions)
        return {key: _inlined(one, definitions) for key, one in value.items()}
    if isinstance(value, list):
        return [_inlined(one, definitions) for one in value]
    return value
