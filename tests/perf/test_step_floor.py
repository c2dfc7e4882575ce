"""The floor of a step without tensors is the price of the step, whatever is in it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from ridgeline.core.step import Spans
from ridgeline.models import build_model, parse_config
from ridgeline.perf.price import Price
from ridgeline.perf.step_floor import StepFloor

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 40}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
           "sliding_window": None}  # fmt: skip


def priced(config: dict[str, Any]) -> Price:
    model = build_model(parse_config(config), torch.device("meta"), torch.float32, 512)
    return Price(model, 64, torch.float32)


def some_spans(draw: random.Random, most: int) -> tuple[Spans, int]:
    count = draw.randint(1, 12)
    new = tuple(draw.choice((1, 1, draw.randint(1, most // 12))) for _ in range(count))
    return Spans(new, tuple(one + draw.randint(0, 300) for one in new)), draw.randint(0, count)


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["full", "windowed"])
def test_it_is_the_price(config: dict[str, Any]) -> None:
    price = priced(config)
    floor = StepFloor(price, 200)
    draw = random.Random(2)
    for _ in range(40):
        spans, rows = some_spans(draw, 200)
        cost = price.step(spans, rows)
        assert floor(spans, rows) == pytest.approx((cost.flops, cost.bytes), rel=1e-9)


def test_trees_count_by_what_their_rows_see() -> None:
    price = priced(LLAMA)
    floor = StepFloor(price, 64)
    spans = Spans((4, 1), (30, 50), ((1, 2, 2), ()))
    cost = price.step(spans, 5)
    assert floor(spans, 5) == pytest.approx((cost.flops, cost.bytes), rel=1e-9)


def test_experts_are_near() -> None:
    """Distinct experts do not grow in a line with the tokens."""
    price = priced(MIXTRAL)
    floor = StepFloor(price, 256)
    for tokens in (1, 2, 3, 6, 12, 48, 100, 256):
        spans = Spans((1,) * tokens, (20,) * tokens)
        cost = price.step(spans, tokens)
        flops, moved = floor(spans, tokens)
        assert flops == pytest.approx(cost.flops, rel=1e-9)
        assert moved == pytest.approx(cost.bytes, rel=0.08)


def test_a_step_of_one_token_at_most() -> None:
    price = priced(LLAMA)
    cost = price.step(Spans((1,), (9,)), 1)
    assert StepFloor(price, 1)(Spans((1,), (9,)), 1) == pytest.approx((cost.flops, cost.bytes))
