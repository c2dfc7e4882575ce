"""Prefill attention, `sm90` beside FlashAttention-3, cuDNN and FlashAttention-2, pair by pair.

The FlashAttention papers' grid (16k tokens a call, 2048 columns of heads: head dim 64, 128, 256; sequences of 512 to
16k; full and causal) and two shapes with shared KV heads. Every side runs as a CUDA graph of a few calls; the sides
take turns in one process, in an order that turns around each round, and each round gives one ratio to every peer. A
peer that is 30 % behind the best one after three rounds runs no further. --variants adds sides of our own: heads dealt
in smaller sections, and tiles finished before the next one's queries are waited for. FlashAttention-3 needs its
library: --fa3 names one built for torch as `_vllm_fa3_C` (variable lengths only); without it the column is missing, and
the result says so.

    PYTHONPATH=src python3 -m benchmarks.attention_prefill --fa3 _vllm_fa3_C.abi3.so
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_baseline import Clocks
from benchmarks.record import Record, interval, losing, parser, ratios
from ridgeline.core.step import Spans
from ridgeline.kernels.cuda import attention_sm90 as kernels
from ridgeline.kernels.cuda.attention_sm90 import Sections, attention_sm90
from ridgeline.study.attention.peers import fa3_arguments

TOKENS, COLUMNS = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SHARED = ((32, 8), (64, 8))  # query and KV heads of head dim 128
SHORT = 2048  # keys up to which the first line of the issue counts
TRIED, BEHIND = 3, 1.3
STRETCH_S = 4e-4  # of one timed graph, at least
VARIANTS = {"sections-8": Sections(8, 8), "sections-16": Sections(16, 16), "flush": None}
"""Megabytes of the sections that heads are dealt in; None: tiles finished early, where there is room for the queries of
one alone."""


def main() -> None:
    options = arguments().parse_args()
    record = Record("attention-prefill", options)
    lengths = LENGTHS[:1] if options.quick else options.lengths
    record.settings = {"tokens": TOKENS, "dtype": "bf16", "stretch_s": STRETCH_S, "graphs": "every side"}
    if options.fa3 is None:
        record.note("FlashAttention-3 was not there: no --fa3")
    else:
        torch.ops.load_library(str(options.fa3))
    shapes = [(COLUMNS // dim, COLUMNS // dim, dim) for dim in options.head_dims]
    shapes += [(*heads, 128) for heads in SHARED if 128 in options.head_dims]
    began = time.perf_counter()
    with Clocks(torch.device("cuda")) as clocks:
        for heads, kv_heads, dim in shapes:
            rows = []
            for length, causal in itertools.product(lengths, (False, True)):
                if time.perf_counter() - began > options.budget:
                    record.note(f"D{dim} {heads}/{kv_heads} S{length}: not run, the time was up")
                    continue
                clocks.mark(f"D{dim} {heads}/{kv_heads} S{length} {'causal' if causal else 'full'}")
                rows.append(cell(record, length, heads, kv_heads, dim, causal))
            record.table(
                f"Head dim {dim}, {heads}/{kv_heads} heads, {TOKENS} tokens: TFLOP/s; best peer's time over ours",
                ["case", "sm90", "fa3", "cudnn", "fa2", "ratio", *(f"sm90 over {one}" for one in options.variants)],
                rows,
            )
        clocks.mark("end")
        record.timings["clocks"] = clocks.samples()
    lines(record)
    record.close()


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=21)
    result.add_argument("--fa3", type=Path, help="FlashAttention-3's compiled library")
    result.add_argument("--variants", nargs="*", default=[], choices=list(VARIANTS), help="of sm90, beside it")
    result.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    result.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    result.add_argument("--budget", type=float, default=1e9, help="seconds after which no further cell is begun")
    return result


def cell(record: Record, length: int, heads: int, kv_heads: int, dim: int, causal: bool) -> list[str]:
    """Measure one cell; its row of the table."""
    torch.manual_seed(length + heads)
    name = f"D{dim} {heads}/{kv_heads} S{length} {'causal' if causal else 'full'}"
    sides = contestants(length, heads, kv_heads, dim, causal, record.options.fa3 is not None)
    variants = {one: call for one in record.options.variants if (call := variant(one, sides["sm90"], dim)) is not None}
    sides |= variants
    expected = sides["sm90"]().float()
    graphs = {}
    for side, call in sides.items():
        difference = (call().float() - expected).abs().max().item()
        assert difference < 0.05, f"{name}: {side} is {difference} away from sm90"
        graphs[side] = captured(call)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(-1, record.options.rounds):
        for side in list(graphs) if number % 2 else reversed(list(graphs)):
            taken = once(*graphs[side])
            if number >= 0:
                times[side].append(taken)
        if number + 1 == TRIED:
            peers = {side: median(times[side]) for side in graphs if side != "sm90" and side not in variants}
            for side, taken in peers.items():
                if taken > BEHIND * min(peers.values()):
                    del graphs[side]
    rivals = [side for side in graphs if side != "sm90" and side not in variants]
    best = min(rivals, key=lambda side: median(times[side]))
    ratio = ratios(times[best], times["sm90"])
    flops = 4 * TOKENS * length * heads * dim * (0.5 if causal else 1.0)
    rates = {side: flops / median(taken) / 1e12 for side, taken in times.items()}
    record.timings[name] = {side: [round(one, 8) for one in taken] for side, taken in times.items()}
    record.summary[name] = {
        "seconds": {side: interval(taken) for side, taken in times.items()},
        "tflops": {side: round(rate, 1) for side, rate in rates.items()},
        "best_peer": best,
        "ratio": ratio,
        "sm90_over_variants": {side: ratios(times["sm90"], times[side]) for side in variants},
    }
    del graphs, sides
    row = [f"S{length} {'causal' if causal else 'full'}"]
    row += [f"{rates[side]:.0f}" if side in rates else "-" for side in ("sm90", "fa3", "cudnn", "fa2")]
    row.append(losing(ratio.show(".3f"), ratio.median < 1))
    over = record.summary[name]["sm90_over_variants"]
    return [*row, *(over[one].show(".3f") if one in over else "-" for one in record.options.variants)]


def contestants(
    length: int, heads: int, kv_heads: int, dim: int, causal: bool, with_fa3: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """Every side's call on the same random numbers; all give [tokens, heads, dim]."""
    requests = TOKENS // length
    q, k, v = (
        torch.randn(TOKENS, count, dim, dtype=torch.bfloat16, device="cuda") for count in (heads, kv_heads, kv_heads)
    )
    starts = torch.arange(0, TOKENS + 1, length, dtype=torch.int32, device="cuda")
    lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
    spans, scale = Spans((length,) * requests, (length,) * requests), dim**-0.5
    dense = [part.view(requests, length, -1, dim).transpose(1, 2) for part in (q, k, v)]

    def ours() -> torch.Tensor:
        out = attention_sm90(q, k, v, None, starts, lengths, spans, scale, key_starts=starts, causal=causal)
        assert isinstance(out, torch.Tensor)
        return out

    def fused(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(*dense, is_causal=causal, enable_gqa=heads != kv_heads)
            return out.transpose(1, 2).reshape(TOKENS, heads, dim)

        return call

    fa3_call = fa3_arguments(q, k, v, starts, starts, None, length, length, None, scale, causal)

    def fa3() -> torch.Tensor:
        out: torch.Tensor = torch.ops._vllm_fa3_C.fwd(*fa3_call)[0]
        return out

    sides = {"sm90": ours}
    if with_fa3:
        sides["fa3"] = fa3
    return {**sides, "cudnn": fused(SDPBackend.CUDNN_ATTENTION), "fa2": fused(SDPBackend.FLASH_ATTENTION)}


def variant(name: str, call: Callable[[], torch.Tensor], dim: int) -> Callable[[], torch.Tensor] | None:
    """Our side with another order of tiles or another end of each; None where the variant does not exist."""
    sections = VARIANTS[name]
    if sections is not None:
        entries: list[tuple[Any, Any]] = [(kernels.SECTIONS, sections)]
    elif kernels.LONG[dim].query_stages == 1:
        entries = [(table, table[dim]._replace(flush=True)) for table in (kernels.SHORT, kernels.LONG)]
    else:
        return None

    def changed() -> torch.Tensor:
        with ExitStack() as stack:
            for table, entry in entries:
                stack.enter_context(patch.dict(table, {dim: entry}))
            return call()

    return changed


def captured(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of calls that together take at least STRETCH_S, and how many they are."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    calls = max(1, min(10, round(STRETCH_S / (begin.elapsed_time(end) / 1e3) + 0.5)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, calls


def once(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Seconds a call of one replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def lines(record: Record) -> None:
    """The lines of the issue."""
    cells = {name: found["ratio"] for name, found in record.summary.items()}
    lengths = {name: int(name.split(" S")[1].split()[0]) for name in cells}
    for words, least, chosen in (
        (f"S <= {SHORT}", 1.10, [name for name in cells if lengths[name] <= SHORT]),
        (f"S > {SHORT}", 1.00, [name for name in cells if lengths[name] > SHORT]),
        ("all cells", 1.05, list(cells)),
    ):
        if chosen:
            mean = geometric_mean([cells[name].median for name in chosen])
            record.target(
                f"prefill, {words}: geometric mean of best peer / sm90",
                f">= {least:.2f}x",
                f"{mean:.3f}x",
                mean >= least,
            )
    lost = sorted(name for name, ratio in cells.items() if ratio.median < 1)
    share = 1 - len(lost) / len(cells)
    record.target("prefill: cells at 1.00x or more", ">= 75 %", f"{100 * share:.0f} % of {len(cells)}", share >= 0.75)
    wholly = sorted(name for name, ratio in cells.items() if ratio.high < 0.97)
    record.target("prefill: cells wholly below 0.97x", "none", ", ".join(wholly) or "none", not wholly)
    record.note("losing cells: " + ("; ".join(f"{name} {cells[name].median:.3f}x" for name in lost) or "none"))


if __name__ == "__main__":
    main()
