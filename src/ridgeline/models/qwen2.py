"""Qwen2 and Qwen2.5 (2407.10671, 2412.15115): Llama with biases on q, k and v.

Knows what differs from Llama. It must not know how layers compute.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.models import llama
from ridgeline.models.decoder import Names
from ridgeline.models.spec import Fields, ModelSpec, window_of, windows_of

ARCHITECTURE = "Qwen2ForCausalLM"
NAMES = Names()
DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""What Transformers takes where a config says nothing."""


def qwen_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Windows hold from layer `max_window_layers` on, and only if `use_sliding_window` is set."""
    window = window_of(fields) if fields.flag("use_sliding_window", False) else None
    return windows_of(fields, layers, window, fields.integer("max_window_layers", default=28, least=0))


def spec(fields: Fields) -> ModelSpec:
    """The shape that a Qwen2 config describes."""
    fields = fields.over(**DEFAULTS)
    base = llama.spec(fields)
    return replace(
        base,
        architecture=ARCHITECTURE,
        windows=qwen_windows(fields, base.layers),
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
    )
