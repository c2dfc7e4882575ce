"""Mixtral (Jiang et al., 2401.04088): Mistral with eight experts in place of each feed-forward network.

Knows what differs from Llama. It must not know how layers compute.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.models import llama
from ridgeline.models.decoder import Names
from ridgeline.models.spec import Fields, ModelSpec, experts_of, window_of

ARCHITECTURE = "MixtralForCausalLM"
NAMES = Names(
    router="block_sparse_moe.gate",
    expert_gate="block_sparse_moe.experts.{expert}.w1",
    expert_up="block_sparse_moe.experts.{expert}.w3",
    expert_down="block_sparse_moe.experts.{expert}.w2",
)


def spec(fields: Fields) -> ModelSpec:
    """The weights of the chosen experts always sum to one."""
    fields = fields.over(
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8
    )
    base = llama.spec(fields)
    return replace(
        base,
        architecture=ARCHITECTURE,
        windows=(window_of(fields),) * base.layers,
        experts=experts_of(fields, ("num_local_experts",), base.intermediate, True, frozenset(range(base.layers))),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
