"""Text to ids for a SentencePiece model file (tokenizer.model).

Knows the SentencePiece library and the conventions by which Llama-like checkpoints put special
tokens and the leading space around it. Must not know tokenizer.json nor what is done with the ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

from ridgeline.core.errors import CheckpointError
from ridgeline.text.token_bytes import TokenBytes
from ridgeline.text.tokenizer_files import TokenizerSettings

_SPACE_MARK = "▁"

# The protobuf of `normalizer_spec { add_dummy_prefix: false }` as a field of the model. Protobuf
# merges what is appended to a message, so this switches the leading space off without the schema.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceCodec:
    """A SentencePiece model with the special tokens that SentencePiece does not match in text.

    The leading space: SentencePiece puts one before every text that it is given. A text with
    special tokens inside reaches it in segments; checkpoints marked `legacy` were trained with a
    space before each segment, others with one at the start of the text only (the default, as in
    transformers 5). BOS is added unless the config says `add_bos_token: false`, EOS only if it says
    `add_eos_token: true`. Read-only after construction, so safe to share between threads.
    """

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        """Raises CheckpointError if the file is no SentencePiece model."""
        try:
            model = path.read_bytes()
            if not model:
                raise CheckpointError(f"{path}: the file is empty")
            self._spaced = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a SentencePiece model: {error}") from error
        processor = self._spaced
        size: int = processor.get_piece_size()
        own = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(),
        }
        self.named_tokens: Mapping[str, str] = {
            name: processor.id_to_piece(token_id) for name, token_id in own.items() if token_id >= 0
        } | dict(settings.named_tokens)

        self._ids = {processor.id_to_piece(token_id): token_id for token_id in range(size)}
        self._ids |= {entry.content: token_id for token_id, entry in settings.added_tokens.items()}
        special_texts = {*self.named_tokens.values(), *settings.other_special_tokens}
        special_ids = {token_id for token_id in range(size) if processor.is_control(token_id)}
        special_ids |= {self._ids[content] for content in special_texts if content in self._ids}
        special_ids |= {token_id for token_id, entry in settings.added_tokens.items() if entry.special}

        self._always_spaced = settings.legacy is True
        self._never_spaced = settings.add_prefix_space is False
        prefixed = not self._never_spaced and processor.encode("a", out_type=str)[0].startswith(_SPACE_MARK)
        self.token_bytes = _table(processor, settings, frozenset(special_ids), prefixed)
        self._prepare_matching(settings, special_ids)
        self._before = self._flagged("bos_token", settings.add_bos_token is not False)
        self._after = self._flagged("eos_token", settings.add_eos_token is True)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary."""
        return self._ids.get(token)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool, allow_special_in_text: bool
    ) -> list[list[int]]:
        """Ids of each text."""
        return [self._encode(text, add_special_tokens, allow_special_in_text) for text in texts]

    def _encode(self, text: str, add_special_tokens: bool, allow_special_in_text: bool) -> list[int]:
        ids: list[int] = []
        pattern = self._pattern if allow_special_in_text else self._ordinary_pattern
        for segment, at_start, token_id in _segments(text, pattern, self._ids):
            spaced = not self._never_spaced and (at_start or self._always_spaced)
            ids += (self._spaced if spaced else self._bare).encode(segment)
            if token_id is not None:
                ids.append(token_id)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def _flagged(self, name: str, wanted: bool) -> list[int]:
        token_id = self._ids.get(self.named_tokens.get(name, ""))
        return [token_id] if wanted and token_id is not None else []

    def _prepare_matching(self, settings: TokenizerSettings, special_ids: set[int]) -> None:
        names = {token_id: content for content, token_id in self._ids.items()}
        special = {names[token_id]: (False, False) for token_id in special_ids}
        added = {entry.content: entry for entry in settings.added_tokens.values()}
        strips = special | {content: (entry.lstrip, entry.rstrip) for content, entry in added.items()}
        self._pattern = _alternatives(strips)
        self._ordinary_pattern = _alternatives(
            {content: strip for content, strip in strips.items() if self._ids[content] not in special_ids}
        )


def _alternatives(tokens: dict[str, tuple[bool, bool]]) -> re.Pattern[str] | None:
    """Matches any of `tokens`, the longest first; each may swallow white space (left, right).

    One group a token, so that the token is known without the white space around it.
    """
    ordered = sorted(tokens.items(), key=lambda item: -len(item[0]))
    parts = [
        (r"\s*" if left else "") + f"({re.escape(content)})" + (r"\s*" if right else "")
        for content, (left, right) in ordered
    ]
    return re.compile("|".join(parts)) if parts else None


def _segments(
    text: str, pattern: re.Pattern[str] | None, ids: dict[str, int]
) -> Iterator[tuple[str, bool, int | None]]:
    """Ordinary text, whether it starts the text, and the id of the token after it (none at the end)."""
    done = 0
    for match in pattern.finditer(text) if pattern else ():
        yield text[done : match.start()], done == 0, ids[match[match.lastindex or 0]]
        done = match.end()
    yield text[done:], done == 0, None


def _table(
    processor: sentencepiece.SentencePieceProcessor,
    settings: TokenizerSettings,
    special_ids: frozenset[int],
    prefixed: bool,
) -> TokenBytes:
    """The bytes of every piece; the space that encoding put before a text is taken off its start."""
    size: int = processor.get_piece_size()
    pieces = [b""] * max(size, max(settings.added_tokens, default=-1) + 1)
    first: dict[int, bytes] = {}
    for token_id in range(size):
        name: str = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            pieces[token_id] = bytes([int(name[3:5], 16)])
        elif token_id in special_ids:
            pieces[token_id] = name.encode()
        else:
            pieces[token_id] = name.replace(_SPACE_MARK, " ").encode()
    for token_id, entry in settings.added_tokens.items():
        pieces[token_id] = entry.content.encode()
    if prefixed:
        first = {token_id: piece[1:] for token_id, piece in enumerate(pieces) if piece.startswith(b" ")}
    return TokenBytes(pieces, first, special_ids)
