"""OPT (Zhang et al., 2205.01068): learned positions, LayerNorm, ReLU, biases everywhere.

Knows the family's config and names. It must not know how layers compute.
"""

from __future__ import annotations

from ridgeline.core.errors import CheckpointError, UnsupportedModel
from ridgeline.models.decoder import Names
from ridgeline.models.spec import Fields, ModelSpec, dtype_name, token_ids

ARCHITECTURE = "OPTForCausalLM"
NAMES = Names(
    embedding="model.decoder.embed_tokens.weight",
    positions="model.decoder.embed_positions.weight",
    norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{layer}.",
    attention_norm="self_attn_layer_norm",
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    up="fc1",
    down="fc2",
)
POSITION_OFFSET = 2
"""OPT's position table starts with two rows that no token uses."""


def spec(fields: Fields) -> ModelSpec:
    """UnsupportedModel for the post-norm variant (OPT-350M) and for projected embeddings."""
    hidden = fields.integer("hidden_size")
    if not fields.flag("do_layer_norm_before", True) or fields.flag("_remove_final_layer_norm", False):
        raise UnsupportedModel(f"{fields.origin}: OPT with norms after the blocks (as in OPT-350M) is not supported")
    if fields.integer("word_embed_proj_dim", default=hidden) != hidden:
        raise UnsupportedModel(f"{fields.origin}: OPT with word_embed_proj_dim other than hidden_size is not supported")
    if not fields.flag("layer_norm_elementwise_affine", True):
        raise UnsupportedModel(f"{fields.origin}: OPT with norms without parameters is not supported")
    fields = fields.over(bos_token_id=2, eos_token_id=2)
    heads = fields.integer("num_attention_heads")
    if hidden % heads:
        raise CheckpointError(f"{fields.origin}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    layers = fields.integer("num_hidden_layers")
    biased = fields.flag("enable_bias", True)
    bos, eos = token_ids(fields)
    return ModelSpec(
        architecture=ARCHITECTURE,
        vocabulary=fields.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=fields.integer("ffn_dim"),
        activation=fields.text("activation_function", default="relu"),
        norm_eps=1e-5,
        max_positions=fields.integer("max_position_embeddings"),
        dtype=dtype_name(fields),
        tied=fields.flag("tie_word_embeddings", True),
        windows=(None,) * layers,
        norm="layer",
        gated=False,
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
        position_offset=POSITION_OFFSET,
        bos_id=bos,
        eos_ids=eos,
    )
