"""Tiny random checkpoints of every family and rope kind, made by Transformers, and the verdict on what ours says.

Weights are drawn so that greedy output wanders: sublayers weigh as much as the embeddings, so the next
token depends on the whole prefix and not on the last token alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

VOCABULARY = 160
POSITIONS = 256
GAP = 1e-4
"""A token may differ from the reference's only where the reference's two best logits are closer than this."""

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A family (Transformers' name of it) with what its config sets beyond SIZES, and how far weights spread."""

    family: str
    extra: dict[str, Any] = field(default_factory=dict)
    spread: float = 1.5

    @property
    def config(self) -> Any:
        import transformers

        return getattr(transformers, f"{self.family}Config")(**{**SIZES, **self.extra})


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


QWEN3_MOE = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32}
MIXED_LAYERS = {"num_hidden_layers": 3, "sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1}

CASES: dict[str, Case] = {
    "llama": Case("Llama"),
    "mistral": Case("Mistral", {"sliding_window": 24}),
    "qwen2": Case("Qwen2", MIXED_LAYERS),
    "qwen3": Case("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": Case("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": Case("Qwen3Moe", {**QWEN3_MOE, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "opt": Case("OPT", {"ffn_dim": 96, "dropout": 0.0, "word_embed_proj_dim": 64}),
    "llama-tied": Case("Llama", {"tie_word_embeddings": True}),
    "llama-bias": Case("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-wide-heads": Case("Llama", {"head_dim": 40, "num_key_value_heads": 1}),
    "llama-linear": Case("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": Case("Llama", rope("dynamic", factor=2.0)),
    "llama-llama3": Case(
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn": Case("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen2-full": Case("Qwen2", {"tie_word_embeddings": True}),
    "qwen3-windows": Case("Qwen3", {**MIXED_LAYERS, "head_dim": 16, "attention_bias": True}),
    "qwen3-moe-plain": Case("Qwen3Moe", {**QWEN3_MOE, "decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "opt-untied": Case("OPT", {"ffn_dim": 96, "dropout": 0.0, "enable_bias": False, "tie_word_embeddings": False}),
}
"""By name. The first seven are the families; the others vary rope, biases, ties, windows and sparse layers."""

FAMILIES = tuple(CASES)[:7]


@dataclass(frozen=True)
class Made:
    """A checkpoint on disk with Transformers' model of it."""

    name: str
    directory: Path
    reference: Any


def make(case: Case, directory: Path, seed: int = 0) -> Any:
    """Write the case's checkpoint into `directory`; returns Transformers' model of it, in eval mode."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, f"{case.family}ForCausalLM")(case.config).eval()
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: torch.Tensor, center: float, spread: float) -> None:
        parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name:
                draw(parameter, 0.0, 0.15 if model.config.tie_word_embeddings else 0.5)
            elif parameter.dim() > 1:
                draw(parameter, 0.0, case.spread / parameter.shape[-1] ** 0.5)
            else:
                draw(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    model.save_pretrained(directory)
    return model


def old_spelling(directory: Path) -> dict[str, Any]:
    """The config.json of a checkpoint as Transformers 4 would have written it."""
    values = json.loads((directory / "config.json").read_text())
    rope_settings = dict(values.pop("rope_parameters", None) or {})
    if rope_settings:
        values["rope_theta"] = rope_settings.pop("rope_theta")
        kind = rope_settings["rope_type"]
        values["rope_scaling"] = None if kind == "default" else rope_settings
    values["torch_dtype"] = values.pop("dtype")
    values["transformers_version"] = "4.51.0"
    values.pop("layer_types", None)
    if values["model_type"] == "qwen3_moe":
        values["num_experts"] = values.pop("num_local_experts")
    if values["model_type"] in ("llama", "mixtral", "mistral") and values.get("head_dim") == 16:
        values["head_dim"] = None
    return values


def prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Transformers' logits of a whole sequence, [tokens, vocabulary]."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def assert_greedy(model: Any, prompt: list[int], output: list[int], count: int = 64) -> None:
    """`output` is what the reference would generate.

    Each token must be the reference's own choice after what stands before it; where it is not, the
    reference's two best logits there must be closer than GAP, and the place is printed.
    """
    assert len(output) == count
    logits = reference_logits(model, prompt + output)[len(prompt) - 1 : -1]
    best = logits.topk(2, dim=-1)
    for place, token in enumerate(output):
        if token == best.indices[place, 0]:
            continue
        gap = float(best.values[place, 0] - best.values[place, 1])
        told = f"output token {place}: {token}, the reference has {best.indices[place].tolist()}, gap {gap:.2e}"
        assert gap < GAP, told
        assert token == best.indices[place, 1], told
        print(told)
