"""Words that may not be generated, as the token sequences that would write them.

Knows text and tokens. Must not know how the sequences are kept from being sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.core.errors import InvalidArgument
from ridgeline.text.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The token sequences of each word at the start of a text and after a space.

    The spaced form counts only if it has as many tokens and is another sequence: where the
    tokenizer puts the space into a token of its own, forbidding that sequence would add nothing.
    (vLLM's rule for `bad_words`.) Duplicates are given once. Raises InvalidArgument("bad_words") for
    a word without any characters but white space.
    """
    sequences: list[list[int]] = []
    for word in words:
        bare = word.lstrip() if isinstance(word, str) else ""
        if not bare:
            raise InvalidArgument("bad_words", f"expected words of at least one visible character, got {word!r}")
        alone, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in (bare, " " + bare))
        candidates = [alone]
        if len(spaced) == len(alone) and spaced != alone:
            candidates.append(spaced)
        sequences += [ids for ids in candidates if ids and ids not in sequences]
    return sequences
