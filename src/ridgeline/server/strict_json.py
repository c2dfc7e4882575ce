"""JSON from strangers: parsed once, and refused for whatever two parsers could read in two ways.

Knows bytes and JSON. It must not know fields. Depth and size are bounded before anything is parsed.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from ridgeline.server.errors import ApiError, invalid, short

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)
_MAY_BE_SURROGATE = re.compile(rb"\\u[dD]")
MOST_DIGITS = 400
_HARD_NUMBER = re.compile(rb"[0-9]{200}|[eE][+]?[0-9]{3}")
PIECE = 1 << 19
MANY = 10_000


def parse(raw: bytes, max_depth: int, max_values: int) -> dict[str, Any]:
    """The JSON object in `raw`.

    ApiError 400: invalid_json for what is not UTF-8, not JSON (NaN and Infinity included), no object, has a key
    twice, half a surrogate pair, or a number beyond any that fields take; json_too_deep; json_too_large.
    """
    _bound(raw, max_depth, max_values)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid("is not UTF-8") from None
    hooks: dict[str, Any] = {}
    if raw.count(b",") < MANY or raw.count(b":") > MANY or _may_overflow(raw):
        hooks = {"parse_float": _float, "parse_int": _integer}  # with many keys also for the sake of others: they yield
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, **hooks)
    except RecursionError:
        raise invalid(None, "the body is nested too deeply", "json_too_deep") from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise _invalid(f"is not valid JSON{where}") from None
    if not isinstance(value, dict):
        raise _invalid("must be a JSON object")
    if _MAY_BE_SURROGATE.search(raw):
        _check_text(value)
    return value


def _invalid(what: str, param: str | None = None) -> ApiError:
    return invalid(param, f"the body {what}", "invalid_json")


def _bound(raw: bytes, max_depth: int, max_values: int) -> None:
    """Depth and number of values, from the structure alone; in time linear in the body."""
    openings = raw.count(b"[") + raw.count(b"{")
    if openings <= max_depth and raw.count(b",") <= max_values:
        return
    depth = values = 0
    for found in _TOKENS.finditer(raw):
        first = raw[found.start()]
        if first in b"[{":
            depth += 1
            values += 1
            if depth > max_depth:
                raise invalid(None, f"the body is nested deeper than {max_depth}", "json_too_deep")
        elif first in b"]}":
            depth -= 1
        elif first == 0x2C:
            values += 1
            if values > max_values:
                raise invalid(None, f"the body has more than {max_values} values", "json_too_large")


def _may_overflow(raw: bytes) -> bool:
    """Whether there may be a number of many digits or a great exponent; else none of very many is looked at by itself.

    In pieces: a search is one call that nothing else can interrupt.
    """
    return any(_HARD_NUMBER.search(raw, at, at + PIECE + MOST_DIGITS) for at in range(0, len(raw), PIECE))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _invalid(f"has the key {short(key)!r} twice", short(key) if key.isidentifier() else None)
            seen.add(key)
    return found


def _constant(name: str) -> NoReturn:
    raise _invalid(f"holds {name}, which is not JSON")


def _float(digits: str) -> float:
    if len(digits) > MOST_DIGITS:
        raise _invalid("holds a number of too many digits")
    value = float(digits)
    if not math.isfinite(value):
        raise _invalid("holds a number that is too large")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _invalid("holds a number of too many digits")
    return int(digits)


def _check_text(value: Any) -> None:
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, str):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError:
                raise _invalid("holds half of a surrogate pair, which is not Unicode text") from None
        elif isinstance(one, dict):
            stack.extend(one)
            stack.extend(one.values())
        elif isinstance(one, list):
            stack.extend(one)
