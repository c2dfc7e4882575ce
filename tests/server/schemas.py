"""OpenAI's schemas (data/README.md), and whether something is as they say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema


def with_nulls(value: Any) -> Any:
    """OpenAPI's older `nullable` as JSON Schema has it."""
    if isinstance(value, list):
        return [with_nulls(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: with_nulls(one) for key, one in value.items()}
    return {"anyOf": [found, {"type": "null"}]} if found.pop("nullable", False) is True else found


FILE = Path(__file__).parent / "data" / "openai_schema_subset.json"
SCHEMAS = with_nulls(json.loads(FILE.read_text(encoding="utf-8")))


def valid(value: Any, name: str) -> None:
    """`value` is what OpenAI's schema of that name describes."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": SCHEMAS["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def closed(event: dict[str, Any]) -> dict[str, Any]:
    """An event of a streamed completion, its open choices ended: OpenAI sends null there, which its schema forbids."""
    found = copy.deepcopy(event)
    for choice in found["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    if found.get("usage", 0) is None:
        del found["usage"]
    return found
