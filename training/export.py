"""Writes and reads models as Hugging Face checkpoint folders.

Knows the file formats: `config.json`, safetensors in bfloat16 cut into shards, and their index. Knows nothing of
how the weights came to be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.model import Llama, Sizes

LARGEST_SHARD_BYTES = 15 * 2**20
_SIZE_FIELDS = tuple(Sizes.__dataclass_fields__)


def write_model(model: Llama, folder: Path) -> None:
    """Writes the weights, rounded to bfloat16, and the two configuration files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    total_bytes = sum(weight.nbytes for weight in state.values())
    shards = _shards(state, -(-total_bytes // LARGEST_SHARD_BYTES))
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    sizes = model.sizes.as_dict()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "rope_parameters": {"rope_theta": sizes["rope_theta"], "rope_type": "default"},
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})


def _shards(state: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Cuts a state, in its order, into `count` or more shards of about equal bytes, none above the limit."""
    aim = min(LARGEST_SHARD_BYTES - 2**16, sum(weight.nbytes for weight in state.values()) // count + 2**20)
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, weight in state.items():
        if shards[-1] and filled + weight.nbytes > aim:
            shards.append({})
            filled = 0
        shards[-1][name] = weight
        filled += weight.nbytes
    return shards


def read_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Llama:
    """The model of a folder that `write_model` wrote."""
    config = json.loads((folder / "config.json").read_text())
    model = Llama(Sizes(**{name: config[name] for name in _SIZE_FIELDS}))
    state: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        state.update(load_file(shard))
    model.load_state_dict(state)
    return model.to(device, dtype).eval().requires_grad_(False)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
