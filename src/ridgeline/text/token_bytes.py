"""What bytes each token id adds to a text.

Knows the decoder rules that checkpoints declare (byte-level BPE, Metaspace, byte fallback) and
turns them, once, into a table from id to bytes. Every decoder of a language model is such a table
plus one rule for the start of the text, which is why decoding a whole text and streaming it token
by token cannot disagree here. Must not know how text becomes ids, nor who reads the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ridgeline.core.errors import UnsupportedModel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character by which byte-level BPE (GPT-2) writes each byte → that byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


@dataclass(frozen=True)
class Spelling:
    """How a token's name in the vocabulary becomes bytes.

    `later` holds anywhere in a text; `first` for the token that the text starts with, where the
    space that encoding put in front is taken away again. Added tokens stand for themselves where
    `added_are_literal` (byte-level BPE: their names are text, not the byte alphabet).
    """

    first: Callable[[str], bytes]
    later: Callable[[str], bytes]
    added_are_literal: bool = False


def spelling_of(decoder: Mapping[str, Any] | None) -> Spelling:
    """Reads the `decoder` entry of a tokenizer.json.

    Raises UnsupportedModel for a decoder whose output is not a concatenation of what the tokens
    stand for (WordPiece, CTC, BPE with word suffixes): such a text cannot be streamed exactly.
    """
    if decoder is None:  # the tokenizers library then joins tokens with spaces
        return Spelling(first=str.encode, later=lambda token: b" " + token.encode())

    replacements: list[tuple[str, str]] = []
    byte_level = byte_fallback = fused = False
    leading = b""
    mark = ""
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = fused = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            # Once tokens are fused, a longer pattern could match across the border of two of them.
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                len(old) == 1 or not fused
            ):
                replacements.append((old, new))
            case {"type": "Strip", "start": 0, "stop": 0}:
                pass
            case {"type": "Strip", "content": str(content), "start": 1, "stop": 0} if fused:
                leading = content.encode()
            case {"type": "Metaspace", "replacement": str(replacement)}:
                replacements.append((replacement, " "))
                # Files from before prepend_scheme carry the boolean alone.
                prepends = step.get("add_prefix_space", True)
                if step.get("prepend_scheme", "always" if prepends else "never") != "never":
                    mark = replacement
            case _:
                raise UnsupportedModel(
                    f"tokenizer.json: decoder {step.get('type', step)!r} is not a concatenation of token "
                    "texts, which streaming needs; supported are ByteLevel, Metaspace, ByteFallback, Fuse, "
                    "Replace of a string and Strip of one leading character"
                )

    def later(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        if byte_level and all(character in BYTE_LEVEL_ALPHABET for character in token):
            return bytes(BYTE_LEVEL_ALPHABET[character] for character in token)
        return token.encode()

    def first(token: str) -> bytes:
        return later(token.replace(mark, "") if mark else token).removeprefix(leading)

    return Spelling(first, later, added_are_literal=byte_level)


class TokenBytes:
    """The table: id → bytes, and which ids are special (control tokens that a reader never sees).

    Ids outside of the table (a model's vocabulary is often padded) and ids that no token has stand
    for no bytes. Read-only after construction, so safe to share between threads.
    """

    def __init__(self, pieces: Sequence[bytes], first: Mapping[int, bytes], special_ids: frozenset[int]) -> None:
        """`first` overrides `pieces` for ids that read otherwise at the start of a text."""
        self._pieces = list(pieces)
        self._visible = [b"" if token in special_ids else piece for token, piece in enumerate(pieces)]
        self._first = dict(first)
        self.special_ids = special_ids

    @classmethod
    def spelled(
        cls,
        vocabulary: Mapping[str, int],
        spelling: Spelling,
        added: Mapping[int, str],
        special_ids: frozenset[int],
    ) -> TokenBytes:
        """The table of `vocabulary` (token → id), where `added` (id → text) has the last word."""
        names = {token_id: token for token, token_id in vocabulary.items()} | dict(added)
        pieces = [b""] * (max(names, default=-1) + 1)
        first: dict[int, bytes] = {}
        for token_id, token in names.items():
            if token_id in added and spelling.added_are_literal:
                pieces[token_id] = token.encode()
                continue
            pieces[token_id] = spelling.later(token)
            if (opening := spelling.first(token)) != pieces[token_id]:
                first[token_id] = opening
        return cls(pieces, first, special_ids)

    def __len__(self) -> int:
        """One more than the largest id."""
        return len(self._pieces)

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token inside of a text; empty for an id without a token."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def opens(self, ids: Iterable[int], skip_special_tokens: bool) -> bool:
        """Whether any of `ids` adds to the text, so that what follows is not its start."""
        table = self._visible if skip_special_tokens else self._pieces
        return any(0 <= token_id < len(table) and table[token_id] for token_id in ids)

    def spell(self, ids: Sequence[int], skip_special_tokens: bool, opened: bool) -> bytes:
        """The bytes that `ids` add to a text that has been opened already, or not yet."""
        table = self._visible if skip_special_tokens else self._pieces
        size = len(table)
        pieces = [table[token_id] if 0 <= token_id < size else b"" for token_id in ids]
        if not opened and self._first:
            for place, piece in enumerate(pieces):
                if piece:
                    pieces[place] = self._first.get(ids[place], piece)
                    break
        return b"".join(pieces)
