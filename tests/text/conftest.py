"""Small tokenizers of each kind, built on the spot; one real SentencePiece model from data/."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ridgeline.text.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "data"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "Hello world, hello there! Numbers: 1 2 3 10 100 2024. Grüße aus Köln, naïve café, 你好世界 🙂🙃",
    "def add(left, right):\n    return left + right\n\n    # tabs\tand  double  spaces\n",
] * 4
BYTE_LEVEL_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": {"content": "<|end|>", "__type": "AddedToken", "special": True},
}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


def llama_like_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer.json as converted from SentencePiece: byte fallback and a leading space."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    names += list("abcdefghijklmnopqrstuvwxyzHTé你,.!")
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("▁", "H"), ("▁", "▁")]
    names += ["".join(pair) for pair in merges]
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def byte_level_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("byte_level")
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", BYTE_LEVEL_CONFIG)
    return directory


@pytest.fixture(scope="session")
def llama_like_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama_like")
    llama_like_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(directory / "tokenizer_config.json", config)
    return directory


@pytest.fixture(scope="session")
def metaspace_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("metaspace")
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁▁", -2.0), ("▁the", -1.5), ("the", -2.5), ("▁fox", -1.5)]
    tokenizer = tokenizers.Tokenizer(models.Unigram([*pieces, *((c, -5.0) for c in "abcehfotx你é")], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def byte_level(byte_level_directory: Path) -> Tokenizer:
    return loaded(byte_level_directory)


@pytest.fixture(scope="session")
def llama_like(llama_like_directory: Path) -> Tokenizer:
    return loaded(llama_like_directory)


@pytest.fixture(scope="session")
def metaspace(metaspace_directory: Path) -> Tokenizer:
    return loaded(metaspace_directory)


@pytest.fixture(scope="session")
def sentencepiece_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Makes a checkpoint directory around the Mistral model with the given tokenizer_config.json."""

    def make(**config: Any) -> Path:
        directory = tmp_path_factory.mktemp("sentencepiece")
        shutil.copyfile(DATA / "mistral_v1.tokenizer.model", directory / "tokenizer.model")
        if config:
            write_json(directory / "tokenizer_config.json", config)
        return directory

    return make


@pytest.fixture(scope="session")
def mistral(sentencepiece_checkpoint: Callable[..., Path]) -> Tokenizer:
    return loaded(sentencepiece_checkpoint(legacy=True))


@pytest.fixture(scope="session")
def every_tokenizer(
    byte_level: Tokenizer, llama_like: Tokenizer, metaspace: Tokenizer, mistral: Tokenizer
) -> list[Tokenizer]:
    return [byte_level, llama_like, metaspace, mistral]


def loaded(directory: Path) -> Tokenizer:
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer
