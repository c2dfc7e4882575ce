"""Text from ids that arrive a few at a time.

Knows how bytes of successive tokens join into characters. Must not know stop strings, requests or
where the ids come from.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ridgeline.text.tokenizer import Tokenizer

_LONGEST_CHARACTER_BYTES = 4
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDetokenizer:
    """The text of an output, in pieces that never hold half a character.

    Invariant: all pushes and `finish` joined = decode(prompt + output) without decode(prompt) at its
    front. Where the prompt ends in the middle of a character and the output completes it, the
    output's text starts with that character (so nothing is lost), and decode(prompt) counts without
    the U+FFFD that stands for the half. Each token costs its own bytes only: there is no window to
    decode again, because a token's bytes depend on nothing but whether the text has been opened.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._table = tokenizer.token_bytes
        self._skip_special_tokens = skip_special_tokens
        self._opened = self._table.opens(prompt_ids, skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._prompt_is_cut = self._feed_last_bytes(prompt_ids)
        self._parts: list[str] = []
        self._finished = False

    @property
    def text(self) -> str:
        """All text given out so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, new_ids: Sequence[int]) -> str:
        """Takes the next ids and returns the characters that they complete.

        Raises RuntimeError after `finish`.
        """
        if self._finished:
            raise RuntimeError("push after finish: the end of the text has been decided")
        added = self._table.spell(new_ids, self._skip_special_tokens, self._opened)
        if not self._opened:
            # Not `bool(added)`: the first token may be nothing but the space that is taken away.
            self._opened = self._table.opens(new_ids, self._skip_special_tokens)
        return self._give(self._decoder.decode(added))

    def finish(self) -> str:
        """The last text: U+FFFD if a character was left incomplete, else nothing."""
        if self._finished:
            return ""
        self._finished = True
        return self._give(self._decoder.decode(b"", final=True))

    def _give(self, text: str) -> str:
        if self._prompt_is_cut and text:
            self._prompt_is_cut = False
            # The half character at the prompt's end came to nothing: decode(prompt) shows its
            # U+FFFD already.
            text = text.removeprefix(_REPLACEMENT)
        if text:
            self._parts.append(text)
        return text

    def _feed_last_bytes(self, prompt_ids: Sequence[int]) -> bool:
        """Leaves an incomplete last character of the prompt in the decoder; whether there is one.

        UTF-8 synchronises itself: the last four bytes tell, whatever stands before them.
        """
        tail = b""
        for end in range(len(prompt_ids), 0, -1):
            tail = self._table.spell(prompt_ids[end - 1 : end], self._skip_special_tokens, opened=True) + tail
            if len(tail) >= _LONGEST_CHARACTER_BYTES:
                break
        self._decoder.decode(tail[-_LONGEST_CHARACTER_BYTES:])
        pending, _ = self._decoder.getstate()
        return bool(pending)
