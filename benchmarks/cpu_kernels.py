"""`linear` on the CPU against torch and against the memory: GB/s and GFLOP/s by rows, shape and dtype.

The limit is the best rate at which anything here reads 1 GiB (a torch sum, a torch copy, this kernel's own
stream). Small matrices live in caches and go above it. As memory is not equally fast everywhere, nor at all
times, one row also stands beside a torch sum over the same weights. Every figure is the best of several
bursts; ours and torch's alternate, so that a busy neighbour hits both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.kernels.cpu.linear import linear_cpu
from ridgeline.kernels.cpu.pack import on_huge_pages, pack
from ridgeline.ops.weight import Weight

GIB = 1 << 30
SHAPES = ((640, 256), (1024, 256), (3072, 1024), (1024, 3072), (151936, 1024))
"""(out_features, in_features): the embedded model's sizes, Qwen3-0.6B's MLP and its output projection."""

ROWS = (1, 2, 4, 8, 32, 128, 512)


def best_of(calls: Sequence[Callable[[], Any]], budget_s: float, least: int = 5) -> list[float]:
    """Best seconds of each call, in bursts that alternate until the budget is spent.

    Bursts with a pause between them, because torch's threads go on spinning for a while after each
    parallel region and would take a processor from whoever comes next.
    """
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    end, rounds = time.perf_counter() + budget_s * len(calls), 0
    while rounds < 3 or time.perf_counter() < end:
        for index, call in enumerate(calls):
            time.sleep(0.01)
            burst, until = 0, time.perf_counter() + budget_s / 8
            while burst < least or time.perf_counter() < until:
                begin = time.perf_counter()
                call()
                best[index] = min(best[index], time.perf_counter() - begin)
                burst += 1
        rounds += 1
    return best


def read_limit(budget_s: float) -> dict[str, float]:
    """GB/s of several ways to read 1 GiB."""
    data = on_huge_pages(torch.empty(GIB // 4)).fill_(0.5)
    target = on_huge_pages(torch.empty_like(data)).fill_(0.5)
    weight = Weight(data.view(-1, 1024, 64), data.numel() // 1024, 1024, "panels")
    x = torch.ones(1, 1024)
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "torch sum": (data.sum, GIB),
        "torch copy (reads and writes)": (lambda: target.copy_(data), 2 * GIB),
        "linear, 1 row": (lambda: linear_cpu(x, weight), GIB),
    }
    times = best_of([call for call, _ in ways.values()], budget_s)
    return {name: moved / seconds / 1e9 for (name, (_, moved)), seconds in zip(ways.items(), times)}


def measure(
    outputs: int, inputs: int, dtype: torch.dtype, rows: Sequence[int], budget_s: float
) -> list[dict[str, Any]]:
    dense = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    weight = pack(Weight.dense_from(dense))
    found = []
    stream = weight.data.view(torch.float32)
    for count in rows:
        x = torch.randn(count, inputs).to(dtype)
        arms: list[Callable[[], Any]] = [lambda x=x: linear_cpu(x, weight), lambda x=x: F.linear(x, dense)]  # type: ignore[misc]
        if count == 1:
            arms.append(stream.sum)
        ours, theirs, *summed = best_of(arms, budget_s)
        flops = 2 * count * outputs * inputs
        found.append(
            {
                "out_features": outputs,
                "in_features": inputs,
                "dtype": str(dtype).removeprefix("torch."),
                "rows": count,
                "seconds": ours,
                "torch_seconds": theirs,
                "sum_seconds": summed[0] if summed else None,
                "GB/s": weight.nbytes / ours / 1e9,
                "GFLOP/s": flops / ours / 1e9,
                "torch_GFLOP/s": flops / theirs / 1e9,
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", metavar="PATH", help="write everything there")
    options.add_argument("--threads", type=int, help="as torch.set_num_threads")
    options.add_argument("--budget", type=float, default=0.5, metavar="S", help="seconds a figure")
    options.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    limits = read_limit(4 * given.budget)
    limit = max(limits.values())
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("reading 1 GiB:", ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in limits.items()))
    heads = f"{'dtype':9} {'out x in':>13} {'rows':>5} {'us':>10} {'GB/s':>7} {'of limit':>8}"
    print(f"{heads} {'GFLOP/s':>8} {'torch':>8} {'ratio':>6}")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in SHAPES:
            for one in measure(outputs, inputs, dtype, given.rows, given.budget):
                results.append(one)
                print(
                    f"{one['dtype']:9} {outputs:>6} x {inputs:<4} {one['rows']:>5} {one['seconds'] * 1e6:>10.1f} "
                    f"{one['GB/s']:>7.1f} {one['GB/s'] / limit:>8.0%} {one['GFLOP/s']:>8.1f} "
                    f"{one['torch_GFLOP/s']:>8.1f} {one['torch_seconds'] / one['seconds']:>6.2f}"
                    + (f"  {one['sum_seconds'] / one['seconds']:.2f} x a torch sum" if one["sum_seconds"] else "")
                )
    record = {
        "machine": platform.platform(),
        "torch": torch.__version__,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "read_GB/s": limits,
        "linear": results,
    }
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    return record


if __name__ == "__main__":
    main()
