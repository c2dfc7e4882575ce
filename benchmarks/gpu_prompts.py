"""Steps with prompts, replayed at a captured size beside op by op: seconds of the device, and of the host to start one.

The same steps on one engine with random weights, in turn: prompts alone, and one beside requests that decode. What a
size has more rows than the step is padding, whose price a prompt of just that many tokens shows.

    PYTHONPATH=src python3 -m benchmarks.gpu_prompts --out $OUT
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_accuracy import MODELS, TINY
from benchmarks.record import Record, alternate, interval, losing, parser, use_threads
from benchmarks.trace import DATA
from ridgeline import LLM
from ridgeline.core.step import padded
from ridgeline.engine.build import Built
from ridgeline.engine.memory import size
from ridgeline.run.prompts import PromptGraphs
from ridgeline.study.calibrate import captured_tokens
from ridgeline.study.calibrate_machine import fill, step_seconds
from ridgeline.study.step_bench import Shape, StepBench

PROMPTS = (16, 128, 200, 256, 300, 384, 450, 512, 520, 640, 700, 768, 900, 1024)
BESIDE = 32
"""Requests that decode beside a prompt."""
MORE = 1.05
"""A replayed step should take no more than so many times the one op by op."""


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.prompts, options.context, options.longest = [8, 20], 24, 64
    use_threads(options.threads)
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=3)
    result.add_argument("--device", default="cuda")
    result.add_argument("--kernels", default="auto")
    result.add_argument("--models", nargs="+", default=list(MODELS[:2]), help="configs of benchmarks/data")
    result.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS))
    result.add_argument("--context", type=int, default=1000, help="keys of those that decode beside a prompt")
    result.add_argument("--longest", type=int, default=4096)
    return result


def measure(options: argparse.Namespace) -> Record:
    record = Record("gpu-prompts", options)
    record.settings = {"dtype": "bfloat16", "weights": "random", "rounds": options.rounds, "beside": BESIDE}
    worst = 0.0
    for name in options.models:
        values = json.loads((DATA / f"{name}.config.json").read_text(encoding="utf-8"))
        if options.quick:
            values.update({key: value for key, value in TINY.items() if key in values})
        worst = max(worst, model(record, name, values, options))
        record.observe(name)
    record.target("replayed over op by op, at most", f"{MORE:.2f}", f"{worst:.2f}", worst <= MORE)
    return record


def model(record: Record, name: str, values: dict[str, Any], options: argparse.Namespace) -> float:
    """Every cell of a model; the most that a replayed step takes over the same op by op."""
    with tempfile.TemporaryDirectory(prefix="ridgeline-prompts-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        began = time.perf_counter()
        with LLM(
            folder,
            load_format="dummy",
            dtype="bfloat16",
            device=options.device,
            kernels=options.kernels,
            max_model_len=options.longest,
            kv_cache_memory_bytes=16 << 20 if options.quick else 8 << 30,
            enable_prefix_caching=False,
            seed=1,
        ) as llm:
            built = llm.built
            fill(built)
            sizes = captured_tokens(built)
            graphs = built.ledger.graph_bytes
            record.summary[name] = {
                "start_s": round(time.perf_counter() - began, 1),
                "graph_bytes": graphs,
                "sizes": len(built.runner.prompts.sizes) if built.runner.prompts is not None else 0,
            }
            record.note(f"{name}: {record.summary[name]['start_s']} s to start, {size(graphs)} of graphs")
            return cells(record, name, built, sizes, options)


def cells(record: Record, name: str, built: Built, sizes: Sequence[int], options: argparse.Namespace) -> float:
    bench = StepBench(built)
    shapes = {str(tokens): Shape(((tokens, tokens),)) for tokens in options.prompts}
    tokens = options.prompts[len(options.prompts) // 4]
    shapes[f"{BESIDE} decode + {tokens}"] = Shape((*((1, options.context),) * BESIDE, (tokens, tokens)))
    kept, rows, worst = built.runner.prompts, [], 0.0
    for label, shape in shapes.items():

        def timed(prompts: PromptGraphs | None, shape: Shape = shape) -> tuple[float, float]:
            built.runner.prompts = prompts
            return step_seconds(bench, shape)

        arms = {"op by op": lambda _: timed(None), "replayed": lambda _: timed(kept)}
        found = alternate(arms, options.rounds, warm=0)
        built.runner.prompts = kept
        device = {arm: interval([one for one, _ in taken]) for arm, taken in found.items()}
        host = {arm: min(start_s for _, start_s in taken) for arm, taken in found.items()}
        ratio = device["replayed"].median / device["op by op"].median
        worst = max(worst, ratio)
        record.timings[f"{name} {label}"] = found
        rows.append(
            [label, str(padded(shape.tokens, sizes)),
             *(one.show(".3f", "", 1e3) for one in device.values()), losing(f"{ratio:.2f}", ratio > MORE),
             *(f"{1e3 * one:.2f}" for one in host.values())]
        )  # fmt: skip
    record.table(
        f"Steps with prompts, {name}, ms",
        ["tokens", "rows", "op by op", "replayed", "ratio", "host, op by op", "host, replayed"],
        rows,
    )
    return worst


if __name__ == "__main__":
    main()
