"""Messages of a chat as OpenAI writes them, read strictly and handed on as chat templates want them.

Knows roles and content parts. It must not know templates. Nothing is ever fetched: a part that is not text is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ridgeline.server.errors import ApiError, invalid, short
from ridgeline.server.settings import ServerSettings

ROLES = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Roles, and what templates call them."""
_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "refusal", "reasoning", "reasoning_content"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
_UNSUPPORTED = ("image_url", "input_audio", "file", "video_url", "audio_url", "input_image", "input_file")
_PARTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": {"type": "null"},
    },
}
_SAID: dict[str, Any] = {"anyOf": [{"type": "string"}, _PARTS]}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        },
    },
    "required": ["id", "type", "function"],
    "additionalProperties": False,
}


def _spoken(roles: Sequence[str], required: Sequence[str], **more: Any) -> dict[str, Any]:
    """The schema of a message of these roles."""
    properties = {"role": {"enum": list(roles)}, "content": _SAID, "name": {"type": ["string", "null"]}, **more}
    return {
        "type": "object",
        "properties": properties,
        "required": ["role", *required],
        "additionalProperties": {"type": "null"},
    }


MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _spoken(("developer", "system", "user"), ["content"]),
            _spoken(("assistant",), ["content"], refusal={"type": ["string", "null"]}),
            _spoken(("assistant",), ["tool_calls"], tool_calls={"type": "array", "minItems": 1, "items": _CALL},
                    content={"anyOf": [_SAID, {"type": "null"}]}),
            _spoken(("tool",), ["content", "tool_call_id"], tool_call_id={"type": "string"}),
        ]
    },
}  # fmt: skip
"""What `read_messages` takes, for /openapi.json."""
SWITCHES_TAKEN = frozenset(
    (
        "tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length", "add_generation_prompt",
        "continue_final_message", "messages", "conversation", "tools", "documents", "chat_template",
        "tokenizer_kwargs", "self",
    )
)  # fmt: skip
"""Names that mean something to templates' callers: no switch of a template is called so."""


def read_messages(messages: Sequence[Any], settings: ServerSettings) -> list[dict[str, Any]]:
    """Messages with content as one text and arguments of calls as objects. ApiError 400, param messages."""
    if not 1 <= len(messages) <= settings.max_messages:
        raise _bad(f"1 to {settings.max_messages} of them, got {len(messages)}")
    return [_message(number, message) for number, message in enumerate(messages)]


def _bad(what: str, code: str | None = None) -> ApiError:
    return invalid("messages", f"messages: {what}", code)


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad(f"{number} must be an object")
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _bad(f"{number} has role {short(role)}; known are {', '.join(ROLES)}")
    kind = ROLES[role]
    for name in given:
        if name not in _KEYS[kind]:
            raise _bad(f"{number} has {short(name)}, which a message of role {role} cannot have")
    result: dict[str, Any] = {"role": kind}
    if "content" in given:
        result["content"] = _content(number, given["content"])
    elif isinstance(given.get("refusal"), str):
        result["content"] = given["refusal"]
    elif not (kind == "assistant" and given.get("tool_calls")):
        raise _bad(f"{number} needs content")
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content", "refusal"):
        if name in given:
            if not isinstance(given[name], str):
                raise _bad(f"{number} has a {name} that is not a string")
            if name != "refusal":
                result[name] = given[name]
    if role == "tool" and "tool_call_id" not in given:
        raise _bad(f"{number} needs tool_call_id")
    if "tool_calls" in given:
        result["tool_calls"] = _calls(number, given["tool_calls"])
        result.setdefault("content", "")
    return result


def _content(number: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _bad(f"{number} needs content that is a string or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _UNSUPPORTED:
            raise _bad(f"{number} has a part of type {kind}; only text is read here", "unsupported_content")
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise _bad(f"{number} has a part that is not text", "unsupported_content")
        unknown = [name for name, value in part.items() if name not in ("type", kind) and value is not None]
        if unknown:
            raise _bad(f"{number} has a part with {short(unknown[0])}")
        texts.append(part[kind])
    return "\n".join(texts)


def _calls(number: int, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not calls:
        raise _bad(f"{number} has tool_calls that are not a list of at least one")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or call.get("type", "function") != "function"
            or not isinstance(call.get("id"), str)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments"), str)
        ):
            raise _bad(f"{number} has a tool call without id, or name and arguments as strings")
        try:
            arguments: Any = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = function["arguments"]
        result.append(
            {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return result


def read_switches(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A template's own switches: plain values under names that mean nothing to us. ApiError 400."""
    for name, value in (given or {}).items():
        if not name.isidentifier() or name in SWITCHES_TAKEN or name.startswith("_"):
            raise invalid("chat_template_kwargs", f"chat_template_kwargs: {short(name)!r} is not the request's to set")
        if not isinstance(value, (str, bool, int, float)):
            raise invalid("chat_template_kwargs", f"chat_template_kwargs: {short(name)} must be a plain value")
    return dict(given or {})
