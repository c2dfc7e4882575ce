"""Configurations of published models, as they lie in data/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
PUBLISHED = (
    "llama-2-7b-hf",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "mistral-nemo-12b",
    "qwen3-0.6b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "mixtral-8x7b-v0.1",
    "opt-175b",
)


def published(name: str) -> dict[str, Any]:
    """The config.json of a published model; OPT-175B's is put together from its dimensions."""
    if name != "opt-175b":
        return json.loads((DATA / f"{name}.config.json").read_text())
    sizes = json.loads((DATA / "opt-175b.dims.json").read_text())
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": sizes["hidden_dim"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["n_head"],
        "ffn_dim": sizes["ffn_embed_dim"],
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["max_seq_len"],
        "torch_dtype": "float16",
    }


def transformers_config(values: dict[str, Any]) -> Any:
    """Transformers' own reading of a config.json."""
    from transformers import AutoConfig

    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)
