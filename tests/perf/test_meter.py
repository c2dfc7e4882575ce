"""The Meter on meta tensors against torch's own counters, against arithmetic by hand, and against real runs."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from published import published, transformers_config

from ridgeline.core.config import EngineConfig
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, Spans, StepPlan
from ridgeline.engine.build import Built, build
from ridgeline.kv.layout import KVLayout
from ridgeline.models import build_model, parse_config
from ridgeline.ops import REGISTRY, Op, Ops, Weight
from ridgeline.perf.meter import Meter
from ridgeline.perf.price import Price

DENSE = ("llama-2-7b-hf", "llama-3.1-8b", "llama-3.1-70b", "qwen3-8b", "opt-175b")
SPARSE = ("mixtral-8x7b-v0.1", "qwen3-30b-a3b")
LINEAR = ("linear", "gated_linear", "moe")
TOKENS = 17


@cache
def price(name: str) -> Price:
    """A published model priced in bf16 with blocks of 64 tokens."""
    spec = parse_config(published(name))
    return Price(build_model(spec, torch.device("meta"), torch.bfloat16, 4096), 64, torch.bfloat16)


@cache
def reference(name: str) -> Any:
    """Transformers' model of the same config, on meta."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        config = transformers_config(published(name))
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()


def linear_flops(meter: Meter) -> float:
    return sum(cost.flops for op, cost in meter.by_op().items() if op in LINEAR)


@pytest.mark.parametrize("name", DENSE + SPARSE)
def test_parameters(name: str) -> None:
    """As many as Transformers' model has; a tied matrix counts once in both."""
    assert price(name).model.store.parameters == sum(p.numel() for p in reference(name).parameters())


@pytest.mark.parametrize("name", DENSE)
def test_linear_flops(name: str) -> None:
    """torch counts every projection as mm or addmm, and attention's products as bmm: those are left out."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.empty(1, TOKENS, dtype=torch.int64, device="meta")
    mask = torch.empty(1, 1, TOKENS, TOKENS, dtype=torch.bfloat16, device="meta")  # Transformers' own asks for values
    inputs = {"input_ids": ids, "use_cache": False, "position_ids": ids}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        reference(name)(**inputs, **({} if name.startswith("opt") else {"attention_mask": mask}))
    counted = counter.get_flop_counts()["Global"]
    wanted = counted.get(torch.ops.aten.mm, 0) + counted.get(torch.ops.aten.addmm, 0)
    assert wanted > 0
    assert linear_flops(price(name).meter(Spans((TOKENS,), (TOKENS,)), TOKENS)) == wanted


@pytest.mark.parametrize("name", DENSE)
def test_attention_flops(name: str) -> None:
    """Two products of head_dim for each head and visible pair; torch counts the square of which they are half."""
    spec = price(name).model.spec
    have = price(name).meter(Spans((TOKENS,), (TOKENS,)), TOKENS).by_op()["attention"].flops
    assert have == spec.layers * 4 * spec.heads * spec.head_dim * TOKENS * (TOKENS + 1) / 2


@pytest.mark.parametrize("name", SPARSE)
def test_mixtures_by_hand(name: str) -> None:
    """6 D I k T for a token's experts, 2 D E T for the router, and the projections around them."""
    config = published(name)
    hidden, experts, used = config["hidden_size"], config.get("num_experts", 8), config["num_experts_per_tok"]
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    mixture = 6 * hidden * inner * used * TOKENS + 2 * hidden * experts * TOKENS
    around = 2 * TOKENS * hidden * (q + 2 * kv) + 2 * TOKENS * q * hidden
    head = 2 * TOKENS * hidden * config["vocab_size"]
    meter = price(name).meter(Spans((TOKENS,), (TOKENS,)), TOKENS)
    assert meter.by_op()["moe"].flops == config["num_hidden_layers"] * mixture
    assert linear_flops(meter) == config["num_hidden_layers"] * (mixture + around) + head


@pytest.mark.parametrize(
    ("name", "total", "active"), [("mixtral-8x7b-v0.1", 46.7e9, 12.9e9), ("qwen3-30b-a3b", 30.5e9, 3.3e9)]
)
def test_published_parameters(name: str, total: float, active: float) -> None:
    """What the publishers say, of what the Meter saw: a token multiplies the active ones, less the embedding."""
    one = price(name)
    spec = one.model.spec
    assert one.model.store.parameters == pytest.approx(total, abs=0.06e9)
    multiplied = linear_flops(one.meter(Spans((1,), (1,)), 1)) / 2
    assert multiplied + spec.vocabulary * spec.hidden == pytest.approx(active, abs=0.06e9)


