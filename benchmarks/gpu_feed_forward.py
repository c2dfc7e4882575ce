"""The feed-forward networks on a GPU: one launch beside cuBLAS and a gate, and the mixture at every tile height.

Times are the GPU's own: calls captured in a CUDA graph whose weights together exceed the L2 cache, medians of
its replays. The first table is what `product_for` in kernels/triton/mlp.py was chosen from, the second judges ROWS in
kernels/triton/moe.py: `auto` is the height that the kernel takes by itself.

    PYTHONPATH=src python3 -m benchmarks.gpu_feed_forward --out $OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.record import Interval, Record, interval, parser
from ridgeline.kernels.triton import mlp, moe
from ridgeline.kernels.triton.mlp import Product
from ridgeline.ops.weight import Weight

L2_BYTES = 60 << 20
DENSE = {
    "Qwen3-0.6B": (1024, 3072),
    "Llama-3.2-1B": (2048, 8192),
    "Qwen3-4B": (2560, 9728),
    "Llama-2-7B": (4096, 11008),
    "Llama-3.1-8B": (4096, 14336),
    "Llama-2-13B": (5120, 13824),
    "Llama-3.1-70B": (8192, 28672),
}
"""Width and inner width."""

TOKENS = (1, 8, 16, 32, 64, 256, 2048)
CANDIDATES = (
    Product(16, 32, 256, 4, 3),
    Product(16, 64, 128, 4, 3),
    Product(32, 32, 256, 4, 3),
    Product(32, 64, 128, 4, 3),
    Product(32, 64, 64, 4, 6),
    Product(64, 64, 64, 4, 4),
    Product(64, 64, 64, 4, 6),
    Product(64, 64, 128, 8, 4),
)


class Mixture(NamedTuple):
    width: int
    inner: int
    experts: int
    top_k: int


MIXTURES = {"Mixtral-8x7B": Mixture(4096, 14336, 8, 2), "Qwen3-30B-A3B": Mixture(2048, 768, 128, 8)}
MIXED_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    record = Record("gpu-feed-forward", options)
    record.settings = {"dtype": "bfloat16", "weights": "random", "replays": options.rounds}
    shapes, mixtures = DENSE, MIXTURES
    if options.quick:
        shapes, mixtures = {"tiny": (256, 512)}, {"tiny": Mixture(256, 128, 4, 2)}
    torch.manual_seed(0)
    with torch.inference_mode():
        dense(record, shapes)
        mixed(record, mixtures)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    return parser(__doc__ or "", rounds=7)


def dense(record: Record, shapes: dict[str, tuple[int, int]]) -> None:
    rows = []
    for name, (width, inner) in shapes.items():
        size = 4 * width * inner
        weights = [Weight.dense_from(random(2 * inner, width)) for _ in range(4 * L2_BYTES // size + 1)]
        for tokens in TOKENS:
            x = random(tokens, width, scale=1.0)
            with patch.object(mlp, "product_for", lambda *_: None):
                library = timed(
                    record,
                    f"{name}, {tokens}, cuBLAS",
                    partial(each, mlp.gated_linear_triton, x, weights),
                    len(weights),
                )
            fused = {}
            for product in CANDIDATES:
                if product.rows >= tokens and product.rows <= max(16, 4 * tokens):
                    call = partial(mlp._fused, activation="silu", product=product)
                    label = f"{name}, {tokens}, {tuple(product)}"
                    fused[product] = timed(record, label, partial(each, call, x, weights), len(weights))
            auto = timed(
                record, f"{name}, {tokens}, auto", partial(each, mlp.gated_linear_triton, x, weights), len(weights)
            )
            rows.append(
                [
                    f"{name}, {tokens}",
                    library.show(".1f", "", 1e6),
                    auto.show(".1f", "", 1e6),
                    f"{size / auto.median / 1e12:.2f}",
                    f"{library.median / auto.median:.3f}×",
                    "; ".join(
                        f"{1e6 * fused[one].median:.1f} {tuple(one)}" for one in sorted(fused, key=fused.get)[:3]
                    ),
                ]
            )
    title = "gated_linear, µs by model and tokens"
    record.table(title, ["model, tokens", "cuBLAS and gate", "auto", "TB/s", "÷ auto", "best candidates"], rows)


def mixed(record: Record, mixtures: dict[str, Mixture]) -> None:
    rows = []
    for name, shape in mixtures.items():
        gate_up = random(shape.experts, 2 * shape.inner, shape.width)
        down = random(shape.experts, shape.width, shape.inner)
        router = random(shape.experts, shape.width, scale=1.0)
        for tokens in MIXED_TOKENS:
            xs = [random(tokens, shape.width, scale=1.0) for _ in range(4)]
            chosen = tokens * shape.top_k
            call = partial(each_batch, xs, router, gate_up, down, shape.top_k)
            times = {}
            for height in moe.ROWS:
                if height == 16 or height * shape.experts <= 8 * chosen:
                    with patch.object(moe, "ROWS", (height,)):
                        times[height] = timed(record, f"{name}, {tokens}, height {height}", call, len(xs))
            auto = timed(record, f"{name}, {tokens}, auto", call, len(xs))
            taken = next((one for one in moe.ROWS if one * shape.experts >= 2 * chosen), moe.ROWS[-1])
            rows.append(
                [
                    f"{name}, {tokens}",
                    auto.show(".1f", "", 1e6),
                    f"{6 * chosen * shape.width * shape.inner / auto.median / 1e12:.0f}",
                    str(taken),
                    "; ".join(f"{height}: {1e6 * one.median:.1f}" for height, one in times.items()),
                ]
            )
    record.table(
        "moe, µs by model and tokens",
        ["model, tokens", "auto", "TFLOP/s", "height", "µs by height"],
        rows,
    )


def random(*shape: int, scale: float | None = None) -> torch.Tensor:
    spread = shape[-1] ** -0.5 if scale is None else scale
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_(0.0, spread)


def each(call: Callable[..., torch.Tensor], x: torch.Tensor, weights: Sequence[Weight]) -> None:
    for weight in weights:
        call(x, weight)


def each_batch(xs: Sequence[torch.Tensor], *weights_and_top_k: Any) -> None:
    for x in xs:
        moe.moe_triton(x, *weights_and_top_k, renormalize=True)


def timed(record: Record, label: str, call: Callable[[], None], calls: int) -> Interval:
    """Seconds of one of the `calls` in call()."""
    call()  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    taken = []
    for _ in range(record.options.rounds):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        taken.append(before.elapsed_time(after) / 1000 / calls)
    record.timings[label] = [round(one, 9) for one in taken]
    return interval(taken)


if __name__ == "__main__":
    main()
