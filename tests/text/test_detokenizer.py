"""Streamed text is the decoded text, however the ids are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.text.detokenizer import StreamDetokenizer
from ridgeline.text.tokenizer import Tokenizer

KINDS = ["byte_level", "llama_like", "metaspace", "mistral"]


def streamed(tokenizer: Tokenizer, prompt: list[int], chunks: list[list[int]], skip: bool) -> str:
    stream = StreamDetokenizer(tokenizer, prompt, skip)
    pieces = [stream.push(chunk) for chunk in chunks]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return stream.text


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in chunks of `sizes`, repeated as needed."""
    chunks, turn = [], 0
    while ids:
        size = max(1, sizes[turn % len(sizes)])
        chunks.append(ids[:size])
        ids, turn = ids[size:], turn + 1
    return chunks


def check_stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], sizes: list[int], skip: bool) -> None:
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip)
    if not whole.startswith(before):
        # The output completes a character of which the prompt has the first bytes.
        before = before.removesuffix("\ufffd")
        assert whole.startswith(before)
    assert streamed(tokenizer, prompt, cut(output, sizes), skip) == whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    # Most ids from where special and byte tokens are, the rest from everywhere.
    one_id = st.one_of(st.integers(0, 262), st.integers(0, tokenizer.vocab_size + 1))
    ids = st.lists(one_id, max_size=24)

    @settings(max_examples=200, deadline=None)
    @given(ids, ids, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans())
    def check(prompt: list[int], output: list[int], sizes: list[int], skip: bool) -> None:
        check_stream(tokenizer, prompt, output, sizes, skip)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_cut_anywhere(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)

    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=40), st.integers(0, 60))
    def check(text: str, border: int) -> None:
        ids = tokenizer.encode(text, allow_special_in_text=False)
        check_stream(tokenizer, ids[:border], ids[border:], [1], True)
        if kind != "metaspace":  # which knows few characters
            stream = StreamDetokenizer(tokenizer, ids[:border])
            for token_id in ids[border:]:
                # A text that is valid as a whole never shows U+FFFD on the way.
                assert "\ufffd" not in stream.push([token_id]) or "\ufffd" in text

    check()


def test_a_character_is_held_until_it_is_whole(llama_like: Tokenizer) -> None:
    ids = [llama_like.token_id(f"<0x{byte:02X}>") or 0 for byte in "🙂".encode()]
    stream = StreamDetokenizer(llama_like, [])
    assert [stream.push([token_id]) for token_id in ids] == ["", "", "", "🙂"]
    assert stream.finish() == ""


def test_a_character_that_never_ends(llama_like: Tokenizer) -> None:
    first, second = (llama_like.token_id(name) or 0 for name in ("<0xE2>", "<0x82>"))
    stream = StreamDetokenizer(llama_like, [])
    assert stream.push([first, second]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    with pytest.raises(RuntimeError):
        stream.push([first])


def test_a_prompt_that_ends_within_a_character(llama_like: Tokenizer) -> None:
    ids = [llama_like.token_id(f"<0x{byte:02X}>") or 0 for byte in "€".encode()]
    letter = llama_like.token_id("a") or 0
    assert streamed(llama_like, ids[:2], [[ids[2]], [letter]], True) == "€a"
    assert streamed(llama_like, ids[:2], [[letter]], True) == "a"
    assert streamed(llama_like, ids[:2], [], True) == ""


def test_the_leading_space(mistral: Tokenizer) -> None:
    ids = mistral.encode("hello there", add_special_tokens=False)
    assert streamed(mistral, [], [ids], True) == "hello there"
    assert streamed(mistral, [1], [ids], True) == "hello there"
    assert streamed(mistral, mistral.encode("oh"), [ids], True) == " hello there"
    assert streamed(mistral, [1], [ids], False) == " hello there"
    lone_space = mistral.token_id("▁") or 0
    assert streamed(mistral, [1], [[lone_space], ids], True) == " hello there"
