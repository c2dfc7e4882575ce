"""How often the small model that ships, alone and with an n-gram lookup, proposes what the target says.

HumanEval's prompts are continued by the embedded target, greedily and at a temperature by the engine's own noise. At
every position of the continuations stands the target's token; counted is the place that it has among the drafter's
children, in order. From that follow coverage by rank and by depth, and the tokens that static trees would have had
accepted, at equal verified nodes (`training/coverage.py`). No engine runs here and nothing is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks import ROOT
from benchmarks.record import Record, parser, use_threads
from training.coverage import (
    COVERED,
    DEPTH,
    GAIN,
    JUDGED,
    NGRAM,
    NODES,
    continued,
    costs,
    judged,
    report,
)
from training.evaluate import read_prompts
from training.export import read_model
from training.model import parameter_count

ASSETS = ROOT / "src" / "ridgeline" / "assets"
SSM = "SSM"


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.limit, options.tokens = 4, 16
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "")
    result.set_defaults(threads=1)
    result.add_argument("--prompts", type=Path, required=True, help="HumanEval as JSON lines (task_id, prompt)")
    result.add_argument("--tokens", type=int, default=128, help="tokens of each continuation")
    result.add_argument("--limit", type=int, help="only the first so many prompts")
    result.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    record = Record("draft-coverage", options)
    device = torch.device("cpu")
    folder = options.model or ASSETS / "model"
    target, small = read_model(folder, device), read_model(ASSETS / "ssm", device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = read_prompts(options.prompts)[: options.limit]
    openings = [torch.tensor(tokenizer.encode(prompt).ids) for _, prompt in prompts]
    record.settings = {
        "prompts": len(prompts),
        "tokens": options.tokens,
        "temperatures": options.temperatures,
        "depth": DEPTH,
    }
    reports: list[dict[str, Any]] = []
    for temperature in options.temperatures:
        start = time.perf_counter()
        rows = continued(target, openings, options.tokens, temperature)
        one = report({SSM: small}, rows, temperature)
        reports.append(one)
        tables(record, one)
        print(f"temperature {temperature}: {time.perf_counter() - start:.0f} s", flush=True)
    record.summary = {"costs": costs({SSM: parameter_count(small)}), "reports": reports}
    for way in ("union", "stacking", "apart", "chain"):
        name = f"{SSM} + {NGRAM}, {way}"
        value = judged(name, reports)
        record.target(
            f"{name}: accepted tokens a verified node beside the SSM alone, mean of {JUDGED} nodes, worst temperature",
            f"at least {GAIN:.2f}x",
            f"{value:.3f}x",
            value >= GAIN,
        )
    record.note(
        "Trees are static, chosen on half of the prompts and measured on the other half; starts are all positions."
    )
    record.note("An n-gram lookup alone verifies fewer nodes than a tree has places: often it has nothing to propose.")
    return record


def tables(record: Record, one: dict[str, Any]) -> None:
    kinds = {"arms": "all prompts", "arms_without_loops": "without prompts whose continuation loops"}
    for key, title in kinds.items():
        if key not in one:
            continue
        count = one["rows"] - (one["looping_rows"] if key == "arms_without_loops" else 0)
        heading = f"temperature {one['temperature']}, {title} ({count} of {one['rows']})"
        record.table(
            f"Share of the target's tokens among the best k proposals, {heading}",
            ["drafter", *(f"k = {count}" for count in COVERED), "depths 1 to 6, k = 1, given those above"],
            [
                [
                    name,
                    *(f"{arm['covered'][str(count)]:.3f}" for count in COVERED),
                    " ".join(f"{share:.2f}" for share in arm["by_depth"]["1"]) if "by_depth" in arm else "",
                ]
                for name, arm in one[key].items()
                if arm["covered"]
            ],
        )
        record.table(
            f"Accepted tokens a pass, trees of n nodes, in brackets beside the SSM alone, {heading}",
            ["drafter", *(f"n = {nodes}" for nodes in NODES)],
            [
                [
                    name,
                    *(
                        f"{tree['accepted']:.2f} ({tree['beside_first'][0]:.3f}x)"
                        for tree in (arm["trees"][str(nodes)] for nodes in NODES)
                    ),
                ]
                for name, arm in one[key].items()
            ],
        )


if __name__ == "__main__":
    main()
