"""Speculation on a CPU: the embedded model with trees, chains and n-grams beside itself without, on HumanEval prompts.

One engine runs every arm on the same prompts in alternating order, greedy and sampled with seeds; every output is
compared token for token with the one without speculation. Prompts whose greedy continuation repeats an 8-gram more than
twice are reported apart at batch 1 and left out of larger batches. The issue's line: at batch 1 never slower than
0.97x, the gain reported. Beside it: the dynamic sizer against the best static choice, which is known only afterwards.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import checkpoint
from benchmarks.record import Interval, Record, alternate, interval, losing, parser, ratios, seconds, use_threads
from benchmarks.speculating import Arm, Run, Sides, cycled, first_difference, human_eval, loops
from ridgeline import LLM, SamplingParams
from ridgeline.study.pictures import save, speculation

NONE, AUTO = "none", "tree, auto"
LEAST, NEAR_BEST = 0.97, 0.97
"""Of no speculation at batch 1, and of the best static choice."""

CHAINS = tuple(
    Arm(f"chain of {k}", {"method": "draft_model", "num_speculative_tokens": k}) for k in (1, 2, 3, 4, 5, 6, 7, 8)
)
TREES = tuple(
    Arm(f"tree {'-'.join(map(str, widths))}", {"method": "tree", "tree": list(widths)})
    for widths in ((2, 2), (3, 1, 1), (4, 2, 1, 1))
)
ARMS = (
    Arm(NONE, None),
    Arm(AUTO, {"method": "tree"}),
    *TREES,
    *CHAINS,
    Arm("chain, auto", {"method": "draft_model"}),
    Arm("n-gram of 4", {"method": "ngram", "num_speculative_tokens": 4}),
    Arm("n-gram, auto", {"method": "ngram"}),
)
FEW = (NONE, AUTO, "tree 2-2", "chain of 1", "chain of 2", "chain of 3", "chain of 4", "n-gram, auto")
"""Arms of batches beyond one."""
SIZED = (AUTO, "chain, auto", "n-gram, auto")
"""Arms whose sizes change: no static choices."""


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
        plain, looping = apart(Sides(llm, ARMS), prompts, options)
        record.settings["prompts_that_loop"] = f"{len(looping)} of {len(looping) + len(plain)} that were looked at"
        record.observe("looked for loops")
        for temperature in options.temperatures:
            sides = Sides(llm, ARMS)
            if not record.summary:
                record.summary["seconds_at_start"] = sides.priced(AUTO)
            speedups: dict[str, dict[int, Interval]] = {}
            for batch in options.batches:
                chosen = plain[: options.prompts_count] if batch == 1 else cycled(plain, batch)
                found = cell(record, sides, f"batch {batch}, temperature {temperature:g}", batch, temperature, chosen)
                for name, one in found["arms"].items():
                    if name != NONE and name in FEW:
                        speedups.setdefault(name, {})[batch] = one["over_none"]
                if batch == 1 and looping:
                    title = f"batch 1, temperature {temperature:g}, prompts that loop"
                    cell(record, sides, title, 1, temperature, looping[: options.prompts_count // 2], judged=False)
            record.summary[f"learned, temperature {temperature:g}"] = sides.priced(AUTO)
            if options.plots is not None:
                reached = {name: sides.counts[name].reached() for name in (AUTO, "chain of 4")}
                title = f"{what}, fp32, {options.threads} threads, temperature {temperature:g}"
                save(speculation(speedups, reached, title), options.plots / f"speculation-t{temperature:g}.png")
    record.note("ratios: medians of rounds, each round all prompts, arms alternating prompt by prompt; 95 % bootstrap")
    return record


def apart(sides: Sides, prompts: Sequence[str], options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts whose greedy continuation does not loop, and those whose does; no more than are needed."""
    plain: list[str] = []
    looping: list[str] = []
    params = settings(0.0)
    for prompt in prompts:
        if len(plain) >= max(options.prompts_count, *options.batches):
            break
        ids = sides.run(ARMS[0], [prompt], params, options.new).ids[0]
        (looping if loops(ids) else plain).append(prompt)
    return plain or looping, looping if plain else []


def settings(temperature: float) -> SamplingParams:
    """As each request is sampled; it ends when the clock has stopped."""
    seed = 7 if temperature else None
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=None, ignore_eos=True, detokenize=False)


