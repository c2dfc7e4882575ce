"""Matrix products of one and of few tokens on a GPU: tiles of `linear` and `gated_linear` beside cuBLAS.

Each cell is a CUDA graph of calls over different weights, together far more than the L2 cache; its time is that of
a call, and its rate the weight's bytes over that. The second table is `linear` for 2 to 32 tokens: the plans of
kernels/cuda/linear.py. The last one is a step's products in a row, all layers and the output projection, for some
numbers of tokens. What kernels/triton/linear.py and mlp.py have as their tiles was chosen from these tables.

    PYTHONPATH=src python3 -m benchmarks.gpu_linear --out $OUT
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.record import Record, interval, parser
from ridgeline.kernels.cuda import linear as few_tokens
from ridgeline.kernels.cuda import nvrtc
from ridgeline.kernels.cuda.instances import SPILLS
from ridgeline.kernels.cuda.linear import Plan, eights_of, few, linear_cuda
from ridgeline.kernels.cuda.split import machine
from ridgeline.kernels.triton import linear, mlp
from ridgeline.ops.weight import Weight


class Shape(NamedTuple):
    """A product's outputs and inputs; gated: of both halves together."""

    outputs: int
    inputs: int
    gated: bool = False

    @property
    def nbytes(self) -> int:
        return 2 * self.outputs * self.inputs


LLAMA_8B = {
    "qkv": Shape(6144, 4096),
    "out": Shape(4096, 4096),
    "gate_up": Shape(28672, 4096, True),
    "down": Shape(4096, 14336),
    "head": Shape(128256, 4096),
}
LAYERS = 32
ONE = (
    (1, 512, 8), (1, 1024, 4), (1, 1024, 8), (1, 2048, 4), (1, 2048, 8), (1, 4096, 4), (1, 4096, 8), (2, 1024, 4),
    (2, 1024, 8), (2, 2048, 4), (2, 2048, 8), (2, 4096, 8), (4, 1024, 8),
)  # fmt: skip
"""Rows, inputs a step, warps."""
FEW = (
    Plan(32, 8, 4, True, 2), Plan(32, 8, 4, True, 2, early=True), Plan(32, 8, 4, True, 2, split=2),
    Plan(32, 4, 8, True, 2), Plan(32, 8, 8, True, 1), Plan(32, 8, 2, True, 3), Plan(32, 8, 4, True, 1),
    Plan(16, 8, 8, True, 2), Plan(16, 4, 8, True, 4), Plan(64, 4, 4, True, 2), Plan(64, 4, 4, True, 2, early=True),
    Plan(64, 4, 4, True, 2, split=4), Plan(64, 8, 2, True, 2), Plan(64, 8, 4, True, 1),
    Plan(32, 8, 4, False, 2), Plan(32, 4, 4, False, 4), Plan(32, 16, 4, False, 1), Plan(32, 8, 4, False, 1),
    Plan(16, 8, 8, False, 2), Plan(64, 4, 2, False, 3), Plan(64, 4, 2, False, 2), Plan(64, 8, 2, False, 1),
    Plan(64, 4, 4, False, 2), Plan(32, 8, 2, False, 2),
)  # fmt: skip
"""Plans of `linear` for few tokens; those that spill or do not fit are passed over."""
REGISTERS = Plan(32, 8, 4, False, 2)
REPEATS = 15
SPAN_BYTES = 600 << 20


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=1)
    result.add_argument("--workers", type=int, default=14, help="processes that compile")
    result.add_argument("--few", type=int, nargs="*", default=[2, 4, 8, 16, 32], help="tokens of the second table")
    result.add_argument("--only-few", action="store_true", help="leave the first table out")
    result.add_argument(
        "--chain", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="tokens of the last table"
    )
    return result


def measure(options: argparse.Namespace) -> Record:
    record = Record("gpu-linear", options)
    if not options.only_few:
        one_token(record, options.workers)
    if options.few:
        few_table(record, options.few, options.workers)
    chain(record, options.chain)
    return record


