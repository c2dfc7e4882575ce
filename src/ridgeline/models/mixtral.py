"""Mixtral (Jiang et al., 2401.04088): Mistral with eight experts in place of each feed-forward network.

Knows what differs from Llama. It must not know how layers compute.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.models import llama
from ridgeline.models.decoder import Names
from ridgeline.models.spec import Experts, Fields, ModelSpec, windows_of

ARCHITECTURE = "MixtralForCausalLM"
NAMES = Names(
    router="block_sparse_moe.gate",
    expert_gate="block_sparse_moe.experts.{expert}.w1",
    expert_up="block_sparse_moe.experts.{expert}.w3",
    expert_down="block_sparse_moe.experts.{expert}.w2",
)


def spec(fields: Fields) -> ModelSpec:
    """The weights of the chosen experts always sum to one."""
    base = llama.spec(fields)
    return replace(
        base,
        architecture=ARCHITECTURE,
        windows=windows_of(fields, base.layers, fields.maybe("sliding_window")),
        experts=Experts(
            count=fields.integer("num_local_experts", "num_experts"),
            per_token=fields.integer("num_experts_per_tok"),
            intermediate=base.intermediate,
            renormalize=True,
            sparse_layers=frozenset(range(base.layers)),
        ),
        qkv_bias=False,
        output_bias=False,
    )