def cell(
    record: Record,
    sides: Sides,
    title: str,
    batch: int,
    temperature: float,
    prompts: Sequence[str],
    judged: bool = True,
) -> dict[str, Any]:
    """All arms on the same prompts, in groups of `batch`, each group a measurement and all of them a round."""
    options = record.options
    groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
    params = settings(temperature)
    arms = [arm for arm in ARMS if batch == 1 or arm.name in FEW]

    def decode(arm: Arm, number: int) -> Run:
        return sides.run(arm, groups[number % len(groups)], params, options.new, listen=number < 0 and judged)

    results = alternate(
        {arm.name: lambda number, arm=arm: decode(arm, number) for arm in arms},  # type: ignore[misc]
        options.rounds * len(groups),
        warm=len(groups),
    )
    record.observe(title)
    for name, runs in results.items():
        for number, (ours, none) in enumerate(zip(runs, results[NONE])):
            for place, (one, other) in enumerate(zip(ours.ids, none.ids)):
                parted = first_difference(one, other)
                assert parted is None, f"{title}, {name}: prompt {number}/{place} parts at token {parted}"
    rates = {name: by_round(runs, len(groups)) for name, runs in results.items()}
    static = [name for name in rates if name not in SIZED]
    best = max(static, key=lambda name: statistics.median(rates[name]))
    found: dict[str, Any] = {"best_static": best, "same_tokens": True, "arms": {}}
    for name, runs in results.items():
        steps, tokens = sum(one.steps for one in runs), sum(one.tokens for one in runs)
        found["arms"][name] = {
            "tokens_per_s": interval(rates[name]),
            "over_none": ratios(rates[name], rates[NONE]),
            "over_best_static": ratios(rates[name], rates[best]),
            "tokens_a_step": tokens / steps / batch,
            "nodes_a_step": sum(one.drafted for one in runs) / steps,
            "accepted_share": sum(one.accepted for one in runs) / max(1, sum(one.drafted for one in runs)),
            "draft_share_of_time": sum(one.draft_s for one in runs) / sum(one.decode_s for one in runs),
            "counts": sides.counts[name].as_dict() if judged else None,
        }
    record.summary[title] = found
    record.timings[title] = {
        name: {
            "decode_s": seconds(one.decode_s for one in runs),
            "tokens": [one.tokens for one in runs],
            "steps": [one.steps for one in runs],
        }
        for name, runs in results.items()
    }
    record.table(
        f"{title[0].upper()}{title[1:]}: {len(prompts)} prompts",
        ["", "tok/s", "÷ none", "÷ best static", "tokens a step", "nodes a step", "accepted", "drafting"],
        [row(name, one) for name, one in found["arms"].items()],
    )
    if judged:
        ours = found["arms"][AUTO]
        over, against = ours["over_none"], ours["over_best_static"]
        if batch == 1:
            met = over.median >= LEAST
            record.target(f"dynamic trees beside none, {title}", f"≥ {LEAST}×", over.show(unit="×"), met)
        else:
            record.target(f"dynamic trees beside none, {title}", "recorded", over.show(unit="×"), None)
        shown = f"{against.show(unit='×')} of {best}"
        record.target(f"dynamic trees beside the best static choice, {title}", f"≥ {NEAR_BEST}×", shown,
                      against.median >= NEAR_BEST)  # fmt: skip
    return found


def by_round(runs: Sequence[Run], groups: int) -> list[float]:
    """Tokens a second of each round."""
    rounds = [runs[first : first + groups] for first in range(0, len(runs), groups)]
    return [sum(one.tokens for one in part) / sum(one.decode_s for one in part) for part in rounds]


def row(name: str, one: dict[str, Any]) -> list[str]:
    over, best = one["over_none"], one["over_best_static"]
    return [
        name,
        one["tokens_per_s"].show(".0f"),
        losing(over.show(), over.median < LEAST),
        losing(best.show(), best.median < NEAR_BEST),
        f"{one['tokens_a_step']:.2f}",
        f"{one['nodes_a_step']:.1f}",
        f"{100 * one['accepted_share']:.0f} %",
        f"{100 * one['draft_share_of_time']:.0f} %",
    ]


if __name__ == "__main__":
    main()
