"""Speculation on a CPU: the embedded model with trees, chains and n-grams beside itself without, on HumanEval prompts.

One engine runs every arm on the same prompts in alternating order, greedy and sampled with seeds; every output is
compared token for token with the one without speculation. Prompts whose greedy continuation repeats an 8-gram more than
twice are reported apart at batch 1 and left out of larger batches. The issue's line: at batch 1 never slower than
0.97x, the gain reported. Beside it: the dynamic sizer against the best static choice, which is known only afterwards.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import checkpoint
from benchmarks.record import Interval, Record, parser, use_threads
from benchmarks.speculating import (
    COLUMNS,
    LEAST,
    NEAR_BEST,
    NONE,
    Arm,
    Compared,
    Sides,
    apart,
    compare,
    cycled,
    human_eval,
)
from ridgeline import LLM
from ridgeline.study.pictures import save, speculation

AUTO = "tree, auto"
CHAINS = tuple(
    Arm(f"chain of {k}", {"method": "draft_model", "num_speculative_tokens": k}) for k in (1, 2, 3, 4, 5, 6, 7, 8)
)
TREES = tuple(
    Arm(f"tree {'-'.join(map(str, widths))}", {"method": "tree", "tree": list(widths)})
    for widths in ((2, 2), (3, 1, 1), (4, 2, 1, 1))
)
ARMS = (
    NONE,
    Arm(AUTO, {"method": "tree"}),
    *TREES,
    *CHAINS,
    Arm("chain, auto", {"method": "draft_model"}),
    Arm("n-gram of 4", {"method": "ngram", "num_speculative_tokens": 4}),
    Arm("n-gram, auto", {"method": "ngram"}),
)
FEW = (NONE.name, AUTO, "tree 2-2", "chain of 1", "chain of 2", "chain of 3", "chain of 4", "n-gram, auto")
"""Arms of batches beyond one."""


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.prompts_count, options.new, options.rounds, options.batches = 2, 10, 1, [1, 2]
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=5)
    result.add_argument("--prompts", type=Path, help="a file of HumanEval prompts, one JSON object a line")
    result.add_argument("--prompts-count", type=int, default=8, help="prompts at batch 1 that do not loop")
    result.add_argument("--new", type=int, default=128, help="tokens of each request")
    result.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32])
    result.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    result.add_argument("--plots", type=Path, help="folder for pictures")
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    record = Record("speculation-cpu", options)
    prompts = human_eval(options.prompts)
    record.settings = {
        "model": what,
        "drafter": "the embedded one" if options.model is None else "the model itself",
        "dtype": "float32",
        "threads": options.threads,
        "prompts": "HumanEval, first half",
        "new_tokens": options.new,
        "rounds": options.rounds,
        "temperatures": options.temperatures,
        "batches": options.batches,
    }
    config = {"method": "tree"} if options.model is None else {"method": "tree", "model": str(folder)}
    with LLM(folder, dtype="float32", device="cpu", enable_prefix_caching=False, speculative_config=config) as llm:
        plain, looping = apart(Sides(llm, [NONE]), prompts, max(options.prompts_count, *options.batches), options.new)
        record.settings["prompts_that_loop"] = f"{len(looping)} of {len(looping) + len(plain)} that were looked at"
        record.observe("looked for loops")
        for temperature in options.temperatures:
            sides = Sides(llm, ARMS)
            if not record.summary:
                record.summary["seconds_at_start"] = sides.priced(AUTO)
            speedups: dict[str, dict[int, Interval]] = {}
            reached: dict[str, list[float]] = {}
            for batch in options.batches:
                chosen = plain[: options.prompts_count] if batch == 1 else cycled(plain, batch)
                found = cell(record, sides, f"batch {batch}, temperature {temperature:g}", batch, temperature, chosen)
                for name in found.runs:
                    if name != NONE.name and name in FEW:
                        speedups.setdefault(name, {})[batch] = found.over(name, NONE.name)
                if not reached:  # at the first batch, where all arms draft
                    reached = {name: sides.counts[name].reached() for name in (AUTO, "chain of 4")}
                if batch == 1 and looping:
                    title = f"batch 1, temperature {temperature:g}, prompts that loop"
                    cell(record, sides, title, 1, temperature, looping[: options.prompts_count // 2], judged=False)
            record.summary[f"learned, temperature {temperature:g}"] = sides.priced(AUTO)
            record.summary[f"accepted, temperature {temperature:g}"] = {
                name: counts.as_dict() for name, counts in sides.counts.items() if counts.trials
            }
            if options.plots is not None:
                title = f"{what}, fp32, {options.threads} threads, temperature {temperature:g}"
                save(speculation(speedups, reached, title), options.plots / f"speculation-t{temperature:g}.png")
    record.note("ratios: medians of rounds, each round all prompts, arms alternating prompt by prompt; 95 % bootstrap")
    return record


def cell(
    record: Record,
    sides: Sides,
    title: str,
    batch: int,
    temperature: float,
    prompts: Sequence[str],
    judged: bool = True,
) -> Compared:
    """All arms at one batch."""
    options = record.options
    arms = [arm for arm in ARMS if batch == 1 or arm.name in FEW]
    found = compare(sides, arms, batch, temperature, prompts, options.new, options.rounds, listen=judged)
    worst = min(found.same.values())
    record.target(f"outputs token for token those of none, {title}", "100 %", f"{100 * worst:g} %", worst == 1.0)
    record.observe(title)
    record.summary[title] = found.as_dict()
    record.timings[title] = found.timings()
    record.table(f"{title[0].upper()}{title[1:]}: {len(prompts)} prompts", COLUMNS, found.rows())
    if judged:
        over, against = found.over(AUTO, NONE.name), found.over(AUTO, found.best_static)
        met = over.median >= LEAST if batch == 1 else None
        wanted = f"≥ {LEAST}×" if batch == 1 else "recorded"
        record.target(f"dynamic trees beside none, {title}", wanted, over.show(unit="×"), met)
        shown = f"{against.show(unit='×')} of {found.best_static}"
        line = f"dynamic trees beside the best static choice, {title}"
        record.target(line, f"≥ {NEAR_BEST}×", shown, against.median >= NEAR_BEST)
    return found


if __name__ == "__main__":
    main()
