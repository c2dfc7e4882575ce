"""Stop strings against their definition by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.core.errors import InvalidArgument
from ridgeline.text.stop import StopStrings, TextDelta, TextStream
from ridgeline.text.tokenizer import Tokenizer


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop) by definition: the shortest beginning of `text` that ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


letters = st.text(alphabet="ab", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text(alphabet="ab", max_size=4), max_size=10), stop_lists, st.booleans())
def test_equals_the_definition(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopStrings(stops, include)
    text, shown = "", ""
    for piece in pieces:
        text += piece
        now, stop = matcher.push(piece)
        shown += now
        expected = first_stop(text, stops)
        if expected is not None:
            end, longest = expected
            assert stop == longest
            assert shown == (text[:end] if include else text[: end - len(longest)])
            return
        assert stop is None
        # Exactly what could still become part of a stop string is held back.
        undecided = max(
            (n for s in stops for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])),
            default=0,
        )
        assert shown == text[: len(text) - undecided]
    assert shown + matcher.flush() == text
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], "ab", [1]])
def test_bad_stop_strings(stops: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="stop"):
        StopStrings(stops)


def test_unstopped_text_may_be_completed_later() -> None:
    matcher = StopStrings(["abc", "b"])
    assert matcher.push("ab", may_stop=False) == ("", None)
    assert matcher.push("x") == ("abx", None)  # the b has been let pass
    assert matcher.push("ab", may_stop=False) == ("", None)
    assert matcher.push("cd") == ("", "abc")


def by_letter(tokenizer: Tokenizer, text: str) -> list[int]:
    return [token_id for letter in text for token_id in tokenizer.encode(letter, add_special_tokens=False)]


@settings(max_examples=150, deadline=None)
@given(letters, stop_lists, st.booleans(), st.integers(0, 12), st.integers(1, 6))
def test_stream_counts_tokens(
    byte_level: Tokenizer, text: str, stops: list[str], include: bool, min_tokens: int, size: int
) -> None:
    ids = by_letter(byte_level, text)
    assert len(ids) == len(text)
    # One token a letter, so a match that ends at character n is completed by token n.
    expected = next(
        (
            (end, max(ending, key=len))
            for end in range(min_tokens + 1, len(text) + 1)
            if (ending := [stop for stop in stops if text[:end].endswith(stop)])
        ),
        None,
    )
    stream = TextStream(byte_level, [], stops, include, True, min_tokens)
    shown = ""
    for start in range(0, len(ids), size):
        shown += stream.push(ids[start : start + size]).text
    last = stream.finish()
    shown += last.text
    assert stream.text == shown
    if expected is None:
        assert (shown, last.stopped_at, last.stop) == (text, None, None)
        return
    end, stop = expected
    assert (last.stopped_at, last.stop) == (end, stop)
    if min_tokens == 0:
        assert shown == text[: end if include else end - len(stop)]
    else:  # what was shown while stopping was off stays shown
        assert text.startswith(shown)
        assert end - len(stop) <= len(shown) <= end


def test_stop_inside_of_a_token_and_over_borders(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("The quick brown fox", add_special_tokens=False)
    assert len(ids) < len("The quick brown fox")
    stream = TextStream(byte_level, byte_level.encode("say: "), ["ck br"], min_tokens=0)
    delta = stream.push(ids)
    assert delta.text == "The qui"
    assert delta.stop == "ck br"
    assert delta.stopped_at is not None
    told = byte_level.decode(ids[: delta.stopped_at])
    assert "ck br" in told
    assert "ck br" not in byte_level.decode(ids[: delta.stopped_at - 1])
    assert stream.push(ids) == stream.finish() == TextDelta("", delta.stopped_at, "ck br")
    assert stream.text == "The qui"


def test_include_stop_cuts_behind_it(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, [], ["lo w"], include_stop=True)
    assert stream.push(byte_level.encode("Hello world", add_special_tokens=False)).text == "Hello w"


def test_without_stop_strings_everything_is_shown(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("Hello 🙂", add_special_tokens=False)
    stream = TextStream(byte_level, [], skip_special_tokens=True)
    shown = [stream.push([token_id]) for token_id in ids]
    assert "".join(delta.text for delta in shown) + stream.finish().text == "Hello 🙂"
    assert all(delta.stopped_at is None for delta in shown)


def test_a_stop_string_completed_by_the_last_broken_character(llama_like: Tokenizer) -> None:
    stream = TextStream(llama_like, [], ["\ufffd"])
    broken = llama_like.token_id("<0xE2>")
    assert broken is not None
    assert stream.push([broken]) == TextDelta("")
    assert stream.finish() == TextDelta("", 1, "\ufffd")
