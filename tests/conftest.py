"""A tiny random Llama with a byte-level tokenizer and a chat template, made on the spot, for whatever runs engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NEEDS = {
    "server/*": ("fastapi", "pydantic", "uvicorn", "jsonschema", "schemathesis", "opentelemetry", "llguidance"),
    "dashboard/*": ("fastapi", "uvicorn"),
    "cli/test_json_schemas.py": ("jsonschema",),
}
"""What tests of the server import: a machine with a GPU may lack it, and none of these tests needs one."""
collect_ignore_glob = [path for path, packages in NEEDS.items() if any(find_spec(name) is None for name in packages)]
END = 1
VOCABULARY = 288
"""Logits of the tiny model: a few ids more than its tokenizer knows, as padded checkpoints have."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": END,
    "torch_dtype": "float32",
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_tokenizer(directory: Path) -> None:
    """258 single bytes and specials and a few merges; BOS in front of every prompt."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, the quick brown fox jumps over the lazy dog"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "chat_template": TEMPLATE,
        },
    )


def write_checkpoint(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama checkpoint with random weights; `changes` override entries of its config.json."""
    import torch
    from safetensors.torch import save_file

    config = {**CONFIG, **changes}
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim

    def matrix(rows: int, inputs: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(rows, inputs, generator=generator) / inputs**0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator),
        "model.norm.weight": 1 + 0.1 * torch.randn(hidden, generator=generator),
        "lm_head.weight": matrix(config["vocab_size"], hidden, 3.0),  # spread enough that choices matter
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for part, rows, inputs in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"{name}{part}.weight"] = matrix(rows, inputs)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{part}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(directory / "model.safetensors"))
    write_json(directory / "config.json", config)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint. Not to be changed: copy it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Products as small as the tiny model's are slower on several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes a tiny checkpoint of its own: checkpoint(**changes to config.json)."""

    def make(**changes: Any) -> Path:
        return write_checkpoint(tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}", **changes)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device say so where there is none, instead of failing."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
