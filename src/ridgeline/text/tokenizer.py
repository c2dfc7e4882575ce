"""Text to token ids and back, for any tokenizer that a checkpoint may carry.

Knows what a tokenizer is for the rest of the engine: ids, text, the special ids and the checkpoint's
chat template. Must not know how a vocabulary is stored or searched; the codecs do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ridgeline.core.errors import CheckpointError, InvalidArgument, UnsupportedModel
from ridgeline.text.json_codec import JsonCodec
from ridgeline.text.sentencepiece_codec import SentencePieceCodec
from ridgeline.text.token_bytes import TokenBytes
from ridgeline.text.tokenizer_files import read_settings

_UNREAD_VOCABULARIES = (
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Codec(Protocol):
    """A vocabulary that turns text into ids; safe to use from several threads."""

    token_bytes: TokenBytes
    named_tokens: Mapping[str, str]

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary."""

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool, allow_special_in_text: bool
    ) -> list[list[int]]:
        """Ids of each text."""


class Tokenizer:
    """The public face of a tokenizer. Holds no state that calls change, so threads may share it.

    `special_tokens` maps the names that chat templates use ("bos_token", "eos_token", "pad_token" …)
    to the tokens' texts.
    """

    def __init__(self, codec: Codec, chat_template: str | None = None) -> None:
        self._codec = codec
        self.token_bytes = codec.token_bytes
        self.chat_template = chat_template
        self.special_tokens = {
            name: token for name, token in codec.named_tokens.items() if codec.id_of(token) is not None
        }
        self.bos_id = self._id_named("bos_token")
        self.eos_id = self._id_named("eos_token")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return len(self.token_bytes)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which `skip_special_tokens` leaves out of a decoded text."""
        return self.token_bytes.special_ids

    def encode(self, text: str, add_special_tokens: bool = True, allow_special_in_text: bool = True) -> list[int]:
        """The ids of `text`.

        `add_special_tokens` puts BOS and EOS around it as the checkpoint says. With
        `allow_special_in_text` false, a special token that is typed in the text becomes ordinary
        characters, so that a user cannot speak for the system. Raises InvalidArgument("prompt") for
        text that is not Unicode (lone surrogates).
        """
        return self.encode_batch([text], add_special_tokens, allow_special_in_text)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, allow_special_in_text: bool = True
    ) -> list[list[int]]:
        """`encode` of each text, on several cores where the vocabulary's library can."""
        for text in texts:
            check_unicode(text, "prompt")
        return self._codec.encode_batch(texts, add_special_tokens, allow_special_in_text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self.token_bytes.spell(ids, skip_special_tokens, opened=False).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary ("<|im_end|>"), None if it has none."""
        return self._codec.id_of(token)

    def token_text(self, token_id: int) -> str:
        """The text of one token inside of a text (with its leading space); halves show as U+FFFD."""
        return self.token_bytes.piece(token_id).decode("utf-8", "replace")

    def _id_named(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._codec.id_of(token)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint: tokenizer.json, else tokenizer.model, else vocab.json and merges.txt.

    None if `directory` holds no tokenizer files at all. Raises CheckpointError naming a file that is
    damaged or missing beside others, UnsupportedModel for a kind of vocabulary that is not read.
    """
    settings = read_settings(directory)
    codec: Codec
    if (path := directory / "tokenizer.json").is_file():
        codec = JsonCodec.from_tokenizer_json(path, settings)
    elif (path := directory / "tokenizer.model").is_file():
        codec = SentencePieceCodec(path, settings)
    elif (path := directory / "vocab.json").is_file() and (merges := directory / "merges.txt").is_file():
        codec = JsonCodec.from_vocab_and_merges(path, merges, settings)
    else:
        for name in _UNREAD_VOCABULARIES:
            if (directory / name).is_file():
                raise UnsupportedModel(
                    f"{directory / name}: this kind of vocabulary is not read; a tokenizer.json beside it would be"
                )
        for name in _SIDE_FILES:
            if (directory / name).is_file():
                raise CheckpointError(f"{directory / name}: there is no vocabulary (tokenizer.json) beside it")
        return None
    return Tokenizer(codec, settings.chat_template)


def check_unicode(text: str, parameter: str) -> None:
    """Raises InvalidArgument(`parameter`) for lone surrogates, which no tokenizer can encode."""
    if not isinstance(text, str):
        raise InvalidArgument(parameter, f"expected text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            parameter,
            f"character {error.start} is half of a surrogate pair (U+{ord(text[error.start]):04X}), "
            "which is not Unicode text",
        ) from None
