"""The Timer sees the ops that the Meter counts, in order, with times."""

from __future__ import annotations

import torch

from ridgeline.core.step import Spans
from ridgeline.models import build_model, parse_config
from ridgeline.models.batch import Batch
from ridgeline.ops import Ops
from ridgeline.perf.limit import LimitCurve, OwnProduct, measure_curve
from ridgeline.perf.price import Price
from ridgeline.perf.timer import Timer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_the_timers_ops_are_the_meters() -> None:
    spec = parse_config(CONFIG)
    model = build_model(spec, torch.device("cpu"), torch.float32, 64)
    model.store.fill_random()
    pages = [torch.zeros(4, 2, 16, 8) for _ in range(2)]
    batch = Batch(
        spans=Spans((3,), (3,)),
        kind="prefill",
        ids=torch.tensor([1, 2, 3]),
        positions=torch.arange(3),
        slots=torch.arange(3),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        query_starts=torch.tensor([0, 3], dtype=torch.int32),
        lengths=torch.tensor([3], dtype=torch.int32),
        rows=None,
    )
    timer = Timer(torch.device("cpu"))
    model.forward(batch, pages, [page.clone() for page in pages], Ops({}, timer))
    calls = timer.take()
    shadow = build_model(spec, torch.device("meta"), torch.float32, 64)
    meter = Price(shadow, 16, torch.float32).meter(Spans((3,), (3,)), 3)
    counted = [(name, cost.flops, cost.bytes) for name, cost in meter.calls]
    assert [(one.op, one.cost.flops, one.cost.bytes) for one in calls] == counted[:-2]  # head and sampling follow
    assert all(one.seconds > 0 for one in calls)
    assert timer.take() == []


def test_the_curve_never_rises_with_the_size() -> None:
    curve = measure_curve(torch.device("cpu"), torch.float32)
    rates = [rate for _, rate in curve.points]
    assert rates == sorted(rates, reverse=True)
    assert curve.bytes_per_s(1) == rates[0]
    assert curve.bytes_per_s(1e15) == curve.dram_bytes_per_s == rates[-1]


def test_limits_take_the_better_measurement() -> None:
    one = LimitCurve("cpu", ((1024, 10.0), (4096, 5.0)), 100.0)
    two = LimitCurve("cpu", ((1024, 8.0), (4096, 6.0)), 120.0)
    assert one.better(two) == LimitCurve("cpu", ((1024, 10.0), (4096, 6.0)), 120.0)
    assert one.bytes_per_s(2000) == 10.0


def test_an_own_product_can_set_the_rate() -> None:
    asked: list[tuple[int, ...]] = []

    def linear(x: torch.Tensor, weight: object) -> torch.Tensor:
        asked.append(tuple(x.shape))
        return x

    fast = measure_curve(torch.device("cpu"), torch.float32, OwnProduct(linear, False))  # type: ignore[arg-type]
    assert asked
    assert fast.flops_per_s > 1e12  # it computes nothing
