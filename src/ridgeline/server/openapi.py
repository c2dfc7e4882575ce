"""What /openapi.json says of an endpoint whose body is read by hand.

Knows request models. It must not know handlers.
"""

from __future__ import annotations

from typing import Any

from ridgeline.server.requests import Strict

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERROR_STATUSES = (400, 401, 404, 405, 408, 413, 415, 429, 431, 500, 503, 504)


def described(body: type[Strict] | None = None, answer: str = "object") -> dict[str, Any]:
    """Arguments of a route: its body, and its errors. answer: what a 200 is, in a word."""
    refusal = {"description": "refused", "content": {"application/json": {"schema": ERROR}}}
    extra: dict[str, Any] = {"responses": {str(status): refusal for status in ERROR_STATUSES}}
    if body is not None:
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schema = _inlined(schema, schema.pop("$defs", {}))
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    extra["responses"]["200"] = {"description": answer}
    return {"openapi_extra": extra, "response_model": None}


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references: ours are not deep."""
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(definitions[value["$ref"].rsplit("/", 1)[1]], definitions)
        return {key: _inlined(one, definitions) for key, one in value.items()}
    if isinstance(value, list):
        return [_inlined(one, definitions) for one in value]
    return value
