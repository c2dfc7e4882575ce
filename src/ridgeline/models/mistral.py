"""Mistral (Jiang et al., 2310.06825): Llama with a sliding window.

Knows what differs from Llama. It must not know how layers compute.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.models import llama
from ridgeline.models.decoder import Names
from ridgeline.models.spec import Fields, ModelSpec, window_of

ARCHITECTURE = "MistralForCausalLM"
NAMES = Names()


def spec(fields: Fields) -> ModelSpec:
    """A config without `sliding_window` has Transformers' default of 4,096; null means none."""
    fields = fields.over(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
    base = llama.spec(fields)
    return replace(
        base,
        architecture=ARCHITECTURE,
        windows=(window_of(fields),) * base.layers,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
