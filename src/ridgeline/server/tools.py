"""Tool calls: what a model is held to when one is forced, and how one is found in its text.

Knows JSON and the form that Hermes, Qwen and many others write, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
It must not know engines. Reading is linear in the text, and text of a call beyond a limit is shown as text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ridgeline.server.requests import ChatRequest, NamedTool

ANY_OBJECT = '{"type":"object"}'
OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """A call as OpenAI shows it; arguments: JSON text."""

    id: str
    name: str
    arguments: str

    def shown(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def described(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools as a chat template wants them; None if it should not hear of any."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [{"type": "function", "function": tool.function.model_dump(exclude_none=True)} for tool in body.tools]


def is_forced(body: ChatRequest) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def grammar_of(body: ChatRequest) -> tuple[str, str]:
    """The schema that the output must fulfil ("" for none), and the parameter that asks for it."""
    if is_forced(body):
        functions = [tool.function for tool in body.tools or ()]
        if isinstance(body.tool_choice, NamedTool):
            functions = [one for one in functions if one.name == body.tool_choice.function.name]
        return schema_of_calls([one.model_dump(exclude_none=True) for one in functions]), "tools"
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return "", ""
    if wanted.json_schema is None:
        return ANY_OBJECT, "response_format"
    return json.dumps(wanted.json_schema.schema_), "response_format"


def schema_of_calls(functions: Sequence[Mapping[str, Any]]) -> str:
    """The schema of one call of one of these functions: {"name": …, "arguments": {…}}, in this order."""
    choices = []
    definitions: dict[str, Any] = {}
    for function in functions:
        parameters = dict(function.get("parameters") or {"type": "object", "properties": {}})
        for kind in ("$defs", "definitions"):
            definitions.setdefault(kind, {}).update(parameters.pop(kind, None) or {})
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    kept = {kind: found for kind, found in definitions.items() if found}
    return json.dumps({**(choices[0] if len(choices) == 1 else {"anyOf": choices}), **kept})


class CallReader:
    """The calls in a text that arrives in pieces.

    forced: the whole text is one call. names: of the functions there are; a call of another is text.
    """

    def __init__(self, names: Sequence[str], forced: bool, most_bytes: int, several: bool = True) -> None:
        self._names = frozenset(names)
        self._forced = forced
        self._most = most_bytes
        self._several = several
        self._held: list[str] = []
        self._size = 0
        self._inside = forced
        self._tail = ""
        self.calls: list[Call] = []

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Text to show, and calls that it completes. Nothing of a call is shown before it is whole."""
        if self._forced:
            self._held.append(text)
            return "", []
        shown: list[str] = []
        found: list[Call] = []
        text = self._tail + text
        self._tail = ""
        while text:
            mark = CLOSE if self._inside else OPEN
            before, there, text = text.partition(mark)
            if not there:
                keep = _beginning(before, mark)
                body, self._tail = before[: len(before) - keep], before[len(before) - keep :]
                self._put(body, shown)
                break
            self._put(before, shown)
            if self._inside:
                self._close(shown, found)
            else:
                self._inside = True
        return "".join(shown), found

    def finish(self) -> tuple[str, list[Call]]:
        """The end of the text: what was held back."""
        shown: list[str] = []
        found: list[Call] = []
        if self._forced:
            whole = "".join(self._held)
            call = self._read(whole)
            if call is None:
                return whole, []
            self.calls.append(call)
            return "", [call]
        if self._inside:
            self._held.append(self._tail)
            self._close(shown, found)
        else:
            shown.append(self._tail)
        self._tail = ""
        return "".join(shown), found

    def _put(self, text: str, shown: list[str]) -> None:
        if not self._inside:
            shown.append(text)
            return
        self._held.append(text)
        self._size += len(text)
        if self._size > self._most:  # no call is as long as that
            shown.append(OPEN + "".join(self._held))
            self._held.clear()
            self._size, self._inside = 0, False

    def _close(self, shown: list[str], found: list[Call]) -> None:
        body = "".join(self._held)
        self._held.clear()
        self._size, self._inside = 0, False
        call = self._read(body)
        if call is None:
            shown.append(OPEN + body)
        elif self._several or not self.calls:
            self.calls.append(call)
            found.append(call)

    def _read(self, body: str) -> Call | None:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        return Call(f"call_{uuid.uuid4().hex[:24]}", value["name"], json.dumps(arguments, ensure_ascii=False))


def _beginning(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` begins with."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
