"""Trains the tokenizer and turns text into token files.

Knows byte-level BPE and the files in which Hugging Face tokenizers are kept. Knows the corpus only as texts to
read, and nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 4096
SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0

# After the cl100k pattern (OpenAI, tiktoken), for code: no English contractions, digits one by one. A run of line
# ends closes a token and the indentation after it opens the next one, so a prompt that ends in "\n" has the same
# tokens alone as it has with a continuation.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def blank_tokenizer() -> Tokenizer:
    """The tokenizer before training: every byte is in its alphabet, so nothing can be unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., 2016) of `vocabulary` tokens in all; the separator is token 0."""
    tokenizer = blank_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.token_to_id(SEPARATOR) != SEPARATOR_ID:
        raise ValueError("the separator is not token 0")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", pair=f"{SEPARATOR} $A $B", special_tokens=[(SEPARATOR, SEPARATOR_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_tokens: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": SEPARATOR,
        "model_max_length": context_tokens,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(SEPARATOR_ID): {
                "content": SEPARATOR,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode_files(tokenizer: Tokenizer, texts: Iterable[str], stem: Path, batch: int = 2048) -> tuple[int, int]:
    """Writes documents as `stem.tokens.npy` (uint16, each document opened by the separator) and `stem.starts.npy`.

    Returns the number of documents and of tokens, separators included.
    """
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    for group in _batches(texts, batch):
        for encoding in tokenizer.encode_batch_fast(group):
            ids = np.array(encoding.ids, dtype=np.uint16)
            parts.append(ids)
            lengths.append(len(ids))
    starts = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=starts[1:])
    np.save(stem.with_name(stem.name + ".tokens.npy"), np.concatenate(parts))
    np.save(stem.with_name(stem.name + ".starts.npy"), starts)
    return len(lengths), sum(lengths)


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
