"""Qwen3 dense models (2505.09388): Llama with RMSNorm on each head of q and k.

Knows what differs from Llama. It must not know how layers compute.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.models import llama
from ridgeline.models.decoder import Names
from ridgeline.models.qwen2 import DEFAULTS, qwen_windows
from ridgeline.models.spec import Fields, ModelSpec

ARCHITECTURE = "Qwen3ForCausalLM"
NAMES = Names()


def spec(fields: Fields) -> ModelSpec:
    """A config without head_dim has Transformers' default of 128, whatever the hidden size."""
    fields = fields.over(**DEFAULTS, head_dim=128)
    base = llama.spec(fields)
    return replace(
        base,
        architecture=ARCHITECTURE,
        windows=qwen_windows(fields, base.layers),
        qk_norm=True,
        mlp_bias=False,
    )
