"""Attention rung by rung, kept on record: the experiments of `ridgeline bench attention`.

Each experiment runs as the command would run it; the file holds its whole result beside machine, versions and clocks.

    python -m benchmarks.attention report sweep --device cpu --rungs standard,blocked,fused
    PYTHONPATH=src python3 -m benchmarks.attention report sweep decode memory --counters --out $OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Record, parser, use_threads
from ridgeline.study.attention import bench, plots, report
from ridgeline.study.attention.cases import EXPERIMENTS, ITEM_BYTES, Choice


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    use_threads(options.threads)
    if options.quick:
        options.rounds, options.batch, options.sequence, options.head_dim = 1, [1], [32], [16]
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=20)
    result.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all if left out")
    result.add_argument("--name", default="attention", help="of the file")
    result.add_argument("--device", default="auto")
    result.add_argument("--dtype", default="auto", choices=("auto", *ITEM_BYTES))
    result.add_argument("--rungs", default="", help="separated by commas; all that run here if left out")
    result.add_argument("--peers", default="", help="likewise; none for none")
    result.add_argument("--batch", type=int, nargs="+", default=[])
    result.add_argument("--sequence", type=int, nargs="+", default=[])
    result.add_argument("--head-dim", type=int, nargs="+", default=[])
    result.add_argument("--heads", type=int)
    result.add_argument("--kv-heads", type=int)
    result.add_argument("--causal", action=argparse.BooleanOptionalAction)
    result.add_argument("--grouped", action="store_true", help="also the sweep's grouped heads")
    result.add_argument("--layout", default="auto", choices=("auto", "contiguous", "paged"))
    result.add_argument("--page", type=int, default=64)
    result.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True)
    result.add_argument("--counters", action="store_true", help="read hardware counters too")
    result.add_argument("--plots", type=Path, help="folder for pictures")
    return result


def measure(options: argparse.Namespace) -> Record:
    record = Record(options.name, options)
    device = bench.device_name(options.device)
    dtype = options.dtype if options.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    choice = Choice(
        batches=tuple(options.batch),
        sequences=tuple(options.sequence),
        head_dims=tuple(options.head_dim),
        heads=options.heads,
        kv_heads=options.kv_heads,
        causal=options.causal,
        dtype=dtype,
        layout=options.layout,
        page=options.page,
        grouped=options.grouped,
        device=device,
    )
    settings = bench.Settings(rounds=options.rounds, graph=options.graph, counters=options.counters)
    record.settings = {"dtype": dtype, "threads": torch.get_num_threads(), "inputs": "normal random"}
    for experiment in options.experiments or EXPERIMENTS:
        record.observe(f"{experiment} begins")
        result = bench.run(experiment, choice, settings, names(options.rungs), names(options.peers))
        for table in report.tables(result):
            record.table(table.title, list(table.columns), [list(row) for row in table.rows])
        for line in (*report.claims(result), *report.refusals(result)):
            print(line)
        for line in report.wrong(result):
            record.note(line)
        record.timings[experiment] = samples_of(result)
        record.summary[experiment] = {**result, "claims": report.claims(result)}
        if options.plots is not None:
            plots.draw(result, options.plots)
    return record


def samples_of(result: dict[str, Any]) -> dict[str, Any]:
    """Raw seconds out of a result, by case and contestant: they stand with the other raw timings."""
    taken: dict[str, Any] = {}
    for cell in result["cells"]:
        for name, one in cell["results"].items():
            for key in ("samples", "eager_samples"):
                if key in one:
                    taken.setdefault(cell["case"]["label"], {})[f"{name} {key}"] = one.pop(key)
    return taken


def names(text: str) -> list[str]:
    return [one for one in text.split(",") if one]


if __name__ == "__main__":
    main()
