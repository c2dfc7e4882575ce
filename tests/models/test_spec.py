"""config.json in both spellings, with keys left out, and what is refused; Transformers' own reading is the judge."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import CASES, FAMILIES, SIZES, Made, old_spelling, rope
from published import PUBLISHED, published, transformers_config

from ridgeline.core.errors import CheckpointError, RidgelineError, UnsupportedModel
from ridgeline.models import FAMILIES as ARCHITECTURES
from ridgeline.models import parse_config
from ridgeline.models.rotary import frequencies
from ridgeline.models.spec import ModelSpec, read_config

Checkpoint = Callable[[str], Made]


def tiny(**extra: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **extra}


def through_transformers(values: dict[str, Any]) -> ModelSpec:
    """The spec of everything that Transformers makes of a config, its defaults written out."""
    full = transformers_config(values).to_dict()
    full["architectures"] = values["architectures"]
    return parse_config(full)


@pytest.mark.parametrize("name", CASES)
def test_both_spellings(checkpoint: Checkpoint, name: str) -> None:
    directory = checkpoint(name).directory
    new, old = read_config(directory), old_spelling(directory)
    assert not {"rope_scaling", "rope_theta", "torch_dtype"} & set(new)
    assert not {"rope_parameters", "dtype", "layer_types"} & set(old)
    assert parse_config(old) == parse_config(new)
    assert through_transformers(old) == parse_config(old)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    values = published(name)
    assert parse_config(values) == through_transformers(values)


ALIASES = {"num_local_experts": "num_experts"}
"""Two names of one thing: the other one is named as missing."""


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_left_out(checkpoint: Checkpoint, name: str) -> None:
    """Without any one key a config is refused, naming the key, or means what it means to Transformers."""
    directory = checkpoint(name).directory
    for values in (read_config(directory), old_spelling(directory)):
        refused = set()
        for key in set(values) - {"architectures", "model_type", "transformers_version"}:
            rest = {other: value for other, value in values.items() if other != key}
            if key == "num_key_value_heads" and name != "opt":  # some defaults are 32
                rest["hidden_size"], rest["num_attention_heads"] = 512, 32
            ours = spec_or_refusal(rest)
            if isinstance(ours, str):
                assert f"{ALIASES.get(key, key)} is missing" in ours
                refused.add(key)
            else:
                assert ours == through_transformers(rest), key
        assert {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"} <= refused


def spec_or_refusal(values: dict[str, Any]) -> ModelSpec | str:
    try:
        return parse_config(values)
    except CheckpointError as error:
        return str(error)


def test_null_head_dim() -> None:
    assert parse_config(tiny(head_dim=None)).head_dim == parse_config(tiny()).head_dim == 16
    assert parse_config(tiny(head_dim=40)).head_dim == 40


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
STRETCHES: list[dict[str, Any]] = [
    rope("default"),
    rope("linear", factor=4.0),
    rope("dynamic", factor=3.0),
    rope("dynamic", factor=3.0, original_max_position_embeddings=64),
    *(
        rope("llama3", factor=8.0, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=length)
        for low, high, length in ((1.0, 4.0, 64), (0.5, 2.0, 8192))
    ),
    rope("yarn", **YARN),
    rope("yarn", factor=4.0),
    rope("yarn", **YARN, attention_factor=1.25),
    rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.5),
    rope("yarn", **YARN, mscale=1.0),
    rope("yarn", **YARN, beta_fast=16.0, beta_slow=2.0),
    rope("yarn", **YARN, truncate=False),
    rope("yarn", factor=None, original_max_position_embeddings=64),
    {**rope("yarn", factor=4.0), "original_max_position_embeddings": 32},
    {**rope("yarn", **YARN), "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize(("settings", "theta"), list(itertools.product(STRETCHES, (10000.0, 1e6))))
def test_frequencies(settings: dict[str, Any], theta: float) -> None:
    """Inverse frequencies and the factor on cosines and sines, for both spellings, against Transformers' own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**settings["rope_parameters"], "rope_theta": theta}
    values = tiny(head_dim=32, **{**settings, "rope_parameters": parameters})
    scaling = {("type" if key == "rope_type" else key): value for key, value in parameters.items()}
    del scaling["rope_theta"]
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    spec = parse_config(values)
    assert parse_config({**old, "rope_scaling": scaling, "rope_theta": theta}) == spec
    config = transformers_config({**values, "rope_parameters": dict(parameters)})
    kind = parameters["rope_type"]
    make = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    assert spec.rope is not None
    for length in (256, 700):
        want, factor = make(config, "cpu", seq_len=length)
        have, ours = frequencies(spec.rope, 32, length)
        torch.testing.assert_close(have, want, rtol=1e-6, atol=0)
        assert ours == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        (
            tiny(architectures=["LlamaForCausalM"]),
            UnsupportedModel,
            ["LlamaForCausalM", *ARCHITECTURES, "did you mean"],
        ),
        (tiny(architectures=["DeepseekV3ForCausalLM"]), UnsupportedModel, ["DeepseekV3ForCausalLM", *ARCHITECTURES]),
        (tiny(architectures=None), UnsupportedModel, ["none", *ARCHITECTURES]),
        (
            tiny(architectures=["MyModel"], auto_map={"AutoModelForCausalLM": "modeling_my.MyModel"}),
            UnsupportedModel,
            ["modeling_my.MyModel", "never runs", *ARCHITECTURES],
        ),
        (tiny(rope_scaling={"type": "longrope"}), UnsupportedModel, ["longrope", "yarn", "dynamic"]),
        (tiny(rope_parameters={"full_attention": {"rope_type": "default"}}), UnsupportedModel, ["rotary"]),
        (tiny(partial_rotary_factor=0.5), UnsupportedModel, ["partial_rotary_factor"]),
        (tiny(rope_parameters=[1]), CheckpointError, ["rope_parameters"]),
        (tiny(rope_scaling="linear"), CheckpointError, ["rope_scaling"]),
        (tiny(rope_scaling={"type": "linear"}), CheckpointError, ["factor", "missing"]),
        (tiny(hidden_act="tanh"), UnsupportedModel, ["tanh", "silu"]),
        (tiny(dtype="float64"), UnsupportedModel, ["float64", "bfloat16"]),
        (tiny(dtype=32), CheckpointError, ["dtype"]),
        (tiny(quantization_config={"quant_method": "fp8"}), UnsupportedModel, ["quantization_config"]),
        (tiny(hidden_size="64"), CheckpointError, ["hidden_size", "'64'"]),
        (tiny(hidden_size=True), CheckpointError, ["hidden_size"]),
        (tiny(num_hidden_layers=0), CheckpointError, ["num_hidden_layers"]),
        (tiny(hidden_size=66), CheckpointError, ["hidden_size 66", "num_attention_heads 4"]),
        (tiny(num_key_value_heads=3), CheckpointError, ["num_key_value_heads 3"]),
        (tiny(tie_word_embeddings="yes"), CheckpointError, ["tie_word_embeddings"]),
        (tiny(architectures=["MistralForCausalLM"], sliding_window="wide"), CheckpointError, ["sliding_window"]),
        (
            tiny(
                architectures=["Qwen3ForCausalLM"],
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["chunked_attention"] * 2,
            ),
            UnsupportedModel,
            ["chunked_attention"],
        ),
        (
            tiny(
                architectures=["Qwen3ForCausalLM"],
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["full_attention"],
            ),
            CheckpointError,
            ["layer_types names 1", "has 2"],
        ),
        (
            tiny(architectures=["OPTForCausalLM"], ffn_dim=96, do_layer_norm_before=False),
            UnsupportedModel,
            ["OPT-350M"],
        ),
        (
            tiny(architectures=["OPTForCausalLM"], ffn_dim=96, word_embed_proj_dim=32),
            UnsupportedModel,
            ["word_embed_proj_dim"],
        ),
        (tiny(architectures=["OPTForCausalLM"], ffn_dim=96, hidden_size=66), CheckpointError, ["hidden_size 66"]),
        (tiny(architectures=["MixtralForCausalLM"]), CheckpointError, ["num_experts_per_tok is missing"]),
        (
            tiny(architectures=["MixtralForCausalLM"], num_local_experts=2, num_experts_per_tok=3),
            CheckpointError,
            ["num_experts_per_tok 3"],
        ),
        (
            tiny(architectures=["Qwen3MoeForCausalLM"], num_experts=4, num_experts_per_tok=2, mlp_only_layers=["0"]),
            CheckpointError,
            ["mlp_only_layers"],
        ),
        (tiny(eos_token_id="</s>"), CheckpointError, ["eos_token_id"]),
        (tiny(bos_token_id=[1]), CheckpointError, ["bos_token_id"]),
    ],
)
def test_refusals(values: dict[str, Any], kind: type[RidgelineError], words: list[str]) -> None:
    """One sentence that names the key or the thing, and what would do."""
    with pytest.raises(kind) as refusal:
        parse_config(values, "there/config.json")
    assert "there/config.json" in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)


def test_remote_code_is_ignored_where_ours_will_do() -> None:
    """An auto_map beside an architecture that is built in: ours runs, the checkpoint's code never does."""
    values = tiny(auto_map={"AutoModelForCausalLM": "modeling_my.LlamaForCausalLM"})
    assert parse_config(values).architecture == "LlamaForCausalLM"
