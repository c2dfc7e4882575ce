"""Finding calls in text, however it is cut, in time linear in the text; and what strict JSON lets through."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.server.errors import ApiError
from ridgeline.server.strict_json import parse
from ridgeline.server.tools import CallReader

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def read(text: str, cuts: list[int], most: int = 1 << 17, several: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(["f", "g"], False, most, several)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    shown = ""
    for begin, end in pairwise(places):
        shown += reader.push(text[begin:end])[0]
    shown += reader.finish()[0]
    return shown, [(call.name, json.loads(call.arguments)) for call in reader.calls]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=12))
def test_cuts_change_nothing(cuts: list[int]) -> None:
    text = f"before {CALL} between {CALL}<tool_cal"
    assert read(text, cuts) == ("before  between <tool_cal", [("f", {"x": 1})] * 2)


@pytest.mark.parametrize(
    "text",
    [
        "plain", "<tool_call>", "<tool_call>{bad</tool_call>", '<tool_call>{"name": "other"}</tool_call>',
        "<tool_call>[]</tool_call>", '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(text: str) -> None:
    shown, calls = read(text, [])
    assert not calls
    assert shown == text.removesuffix("</tool_call>")


def test_one_call_where_several_are_not_wanted() -> None:
    assert read(CALL * 3, [], several=False) == ("", [("f", {"x": 1})])


def test_text_that_nearly_is_a_call_costs_its_length() -> None:
    began = time.process_time()
    reader = CallReader(["f"], False, 1 << 17)
    shown = 0
    for _ in range(10_000):
        shown += len(reader.push("<tool_call" * 10 + '<tool_call>{"a":' + "[" * 900)[0])
    shown += len(reader.finish()[0])
    assert time.process_time() - began < 3
    assert not reader.calls
    assert shown > 9_000_000


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=5), st.booleans())
def test_json_that_is_json_is_read(value: dict[str, Any], ascii_only: bool) -> None:
    try:
        raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    assert parse(raw, 64, 1000) == json.loads(raw)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE+-\\untrfals ', max_size=60).map(str.encode))
def test_whatever_comes_is_an_object_or_a_refusal(raw: bytes) -> None:
    try:
        found: object = parse(raw, 8, 20)
    except ApiError as error:
        found = {"status": error.status}
        assert found == {"status": 400}
    assert isinstance(found, dict)


@pytest.mark.parametrize("number", ["1e400", "-1e+0999", "9" * 401, "9" * 299 + "e99"], ids=lambda number: number[-5:])
@pytest.mark.parametrize("before", [0, 20_000])
def test_numbers_beyond_any_are_found_among_many(number: str, before: int) -> None:
    text = "[" + "12," * before + number + "]"
    with pytest.raises(ApiError) as refused:
        parse(b'{"a":' + text.encode() + b"}", 64, 1 << 20)
    assert refused.value.code == "invalid_json"
    text = text.replace(number, "1.5e99")
    assert parse(b'{"a":' + text.encode() + b"}", 64, 1 << 20)["a"][-1] == 1.5e99
