"""The lecture's optimisations on a model: each moves what it should, and by how much arithmetic says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.models import parse_config
from ridgeline.perf.hardware import find
from ridgeline.study.plan import Planner
from ridgeline.study.what_if import ACCEPTANCE, DRAFTED, WhatIf, unfused_bytes, what_if

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def rows(batch: int = 4, machine: str = "h200", **changed: object) -> dict[str, WhatIf]:
    config = {"architectures": ["LlamaForCausalLM"], **SHAPE, **changed}
    planner = Planner(parse_config(config), "small", "bfloat16")
    return {one.name: one for one in what_if(planner, find(machine), 1024, 256, batch)}


def test_every_row_of_the_list_is_there() -> None:
    found = rows()
    assert list(found) == [
        *("as it is", "KV cache", "GQA", "MoE", "operator fusion"),
        *("speculative decoding", "fp8 weights", "int4 weights", "pruning"),
    ]
    assert found["KV cache"].has
    assert not found["MoE"].has


def test_each_moves_what_it_should() -> None:
    found = rows()
    base = found["as it is"]
    assert found["KV cache"].tpot_s > 10 * base.tpot_s
    assert found["KV cache"].ttft_s == base.ttft_s
    assert found["GQA"].kv_bytes_per_token == 4 * base.kv_bytes_per_token
    assert found["GQA"].tpot_s > base.tpot_s
    assert found["operator fusion"].ttft_s > base.ttft_s
    assert found["speculative decoding"].tpot_s < base.tpot_s
    assert found["int4 weights"].weight_bytes == pytest.approx(base.weight_bytes * (0.5 + 2 / 128) / 2)
    assert found["fp8 weights"].ttft_s < base.ttft_s == pytest.approx(found["int4 weights"].ttft_s, rel=0.05)
    assert found["MoE"].weight_bytes > 2 * base.weight_bytes


def test_half_the_weights_halve_what_reading_them_takes() -> None:
    """Batch 1: nearly all bytes of a decode step are weights."""
    found = rows(batch=1)
    assert found["pruning"].tpot_s / found["as it is"].tpot_s == pytest.approx(0.5, abs=0.03)
    assert found["int4 weights"].tpot_s / found["as it is"].tpot_s == pytest.approx(0.27, abs=0.03)


def test_speculation_pays_least_when_compute_bound() -> None:
    tokens = (1 - ACCEPTANCE ** (DRAFTED + 1)) / (1 - ACCEPTANCE)
    small, large = rows(batch=1), rows(batch=256)
    gain = [one["as it is"].tpot_s / one["speculative decoding"].tpot_s for one in (small, large)]
    assert tokens > gain[0] > gain[1]


def test_a_mixture_is_priced_without_its_experts() -> None:
    mixture = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    found = rows(**mixture)
    assert found["MoE"].has
    assert found["MoE"].ttft_s > 1.5 * found["as it is"].ttft_s


def test_heads_that_are_not_shared_are_priced_shared() -> None:
    found = rows(num_key_value_heads=32)
    assert not found["GQA"].has
    assert found["GQA"].kv_bytes_per_token == found["as it is"].kv_bytes_per_token / 8


def test_lengths_beyond_the_model() -> None:
    spec = replace(parse_config({"architectures": ["LlamaForCausalLM"], **SHAPE}), max_positions=512)
    with pytest.raises(InvalidArgument, match="beyond 512"):
        what_if(Planner(spec, "small", "bfloat16"), find("h200"), 500, 13, 1)


def test_unfused_ops_move_their_intermediates() -> None:
    planner = Planner(parse_config({"architectures": ["LlamaForCausalLM"], **SHAPE}), "small", "bfloat16")
    one, layers = 2, 4
    saved = unfused_bytes(planner.price, Spans((1, 100), (500, 100)))
    assert saved["norm"] == layers * 101 * 2 * one * 2 * 2048
    assert saved["gated_linear"] == layers * 101 * 2 * one * 5632
    assert saved["rope_kv_write"] == layers * 101 * 2 * one * (32 + 8) * 64
    scores = 32 * (500 + 100 * 100)
    assert saved["attention"] == pytest.approx(layers * 4 * one * scores, rel=0.15)
    assert set(saved) == {"attention", "norm", "gated_linear", "rope_kv_write"}
