"""Mistral (Jiang et al., 2310.06825): Llama with a sliding window.

Knows what differs from Llama. It must not know how layers compute.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.models import llama
from ridgeline.models.decoder import Names
from ridgeline.models.spec import Fields, ModelSpec, windows_of

ARCHITECTURE = "MistralForCausalLM"
NAMES = Names()


def spec(fields: Fields) -> ModelSpec:
    """A config without `sliding_window` has Transformers' default of 4,096; null means none."""
    base = llama.spec(fields)
    window = fields.maybe("sliding_window") if "sliding_window" in fields.values else 4096
    return replace(
        base,
        architecture=ARCHITECTURE,
        windows=windows_of(fields, base.layers, window),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
