"""What choosing a draft's children costs on a CPU beside the pass that they come from.

`propose` as its reference computes it and as the CPU's kernel does, `sample` of the same rows, and a pass of the
embedded draft model over as many requests, its own `propose` left out. Best of several bursts that alternate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cpu_kernels import best_of
from benchmarks.record import Record, parser, use_threads
from ridgeline import LLM
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan
from ridgeline.kernels.select import load_kernels
from ridgeline.models.checkpoint import embedded_model
from ridgeline.ops import REGISTRY
from ridgeline.run.prepare import prepare

LENGTH = 200
"""Tokens behind which the draft model is asked."""


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    use_threads(options.threads)
    torch.set_grad_enabled(False)
    load_kernels("cpu")
    record = Record("propose-cpu", options)
    budget_s = 0.02 if options.quick else 0.25
    record.settings = {"threads": options.threads, "tokens": options.tokens, "length": LENGTH, "budget_s": budget_s}
    found = []
    for rows, pass_s in passes(options, budget_s).items():
        for count in options.counts:
            found.append(
                {"rows": rows, "count": count, "pass_s": pass_s, **measure(rows, options.tokens, count, budget_s)}
            )
    record.summary = {"rows": found}
    record.table(
        "choosing children, us",
        ("rows", "children", "reference", "kernel", "sample", "draft pass", "reference of it", "kernel of it"),
        [
            (
                str(one["rows"]),
                str(one["count"]),
                *(f"{1e6 * one[name]:.0f}" for name in ("reference_s", "kernel_s", "sample_s", "pass_s")),
                *(f"{one[name] / one['pass_s']:.0%}" for name in ("reference_s", "kernel_s")),
            )
            for one in found
        ],
    )
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "")
    result.add_argument("--tokens", type=int, default=8192, help="of the vocabulary")
    result.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    result.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    return result


def measure(rows: int, tokens: int, count: int, budget_s: float) -> dict[str, float]:
    """Seconds of `propose`, both ways, and of `sample`, for warm rows."""
    logits = torch.randn(rows, tokens)
    heat, ones, longs = torch.full((rows,), 0.8), torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
    seeds = torch.arange(rows)
    propose, sample = REGISTRY["propose"], REGISTRY["sample"].kernels["cpu"].call
    calls: dict[str, Callable[[], Any]] = {
        "reference_s": lambda: propose.reference(logits, heat, seeds, seeds, False, count),
        "kernel_s": lambda: propose.kernels["cpu"].call(logits, heat, seeds, seeds, False, count),
        "sample_s": lambda: sample(logits, heat, longs, ones, ones, seeds, seeds, False, False),
    }
    return dict(zip(calls, best_of(list(calls.values()), budget_s)))


def passes(options: argparse.Namespace, budget_s: float) -> dict[int, float]:
    """Seconds of a pass of the embedded draft model, ids to logits, by requests."""
    found = {}
    with LLM(embedded_model("ssm"), max_num_seqs=max(options.rows), max_model_len=LENGTH + 64) as llm:
        runner = llm.built.runner
        table, size = runner.table.ops("decode"), runner.block_size
        for rows in options.rows:
            blocks = [list(range(5 * n, 5 * n + 5)) for n in range(rows)]
            sampling = Sampling(SamplingParams(), 0, LENGTH + 1, [0], 1)
            chunks = tuple(Chunk(str(n), [n], LENGTH, blocks[n], sampling) for n in range(rows))

            def work(chunks: tuple[Chunk, ...] = chunks) -> None:
                batch = prepare(StepPlan(0, chunks), runner.device, size).batch
                hidden = runner.model.forward(batch, runner.pages.keys, runner.pages.values, table)
                runner.model.logits(hidden, table)

            found[rows] = best_of([work], budget_s)[0]
    return found


if __name__ == "__main__":
    main()