def one_token(record: Record, workers: int) -> None:
    jobs = [(shape, tile) for shape in LLAMA_8B.values() for tile in ONE]
    began = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(compile_one, jobs, chunksize=1):
            pass
    record.summary["compile_s"] = round(time.perf_counter() - began, 1)
    rows = []
    for name, shape in LLAMA_8B.items():
        found = cell(shape)
        record.summary[name] = found
        shown = [*sorted(set(found) - {"cuBLAS"}, key=lambda one: found[one])[:6], "cuBLAS"]
        rows += [[name, one, f"{1e6 * found[one]:.1f}", f"{shape.nbytes / found[one] / 1e12:.2f}"] for one in shown]
    record.table("One token", ["product", "rows, inputs, warps", "µs", "TB/s"], rows)


def few_table(record: Record, tokens: Sequence[int], workers: int) -> None:
    """`linear` for few tokens: the best plans of each product beside the one that serves and cuBLAS."""
    usable = usable_plans({eights_of(count) for count in tokens}, workers)
    rows = []
    for name, shape in LLAMA_8B.items():
        if shape.gated:
            continue
        weights = weights_of(shape)
        for count in tokens:
            found = few_cell(weights, count, usable[eights_of(count)])
            record.summary[f"{name}, {count} tokens"] = found
            best = sorted(set(found) - {"cuBLAS", "serves"}, key=lambda one: found[one])[:5]
            rows += [
                [name, str(count), one, f"{1e6 * found[one]:.1f}", f"{shape.nbytes / found[one] / 1e12:.2f}"]
                for one in ("cuBLAS", "serves", *best)
            ]
        del weights
    record.table("Few tokens", ["product", "tokens", "plan", "µs", "TB/s"], rows)


def usable_plans(eights: set[int], workers: int) -> dict[int, list[Plan]]:
    """Plans that fit this GPU and spill nothing, compiled, by eights of tokens."""
    gpu, arch = machine(torch.cuda.current_device()), nvrtc.architecture(torch.cuda.current_device())
    jobs = [(one, plan) for one in sorted(eights) for plan in FEW if gpu.holds(plan.shared_bytes(one), plan.blocks)]

    def spilled(job: tuple[int, Plan]) -> int:
        one, plan = job
        log = nvrtc.compile(few_tokens.FILE, {"BF16": 1, **plan.defines(one)}, arch).log
        return max(map(int, SPILLS.findall(log)), default=0)

    with ThreadPoolExecutor(workers) as pool:
        spills = list(pool.map(spilled, jobs))
    return {
        one: [plan for (number, plan), bytes_ in zip(jobs, spills) if number == one and not bytes_] for one in eights
    }


def label(plan: Plan) -> str:
    """Rows, warps, steps under way and where, blocks an SM, and what else is not as usual."""
    parts = [f"{plan.rows} rows {plan.warps} warps {plan.depth} {'ring' if plan.ring else 'registers'} x{plan.blocks}"]
    return " ".join([*parts, *(["early"] if plan.early else []), *([f"split {plan.split}"] if plan.split else [])])


def few_cell(weights: Sequence[Weight], tokens: int, plans: Sequence[Plan]) -> dict[str, float]:
    """Seconds of a call by plan."""
    x = torch.randn(tokens, weights[0].in_features, device="cuda", dtype=torch.bfloat16)
    ways: dict[str, Callable[[torch.Tensor, Weight], torch.Tensor]] = {"cuBLAS": cublas, "serves": linear_cuda}
    ways |= {label(plan): partial(few, plan) for plan in plans}
    return {
        name: replayed(lambda way=way: [way(x, weight) for weight in weights]) / len(weights)
        for name, way in ways.items()
    }


