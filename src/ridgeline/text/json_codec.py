"""Text to ids for vocabularies that the `tokenizers` library runs.

Knows tokenizer.json, and vocab.json with merges.txt of the GPT-2 kind. Must not know
SentencePiece's own files nor what is done with the ids. The environment variable
TOKENIZERS_PARALLELISM is left alone: unset, the library itself turns its threads off in a forked
child; setting it to "true" for the sake of silence would make such a child hang.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from ridgeline.core.errors import CheckpointError, UnsupportedModel
from ridgeline.text.token_bytes import TokenBytes, spelling_of
from ridgeline.text.tokenizer_files import TokenizerSettings, read_json_object

# The classes whose pre-tokenizer is known to be GPT-2's: vocab.json and merges.txt do not say it,
# and a wrong guess would give other ids without any error.
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


class JsonCodec:
    """A `tokenizers.Tokenizer`, set up once and never changed after, so safe to share."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings, path: Path) -> None:
        """Takes over `tokenizer`; `path` is named in errors.

        Raises CheckpointError where an added token cannot have the id that the config gives it,
        UnsupportedModel for a decoder that cannot be streamed.
        """
        # A length at which training data was cut or padded is no property of a prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_tokens(tokenizer, settings, path)
        self._tokenizer = tokenizer
        self._literal: tokenizers.Tokenizer | None = None
        self._literal_lock = threading.Lock()
        added = tokenizer.get_added_tokens_decoder()
        special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        state = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        self.token_bytes = TokenBytes.spelled(
            tokenizer.get_vocab(with_added_tokens=True),
            spelling_of(state),
            {token_id: token.content for token_id, token in added.items()},
            special_ids,
        )
        self.named_tokens: Mapping[str, str] = dict(settings.named_tokens)

    @classmethod
    def from_tokenizer_json(cls, path: Path, settings: TokenizerSettings) -> JsonCodec:
        """Loads a tokenizer.json, whose post-processor alone decides on BOS and EOS.

        (The flags add_bos_token and add_eos_token of the config are not read then, as in
        transformers 5.) Raises CheckpointError if the file is damaged.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a readable tokenizer.json: {error}") from error
        return cls(tokenizer, settings, path)

    @classmethod
    def from_vocab_and_merges(cls, vocab: Path, merges: Path, settings: TokenizerSettings) -> JsonCodec:
        """Loads byte-level BPE of the GPT-2 kind (OPT has nothing else).

        Raises UnsupportedModel for other tokenizer classes, CheckpointError for damaged files.
        """
        if settings.tokenizer_class not in _GPT2_CLASSES:
            raise UnsupportedModel(
                f"{vocab}: tokenizer class {settings.tokenizer_class!r} without a tokenizer.json; from "
                f"vocab.json and merges.txt only {_GPT2_CLASSES[0]} can be read: convert the tokenizer to "
                "tokenizer.json"
            )
        read_json_object(vocab)  # for an error that names the file
        try:
            model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{merges}: does not fit {vocab.name}: {error}") from error
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.add_prefix_space))
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        before = settings.named_tokens.get("bos_token") if settings.add_bos_token else None
        after = settings.named_tokens.get("eos_token") if settings.add_eos_token else None
        around = [
            (token, tokenizer.token_to_id(token))
            for token in dict.fromkeys((before, after))
            if token is not None and tokenizer.token_to_id(token) is not None
        ]
        known = {token for token, _ in around}
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*([before] if before in known else []), "$A", *([after] if after in known else [])],
            special_tokens=around,
        )
        return cls(tokenizer, settings, vocab)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool, allow_special_in_text: bool
    ) -> list[list[int]]:
        """Ids of each text. Unlike the library's `encode`, this lets go of the interpreter's lock."""
        tokenizer = self._tokenizer if allow_special_in_text else self._without_special_matching()
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def _without_special_matching(self) -> tokenizers.Tokenizer:
        # The switch is a property of the whole object, so flipping it would be seen by other
        # threads in the middle of their encoding: a second object, made when first needed.
        with self._literal_lock:
            if self._literal is None:
                literal = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
                literal.encode_special_tokens = True
                self._literal = literal
            return self._literal


def _add_tokens(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings, path: Path) -> None:
    """Gives the vocabulary the added and special tokens that the side files name.

    A special token that the vocabulary lacks and that has no declared id is left out: a fresh id
    would point behind the last row of the model's embedding.
    """
    present = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    for token_id, entry in settings.added_tokens.items():
        token = tokenizers.AddedToken(
            entry.content,
            single_word=entry.single_word,
            lstrip=entry.lstrip,
            rstrip=entry.rstrip,
            normalized=entry.normalized,
            special=entry.special,
        )
        if repr(token) in present:
            continue
        was_known = tokenizer.token_to_id(entry.content) is not None
        tokenizer.add_tokens([token])
        if not was_known and tokenizer.token_to_id(entry.content) != token_id:
            raise CheckpointError(
                f"{path}: added token {entry.content!r} is declared with id {token_id}, but the next free id "
                f"is {tokenizer.token_to_id(entry.content)}"
            )
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    specials = []
    for content in dict.fromkeys((*settings.named_tokens.values(), *settings.other_special_tokens)):
        if tokenizer.token_to_id(content) is None:
            continue
        special = added.get(content) or tokenizers.AddedToken(content, special=True, normalized=False)
        if not special.special:
            # The vocabulary says "ordinary". A name such as eos_token overrules it, a mere place in
            # the list of special tokens does not (as in transformers 5).
            if content not in settings.named_tokens.values():
                continue
            special.special = True
        specials.append(special)
    tokenizer.add_special_tokens(specials)
