"""Qwen3 mixtures of experts (2505.09388): Qwen3 attention, many small experts.

Knows what differs from Qwen3. It must not know how layers compute.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.models import llama
from ridgeline.models.decoder import Names
from ridgeline.models.spec import Experts, Fields, ModelSpec, windows_of

ARCHITECTURE = "Qwen3MoeForCausalLM"
NAMES = Names()


def spec(fields: Fields) -> ModelSpec:
    """Every `decoder_sparse_step`-th layer is sparse, less those in `mlp_only_layers`."""
    base = llama.spec(fields)
    step = fields.integer("decoder_sparse_step", default=1)
    dense = set(fields.maybe("mlp_only_layers") or ())
    sparse = frozenset(n for n in range(base.layers) if n not in dense and (n + 1) % step == 0)
    window = fields.maybe("sliding_window") if fields.flag("use_sliding_window", False) else None
    return replace(
        base,
        architecture=ARCHITECTURE,
        windows=windows_of(fields, base.layers, window),
        qk_norm=True,
        mlp_bias=False,
        experts=Experts(
            count=fields.integer("num_experts", "num_local_experts"),
            per_token=fields.integer("num_experts_per_tok"),
            intermediate=fields.integer("moe_intermediate_size"),
            renormalize=fields.flag("norm_topk_prob", False),
            sparse_layers=sparse,
        ),
    )
