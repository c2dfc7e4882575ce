"""Qwen3 mixtures of experts (2505.09388): Qwen3 attention, many small experts.

Knows what differs from Qwen3. It must not know how layers compute.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.models import llama
from ridgeline.models.decoder import Names
from ridgeline.models.qwen2 import DEFAULTS
from ridgeline.models.spec import Fields, ModelSpec, experts_of, window_of

ARCHITECTURE = "Qwen3MoeForCausalLM"
NAMES = Names()


def spec(fields: Fields) -> ModelSpec:
    """Every `decoder_sparse_step`-th layer is sparse, less those in `mlp_only_layers`."""
    fields = fields.over(**{**DEFAULTS, "num_key_value_heads": 4})
    base = llama.spec(fields)
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.integers("mlp_only_layers")
    sparse = frozenset(n for n in range(base.layers) if n not in dense and (n + 1) % step == 0)
    inner, renormalize = fields.integer("moe_intermediate_size"), fields.flag("norm_topk_prob", False)
    window = window_of(fields) if fields.flag("use_sliding_window", False) else None
    return replace(
        base,
        architecture=ARCHITECTURE,
        windows=(window,) * base.layers,
        qk_norm=True,
        mlp_bias=False,
        experts=experts_of(fields, ("num_experts", "num_local_experts"), inner, renormalize, sparse),
    )