def weights_of(shape: Shape) -> list[Weight]:
    """Different weights of a shape, together far more than the L2 cache."""
    return [
        Weight.dense_from(torch.randn(shape.outputs, shape.inputs, device="cuda", dtype=torch.bfloat16))
        for _ in range(max(4, SPAN_BYTES // shape.nbytes))
    ]


@contextmanager
def tiled(tile: tuple[int, int, int]) -> Iterator[None]:
    """Make a tile the one that serves."""
    rows = linear.Rows(*tile)
    with (
        patch.object(linear, "ONE", rows),
        patch.object(linear, "ONE_WIDE", rows),
        patch.object(mlp, "ONE", mlp.Rows(*tile)),
    ):
        yield


def call_of(shape: Shape) -> Callable[[torch.Tensor, Weight], torch.Tensor]:
    return mlp.gated_linear_triton if shape.gated else linear.linear_triton


def gated_library(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """cuBLAS, and torch's own gate behind it."""
    gate_up = F.linear(x, weight.data)
    gates, ups = gate_up.chunk(2, dim=-1)
    return F.silu(gates) * ups


def compile_one(job: tuple[Shape, tuple[int, int, int]]) -> None:
    """In a process of its own; the compiler keeps what it made where this one finds it."""
    shape, tile = job
    x = torch.zeros(1, shape.inputs, device="cuda", dtype=torch.bfloat16)
    weight = Weight.dense_from(torch.zeros(shape.outputs, shape.inputs, device="cuda", dtype=torch.bfloat16))
    with tiled(tile):
        call_of(shape)(x, weight)


def cell(shape: Shape) -> dict[str, float]:
    """Seconds of a call by tile."""
    weights = weights_of(shape)
    x = torch.randn(1, shape.inputs, device="cuda", dtype=torch.bfloat16)

    def timed(call: Callable[[torch.Tensor, Weight], torch.Tensor]) -> float:
        return replayed(lambda: [call(x, weight) for weight in weights]) / len(weights)

    found = {}
    for tile in ONE:
        with tiled(tile):
            found[str(tile)] = timed(call_of(shape))
    return {**found, "cuBLAS": timed(gated_library if shape.gated else cublas)}


def cublas(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return F.linear(x, weight.data)


def replayed(work: Callable[[], Any]) -> float:
    """Seconds of one replay of the work's graph, median."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    del kept
    return interval(times).median


def chain(record: Record, tokens: Sequence[int]) -> None:
    """All products of a step in a row, each fed by the one before."""
    layers = [
        {
            name: Weight.dense_from(torch.randn(shape.outputs, shape.inputs, device="cuda", dtype=torch.bfloat16))
            for name, shape in LLAMA_8B.items()
            if name != "head"
        }
        for _ in range(LAYERS)
    ]
    shape = LLAMA_8B["head"]
    head = Weight.dense_from(torch.randn(shape.outputs, shape.inputs, device="cuda", dtype=torch.bfloat16))
    nbytes = LAYERS * sum(one.nbytes for name, one in LLAMA_8B.items() if name != "head") + shape.nbytes
    rows = []
    for count in tokens:
        times = products(count, layers, head)
        record.summary[f"a step's products, {count} tokens"] = times
        rows += [[str(count), name, f"{1e3 * s:.3f}", f"{nbytes / s / 1e12:.2f}"] for name, s in times.items()]
    record.table("A step's products", ["tokens", "way", "ms", "TB/s"], rows)


def products(tokens: int, layers: Sequence[dict[str, Weight]], head: Weight) -> dict[str, float]:
    """Seconds of a step's products, several ways; `cuda` differs from `triton` for 2 to 32 tokens alone."""
    x = torch.randn(tokens, head.in_features, device="cuda", dtype=torch.bfloat16)

    def step(product: Callable[..., torch.Tensor], gated: Callable[..., torch.Tensor]) -> torch.Tensor:
        y = x
        for layer in layers:
            y = product(product(y, layer["qkv"])[:, : head.in_features], layer["out"])
            y = product(gated(y, layer["gate_up"]), layer["down"])
        return product(y, head)

    triton = partial(step, linear.linear_triton, mlp.gated_linear_triton)
    times = {"cuBLAS": replayed(partial(step, cublas, gated_library)), "triton": replayed(triton)}
    alone = {"EARLY": False}
    with patch.object(linear, "dependent", lambda _: alone), patch.object(mlp, "dependent", lambda _: alone):
        times["triton, each after the other"] = replayed(triton)
    if few_tokens.FEWEST <= tokens <= few_tokens.MOST:
        serves = few_tokens.FEW
        early = replace(serves, early=True)
        for name, plan in (("cuda", serves), ("cuda, next at the start", early), ("cuda, registers", REGISTERS)):
            with patch.object(few_tokens, "FEW", plan):
                times[name] = replayed(partial(step, linear_cuda, mlp.gated_linear_triton))
    return times


if __name__ == "__main__":
    main()
