"""Ask what a step costs before running it: the forward pass on meta tensors is the performance model."""

from ridgeline import LLM
from ridgeline.core.step import Spans

with LLM() as llm:
    price = llm.built.price
    for name, spans, rows in (
        ("prefill of 512 tokens", Spans((512,), (512,)), 1),
        ("decode of one request at 512", Spans((1,), (512,)), 1),
        ("decode of 64 requests at 512", Spans((1,) * 64, (512,) * 64), 64),
    ):
        cost = price.step(spans, rows)
        intensity = cost.flops / cost.bytes
        print(f"{name:30} {cost.flops / 1e9:7.2f} GFLOP {cost.bytes / 1e6:7.1f} MB {intensity:6.1f} FLOP/byte")
        for op, part in price.meter(spans, rows).by_op().items():
            print(f"    {op:16} {part.flops / 1e9:7.2f} GFLOP {part.bytes / 1e6:7.1f} MB")