def test_a_mixture_reads_the_experts_that_it_expects() -> None:
    """One token reads k of E experts, many tokens all of them."""
    one = price("mixtral-8x7b-v0.1")
    expert_bytes = 2 * 3 * 4096 * 14336
    layer = dict(one.meter(Spans((1,), (1,)), 1).calls)["moe"]
    assert layer.read_bytes == pytest.approx(2 * expert_bytes, rel=1e-3)
    many = dict(one.meter(Spans((512,), (512,)), 1).calls)["moe"]
    assert many.read_bytes == pytest.approx(8 * expert_bytes, rel=1e-2)


def test_a_decode_step_reads_weights_and_cache_once() -> None:
    """Llama-3.1-8B: all parameters but the embedding table, and every visible token's keys and values."""
    one = price("llama-3.1-8b")
    spec = one.model.spec
    weights = one.model.store.nbytes - spec.vocabulary * spec.hidden * 2
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, 2)
    for visible in ((1,), (100, 7000, 8192)):
        floor = weights + layout.bytes_per_token * sum(visible)
        read = one.step(Spans((1,) * len(visible), visible), len(visible)).read_bytes
        assert floor < read < floor * 1.001


# Real runs

HEADS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TINY: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"mlp_bias": True, "attention_bias": True},
    "MistralForCausalLM": {"sliding_window": 8},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    },
    "OPTForCausalLM": {"ffn_dim": 48},
}
SPANS = (
    Spans((1,), (1,)),
    Spans((9,), (9,)),
    Spans((1, 1, 1), (1, 17, 100)),
    Spans((20, 1, 5), (20, 33, 90)),
)


def tiny(architecture: str, directory: Path) -> Built:
    config = {"architectures": [architecture], **HEADS, **TINY[architecture]}
    (directory / "config.json").write_text(json.dumps(config))
    return build(
        EngineConfig(
            model=str(directory),
            device="cpu",
            dtype="float32",
            kernels="reference",
            load_format="dummy",
            block_size=16,
            kv_cache_memory_bytes=4 << 20,
        )
    )


def plan_of(spans: Spans) -> StepPlan:
    """A step with these lengths, every request sampled greedily."""
    chunks, block = [], 0
    for index, (new, visible) in enumerate(zip(spans.new, spans.visible)):
        count = -(-visible // 16)
        sampling = Sampling(SamplingParams(temperature=0), 0, visible, [1] * visible, visible)
        chunks.append(Chunk(str(index), [1] * new, visible - new, range(block, block + count), sampling))
        block += count
    return StepPlan(0, tuple(chunks))


class Recorder:
    """The ops of a step in order, with the shapes and dtypes of what they receive."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not kwargs
        self.seen.append((op.name, *map(shape_of, args)))

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        several = result if isinstance(result, tuple) else (result,)
        self.seen[-1] += ("->", *map(shape_of, several))


def shape_of(value: Any) -> Any:
    """What cost may look at. Pages differ in the number of blocks, which is not a step's business."""
    if isinstance(value, Weight):
        return (value.out_features, value.in_features, value.format, value.dtype)
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape[1:] if value.dim() == 4 else value.shape), value.dtype)
    return value


@pytest.mark.parametrize("architecture", TINY)
def test_cpu_and_meta_run_the_same_ops(architecture: str, tmp_path: Path) -> None:
    """Names, shapes, dtypes and plain values of every op of a step, in order; and so the same cost."""
    built = tiny(architecture, tmp_path)
    for spans in SPANS:
        real, shadow, meter = Recorder(), Recorder(), Meter()
        plan = plan_of(spans)
        built.runner.run(plan, Ops({}, real))
        built.price.trace(spans, len(spans.new), True, Ops({}, shadow), plan.kind)
        assert real.seen == shadow.seen
        built.runner.run(plan, Ops({}, meter))
        assert meter.calls == built.price.meter(spans, len(spans.new)).calls
        assert set(meter.by_op()) <= set(REGISTRY)
        assert sum(cost.flops for cost in meter.by_kind().values()) == pytest.approx(meter.total.flops)


def test_price_of_a_cached_step_is_quick() -> None:
    """Llama-3.1-8B, 64 requests: a Python loop over requests, no forward pass."""
    one = price("llama-3.1-8b")
    spans = Spans((1,) * 64, tuple(range(100, 6500, 100)))
    one.step(spans, 64)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(20):
            one.step(spans, 64)
        best = min(best, (time.perf_counter() - start) / 20)
    print(f"Price.step: {best * 1e6:.1f} us")
    assert best < 100e-6
