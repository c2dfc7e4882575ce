"""Llama 1, 2, 3 and 3.x (Touvron et al., 2302.13971, 2307.09288; Grattafiori et al., 2407.21783).

Knows the family's config and names. It must not know how layers compute.
"""

from __future__ import annotations

from ridgeline.models.decoder import Names
from ridgeline.models.spec import Fields, ModelSpec, dtype_name, head_fields, rope_of, token_ids

ARCHITECTURE = "LlamaForCausalLM"
NAMES = Names()


def spec(fields: Fields) -> ModelSpec:
    """The shape that a Llama config describes. What a config leaves out has Transformers' default."""
    fields = fields.over(bos_token_id=1, eos_token_id=2)
    hidden, heads, kv_heads, head_dim = head_fields(fields)
    layers = fields.integer("num_hidden_layers")
    max_positions = fields.integer("max_position_embeddings", default=2048)
    bias = fields.flag("attention_bias", False)
    bos, eos = token_ids(fields)
    return ModelSpec(
        architecture=ARCHITECTURE,
        vocabulary=fields.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        activation=fields.text("hidden_act", default="silu"),
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        max_positions=max_positions,
        dtype=dtype_name(fields),
        tied=fields.flag("tie_word_embeddings", False),
        windows=(None,) * layers,
        rope=rope_of(fields, max_positions),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        bos_id=bos,
        eos_ids=eos,
    )
