"""Products in fixed tiles on a GPU, which serve a batch-invariant engine: each tile's time beside cuBLAS, and its bits.

Llama-3.1-8B's weights, bf16, random, in graphs of calls over different weights that are together far more than the L2
cache. A tile may serve at one number of tokens and another one elsewhere only if both give the same bits; so every
tile's result is compared with that of the tile that serves (kernels/triton/product.py), row by row, also with cuBLAS'.

    PYTHONPATH=src python3 -m benchmarks.gpu_product --out $OUT
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.gpu_linear import LLAMA_8B, Shape, replayed
from benchmarks.record import Record, parser
from ridgeline.kernels.triton import product as kernels
from ridgeline.kernels.triton.product import Tile
from ridgeline.ops.weight import Weight

SPAN_BYTES = 300 << 20


class Cut(NamedTuple):
    """Rows of a tile, and the rest of it."""

    rows: int
    tile: Tile


CUTS = (
    Cut(64, Tile(32, 128, 4, 5)),
    Cut(64, Tile(64, 64, 4, 6)),
    Cut(64, Tile(64, 128, 4, 3)),
    Cut(64, Tile(64, 128, 4, 4)),
    Cut(64, Tile(128, 64, 4, 4)),
    Cut(64, Tile(128, 128, 4, 3)),
    Cut(64, Tile(256, 64, 4, 3)),
    Cut(128, Tile(64, 64, 4, 4)),
    Cut(128, Tile(128, 64, 8, 4)),
    Cut(128, Tile(256, 64, 8, 3)),
    Cut(16, Tile(64, 128, 4, 4)),
    Cut(32, Tile(64, 128, 4, 4)),
)


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=1)
    result.add_argument("--workers", type=int, default=14, help="processes that compile")
    result.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256, 2048])
    result.add_argument("--products", nargs="+", default=list(LLAMA_8B), choices=list(LLAMA_8B))
    return result


def measure(options: argparse.Namespace) -> Record:
    record = Record("gpu-product", options)
    jobs = [(LLAMA_8B[name], cut) for name in options.products for cut in CUTS]
    began = time.perf_counter()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(compile_one, jobs, chunksize=1):
            pass
    record.summary["compile_s"] = round(time.perf_counter() - began, 1)
    rows = []
    for name in options.products:
        found = cell(LLAMA_8B[name], options.tokens)
        record.summary[name] = found
        rows += [
            [name, cut, *(f"{1e6 * one['seconds']:.1f}{'' if one['same'] else ' *'}" for one in by_tokens.values())]
            for cut, by_tokens in found.items()
        ]
        record.observe(name)
    columns = ["product", "rows, columns, inputs, warps, stages", *(f"{count} tokens" for count in options.tokens)]
    record.table("µs; *: other bits than the tile that serves", columns, rows)
    return record


@contextmanager
def cut_so(cut: Cut | None) -> Iterator[None]:
    """Make a tile the one that serves; None leaves the table's."""
    if cut is None:
        yield
        return
    tiles = {2: cut.tile}
    with (
        patch.object(kernels, "ROWS", cut.rows),
        patch.object(kernels, "WIDE", tiles),
        patch.object(kernels, "NARROW", tiles),
    ):
        yield


def compile_one(job: tuple[Shape, Cut]) -> None:
    """In a process of its own; the compiler keeps what it made where this one finds it."""
    shape, cut = job
    weight = Weight.dense_from(torch.zeros(shape.outputs, shape.inputs, device="cuda", dtype=torch.bfloat16))
    with cut_so(cut):
        kernels.product(torch.zeros(1, shape.inputs, device="cuda", dtype=torch.bfloat16), weight)


def cell(shape: Shape, counts: Sequence[int]) -> dict[str, dict[str, dict[str, float | bool]]]:
    """By tile and number of tokens: seconds of a call, and whether every row has the bits of the tile that serves."""
    copies = max(2, SPAN_BYTES // shape.nbytes)
    weights = [
        Weight.dense_from(torch.randn(shape.outputs, shape.inputs, device="cuda", dtype=torch.bfloat16))
        for _ in range(copies)
    ]
    x = torch.randn(max(counts), shape.inputs, device="cuda", dtype=torch.bfloat16)
    expected = kernels.product(x, weights[0])
    found: dict[str, dict[str, dict[str, float | bool]]] = {}
    for cut in (None, *CUTS):
        name = "the table's" if cut is None else f"{cut.rows}, {', '.join(map(str, cut.tile))}"
        with cut_so(cut):
            for count in counts:
                same = torch.equal(kernels.product(x[:count], weights[0]), expected[:count])
                taken = replayed(lambda count=count: [kernels.product(x[:count], one) for one in weights])
                found.setdefault(name, {})[str(count)] = {"seconds": taken / copies, "same": same}
    for count in counts:
        same = torch.equal(F.linear(x[:count], weights[0].data), expected[:count])
        taken = replayed(lambda count=count: [F.linear(x[:count], one.data) for one in weights])
        found.setdefault("cuBLAS", {})[str(count)] = {"seconds": taken / copies, "same": same}
    return found


if __name__ == "__main__":
    main()
