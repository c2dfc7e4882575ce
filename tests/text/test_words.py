"""Bad words as token sequences."""

from __future__ import annotations

import pytest

from ridgeline.core.errors import InvalidArgument
from ridgeline.text.tokenizer import Tokenizer
from ridgeline.text.words import bad_word_ids


def test_both_forms_of_a_word(byte_level: Tokenizer) -> None:
    left, spaced = (byte_level.encode(text, add_special_tokens=False) for text in ("left", " left"))
    assert len(left) == len(spaced) == 1
    assert bad_word_ids(byte_level, ["left"]) == [left, spaced]
    assert bad_word_ids(byte_level, ["  left", "left"]) == [left, spaced]


def test_a_space_that_is_a_token_of_its_own_is_left_out(mistral: Tokenizer) -> None:
    (ids,) = bad_word_ids(mistral, ["hello"])
    assert ids == mistral.encode("hello", add_special_tokens=False)


def test_special_tokens_can_be_named_and_none_are_added(byte_level: Tokenizer) -> None:
    assert all(byte_level.bos_id not in ids for ids in bad_word_ids(byte_level, ["dog", "fox"]))
    assert bad_word_ids(byte_level, ["<|end|>"])[0] == [byte_level.eos_id]
    assert bad_word_ids(byte_level, []) == []


@pytest.mark.parametrize("word", ["", "  ", 7])
def test_words_without_characters(byte_level: Tokenizer, word: str) -> None:
    with pytest.raises(InvalidArgument, match="bad_words"):
        bad_word_ids(byte_level, [word])
