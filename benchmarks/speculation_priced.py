"""Trees without the machine that they are for: drafted and verified on a CPU, priced at seconds learned on a GPU.

What a tree brings depends on text and models alone, and outputs are the same under any tree; so rules of the sizer can
be compared on a CPU, step by step, at the prices of a GPU: those that a result of gpu_speculation has learned (a step
with trees by its rows, the first pass of a draft, a level), and its measured seconds without speculation. Nothing
learns here, and the host costs nothing but what those prices hold of it. Beside the rate stands what the sizer
expected.

    python -m benchmarks.speculation_priced --prices benchmarks/results/h200/2026-11-28-speculation-1-3.json
    python -m benchmarks.speculation_priced --prices benchmarks/results/h200/2026-11-28-speculation-many.json --batch 32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import checkpoint
from benchmarks.record import Record, parser, use_threads
from benchmarks.speculating import NONE, Arm, Sides, apart, cycled, human_eval, settings
from ridgeline import LLM
from ridgeline.core.step import StepRecord
from ridgeline.engine.build import TREE_ROWS
from ridgeline.run.beams import Beams
from ridgeline.run.graphs import ROWS, PassGraphs, pass_sizes_up_to
from ridgeline.speculate.acceptance import EDGES
from ridgeline.speculate.seconds import OWN, Seconds
from ridgeline.speculate.speculator import WIDTH

AUTO = Arm("tree, auto", {"method": "tree"}, (0,))
ARMS = (
    AUTO,
    *(Arm(f"chain of {k}", {"method": "draft_model", "num_speculative_tokens": k}, (0,)) for k in (2, 4, 6, 8)),
    Arm("tree 4-2-1-1", {"method": "tree", "tree": [4, 2, 1, 1]}, (0,)),
)
WARM_ROUNDS = 1


class Fixed(Seconds):
    """A price that nothing changes."""

    def learn(self, rows: int, seconds: float, own: float = OWN) -> None: ...

    def copy(self) -> Fixed:
        return Fixed({rows: self(rows) for rows in self._rows}, self.sizes)


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.prompts_count, options.new = 1, 12
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=1)
    result.add_argument("--prices", type=Path, required=True, help="a result of gpu_speculation at that batch")
    result.add_argument("--prompts", type=Path, help="a file of HumanEval prompts, one JSON object a line")
    result.add_argument("--prompts-count", type=int, default=16, help="at batch 1")
    result.add_argument("--batch", type=int, default=1, help="requests side by side")
    result.add_argument("--new", type=int, default=96, help="tokens of each request")
    result.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    record = Record("speculation-priced", options)
    config = {"method": "tree"} if options.model is None else {"method": "tree", "model": str(folder)}
    batch = options.batch
    settings_ = {"dtype": "float32", "device": "cpu", "max_num_seqs": batch, "enable_prefix_caching": False}
    with LLM(folder, speculative_config=config, **settings_) as llm:
        record.settings = {"model": what, "prices": options.prices.name, "new_tokens": options.new, "dtype": "float32"}
        record.settings["batch"] = batch
        prices = priced(llm, options.prices, batch)
        record.settings["seconds"] = {name: [one(1), one(33), one(65)] for name, one in prices.items()}
        wanted = options.prompts_count if batch == 1 else batch
        prompts, looping = apart(Sides(llm, [NONE]), human_eval(options.prompts), wanted, options.new)
        groups = [[prompt] for prompt in prompts] if batch == 1 else [cycled(prompts, batch)]
        record.settings["prompts_that_loop"] = f"{len(looping)} of {len(looping) + len(prompts)} that were looked at"
        for temperature in options.temperatures:
            rows = []
            for arm in ARMS:
                found = run(Sides(llm, [arm]), arm, groups, temperature, options.new, prices)
                record.summary[f"{arm.name}, temperature {temperature:g}"] = found
                rows.append([arm.name, *(f"{found[key]:.{digits}f}" for key, digits in COLUMNS.items())])
            record.table(f"Temperature {temperature:g}: {len(prompts)} prompts", ["", *COLUMNS], rows)
    return record


COLUMNS = {
    "tokens_per_s": 0, "over_none": 2, "tokens_a_step": 2, "nodes_a_step": 1, "levels_a_draft": 1,
    "expected_tokens_per_s": 0,
}  # fmt: skip


def priced(llm: LLM, path: Path, batch: int) -> dict[str, Fixed]:
    """Give the engine's speculator a GPU's prices, and its draft model levels without the host."""
    told = json.loads(path.read_text(encoding="utf-8"))["summary"]
    one = next(found for key, found in told.items() if key.startswith(f"batch {batch},"))
    learned = {name: {int(rows): s for rows, s in points.items()} for name, points in one["learned"].items()}
    prices = {
        "seconds": Fixed(learned["with_trees_s"], ROWS if set(ROWS) <= set(learned["with_trees_s"]) else ()),
        "plain_seconds": Fixed({batch: batch / one["arms"][NONE.name]["tokens_per_s"][0]}),
        "draft_seconds": Fixed(learned["draft_s"]),
        "level_seconds": Fixed(learned["level_s"]),
    }
    speculator = llm.built.speculator
    assert speculator is not None
    for name, price in prices.items():
        setattr(speculator, name, price)
    (model,) = speculator.models
    width = -(-llm.built.config.max_model_len // model.block_size)
    ops, sizes = model.table.ops("tree"), pass_sizes_up_to(batch, TREE_ROWS)
    model.graphs = PassGraphs(model.model, model.pages, ops, model.device, model.block_size, sizes, width, WIDTH)
    places = model.graphs.proposed, model.graphs.chances
    model.beams = Beams(model.model, model.pages, ops, model.device, model.block_size, batch, width, *places, EDGES)
    return prices


def run(
    sides: Sides, arm: Arm, groups: Sequence[list[str]], temperature: float, new: int, prices: dict[str, Fixed]
) -> dict[str, Any]:
    """One arm on all groups of prompts, after as many to learn chances from."""
    engine, speculator = sides.llm.built.engine, sides.speculators[arm.name]
    assert speculator is not None
    (model,) = speculator.models
    tokens = steps = nodes = trees = levels = 0
    seconds = 0.0
    for number in range(WARM_ROUNDS + 1):
        for prompts in groups:
            records: list[StepRecord] = []
            engine.listeners.append(records.append)
            passes = model.passes
            found = sides.run(arm, prompts, settings(temperature), new)
            engine.listeners.remove(records.append)
            if number < WARM_ROUNDS:
                continue
            verified = [one for one in records if one.kind == "tree"]
            drafted = model.passes - passes
            decoded = found.steps
            tokens, steps, nodes = tokens + found.tokens, steps + decoded, nodes + found.drafted
            trees, levels = trees + len(verified), levels + drafted
            batch = len(prompts)
            seconds += sum(prices["seconds"](batch + one.drafted) for one in verified)
            seconds += max(0, decoded - len(verified)) * prices["plain_seconds"](batch)
            seconds += len(verified) * prices["draft_seconds"](batch)
            seconds += max(0, drafted - len(verified)) * prices["level_seconds"](batch)
    none = batch / prices["plain_seconds"](batch)
    return {
        "tokens_per_s": tokens / seconds,
        "over_none": tokens / seconds / none,
        "tokens_a_step": tokens / steps / batch,
        "nodes_a_step": nodes / steps / batch,
        "levels_a_draft": levels / max(1, trees),
        "expected_tokens_per_s": speculator.sizes.tokens_per_s if speculator.sizes is not None else 0.0,
    }


if __name__ == "__main__":
    main()
