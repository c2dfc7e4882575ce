"""Speculation on a GPU: real text at a large model's cost, batch by batch, beside none, chains and given trees.

The target is the embedded model widened, with the same function, to Llama-3.1-8B's cost (widen.py); its drafter runs at
its own size. One engine runs every arm on HumanEval's prompts in alternating order, with the engine's defaults (graphs
on both sides; without speculation steps overlap as well). Prompts that loop are left out. Beside each speed stands the
bound: the sizer's own formula with the acceptance that the arms with given sizes had in this run, and no overhead.

    PYTHONPATH=src python3 -m benchmarks.gpu_speculation --batches 1 --temperatures 0 0.8 --out $OUT
    PYTHONPATH=src python3 -m benchmarks.gpu_speculation --adversary --batches 1 8 64 --out $OUT
    PYTHONPATH=src python3 -m benchmarks.gpu_speculation --merge --batches 1 4 --out $OUT

    python3 -m benchmarks.gpu_speculation --results FILE FILE --plots docs/plots/h200

--results draws the curves of runs that were made in pieces, and measures nothing. --adversary puts a drafter of the
same shape with random weights in the drafter's place; --merge sets one drafter beside one and n-grams, and beside two
(--second DIR), at equal nodes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.models import checkpoint
from benchmarks.record import Record, parser
from benchmarks.speculating import (
    COLUMNS,
    LEAST,
    NEAR_BEST,
    NONE,
    Arm,
    Compared,
    Counts,
    Sides,
    apart,
    bound,
    compare,
    cycled,
    human_eval,
)
from benchmarks.widen import Shape, load, open_original, widening
from ridgeline import LLM
from ridgeline.core.step import Spans
from ridgeline.models.checkpoint import embedded_model
from ridgeline.perf.hardware import find, named
from ridgeline.perf.predict import StepSeconds
from ridgeline.perf.roofline import Roofline
from ridgeline.speculate.draft_model import DraftModel
from ridgeline.study.pictures import save, speculation

AUTO = "tree, auto"
SPEEDUP, RATE, OF_BOUND = {0.0: 3.0, 0.8: 2.2}, 620.0, 0.85
"""The issue's lines at batch 1: times no speculation by temperature; tokens a second and share of the bound, greedy."""
PLAIN_MS = 4.7
"""Above this no speculation is too slow for a ratio to count."""
MERGE_GAIN = 1.08


def chain(nodes: int) -> Arm:
    return Arm(f"chain of {nodes}", {"method": "draft_model", "num_speculative_tokens": nodes}, (0,))


def tree(*widths: int) -> Arm:
    return Arm(f"tree {'-'.join(map(str, widths))}", {"method": "tree", "tree": list(widths)}, (0,))


SIZED = Arm(AUTO, {"method": "tree"}, (0,))
ALONE = (NONE, SIZED, *map(chain, (1, 2, 3, 4, 5, 6, 8)), tree(4, 2, 1, 1), tree(4, 3, 2, 1, 1), tree(3, 1, 1))
BESIDE = (NONE, SIZED, *map(chain, (1, 2, 3, 4)), tree(2, 2), tree(4, 2, 1, 1))
ADVERSARY = (NONE, SIZED, chain(4), tree(4, 2, 1, 1))


MERGED_NODES = (8, 16, 32)


def merging(second: bool) -> tuple[Arm, ...]:
    """One drafter, one and n-grams, and two drafters, at equal nodes."""
    arms = [NONE]
    for nodes in MERGED_NODES:
        config = {"method": "tree", "num_speculative_tokens": nodes}
        arms += [Arm(f"one, {nodes} nodes", config, (0,))]
        arms += [Arm(f"one and n-grams, {nodes} nodes", {**config, "model": ["one", "ngram"]}, (0,))]
        arms += [Arm(f"two, {nodes} nodes", config, (0, 1))] if second else []
    return tuple(arms)


def main(argv: Sequence[str] | None = None) -> Record | None:
    options = arguments().parse_args(argv)
    if options.quick:
        options.batches, options.new, options.rounds, options.prompts_count = [1, 3], 12, 2, 2
    known = {arm.name: None for arm in (*ALONE, *BESIDE) if arm.config and not arm.sized}
    for name in options.static:
        if name not in known:
            raise SystemExit(f"--static: there is no {name!r}, but {', '.join(known)}")
    if options.results:
        draw(options)
        return None
    record = measure(options)
    record.close()
    return record


def draw(options: argparse.Namespace) -> None:
    """The curves of several results, a picture for each temperature."""
    if options.plots is None:
        raise SystemExit("--results needs --plots, the folder for pictures")
    found: dict[float, tuple[dict[str, dict[int, Any]], dict[str, Counts]]] = {}
    title = ""
    for path in options.results:
        told = json.loads(path.read_text(encoding="utf-8"))
        title = told["settings"]["model"]
        for key, one in told["summary"].items():
            if not key.startswith("batch "):
                continue
            batch, temperature = int(key.split()[1].rstrip(",")), float(key.split()[-1])
            speedups, counts = found.setdefault(temperature, ({}, {}))
            for name, arm in one["arms"].items():
                if name != NONE.name:
                    speedups.setdefault(name, {})[batch] = tuple(arm["over_none"])
            for name, rate in one["bounds_tokens_per_s"].items():
                over = rate / one["arms"][NONE.name]["tokens_per_s"][0]
                speedups.setdefault(f"bound, {name}", {})[batch] = (over, over, over)
            for name, one_arm in one["accepted"].items():
                lengths = {int(tokens): count for tokens, count in one_arm["trees_by_tokens"].items()}
                counts[name] = counts.get(name, Counts()) + Counts(lengths=Counter(lengths))
    for temperature, (speedups, counts) in found.items():
        reached = {name: one.reached() for name, one in counts.items() if one.lengths}
        figure = speculation(speedups, reached, f"{title}, temperature {temperature:g}")
        save(figure, options.plots / f"{options.name}-t{temperature:g}.png")


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=5)
    result.add_argument("--device", default="cuda")
    result.add_argument("--kernels", default="auto")
    result.add_argument("--dtype", default="bfloat16")
    result.add_argument("--drafter", type=Path, help="a checkpoint instead of the embedded model's own drafter")
    result.add_argument("--merge", action="store_true", help="drafters merged, at equal nodes")
    result.add_argument("--second", type=Path, help="with --merge: another drafter")
    result.add_argument("--adversary", action="store_true", help="a drafter with random weights")
    result.add_argument("--prompts", type=Path, help="a file of HumanEval prompts, one JSON object a line")
    result.add_argument("--prompts-count", type=int, default=6, help="prompts at batch 1")
    result.add_argument("--new", type=int, default=128, help="tokens of each request")
    result.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    result.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    result.add_argument("--static", nargs="+", default=[], metavar="ARM", help="of given sizes, these alone")
    result.add_argument("--hardware", help="the machine whose roofs the bound uses; this one if it is known")
    result.add_argument("--results", type=Path, nargs="+", help="results to draw, instead of measuring")
    result.add_argument("--name", default="gpu-speculation")
    result.add_argument("--plots", type=Path, help="folder for pictures")
    return result


def measure(options: argparse.Namespace) -> Record:
    source, what = checkpoint(options.model)
    drafter = options.drafter or (embedded_model("ssm") if options.model is None else source)
    record = Record(options.name, options)
    prompts = human_eval(options.prompts)
    shape = small(source) if options.quick else Shape()
    record.settings = {
        "model": f"{what}, widened to {shape}",
        "drafter": "random weights"
        if options.adversary
        else "the embedded one"
        if options.drafter is None
        else "given",
        "dtype": options.dtype,
        "prompts": "HumanEval, first half, without those that loop; cycled with a first comment line",
        "new_tokens": options.new,
        "rounds": options.rounds,
        "temperatures": options.temperatures,
        "batches": options.batches,
    }
    began = time.perf_counter()
    drafters = [drafter, *([options.second] if options.second else [])]
    llm = load(
        shape,
        source,
        dtype=options.dtype,
        device=options.device,
        kernels=options.kernels,
        max_num_seqs=max(options.batches),
        enable_prefix_caching=False,
        speculative_config={"method": "tree", "model": [str(one) for one in drafters]},
    )
    with llm:
        assert llm.built.speculator is not None
        for model, place in zip(llm.built.speculator.models, drafters):
            fill_drafter(model, place, options.adversary)
        if not options.quick:
            gc.collect()
            gc.freeze()
        record.summary["start_s"] = round(time.perf_counter() - began, 1)
        record.settings["kernels"] = {f"{row.op} ({row.work})": row.kernel for row in llm.built.table.rows}
        record.settings["graphs"] = llm.built.runner.graphs is not None
        wanted = min(max(options.prompts_count, *options.batches), len(prompts))
        plain, looping = apart(Sides(llm, [NONE]), prompts, wanted, options.new)
        record.settings["prompts_that_loop"] = f"{len(looping)} of {len(looping) + len(plain)} that were looked at"
        for temperature in options.temperatures:
            at_temperature(record, llm, plain, temperature)
    return record


def small(source: Path) -> Shape:
    """Hardly larger than the original: a smoke test's."""
    plan = widening(source, replace(Shape(), layers=1 << 10, vocabulary=1 << 20, intermediate=1 << 20, hidden=1 << 16))
    return Shape(plan.hidden + 64, plan.heads, plan.kv_heads, plan.intermediate, plan.layers, plan.vocabulary + 64)


def fill_drafter(model: DraftModel, source: Path, adversary: bool) -> None:
    """The weights of a checkpoint in the places of a drafter that was built without; random ones of the same size for
    an adversary."""
    _, read = open_original(source)
    generator = torch.Generator(model.device).manual_seed(1)
    with torch.no_grad():
        for name, place in model.model.store.places.items():
            original = read(name)
            if adversary and original.dim() > 1:
                place.normal_(0.0, float(original.float().std()), generator=generator)
            else:
                place.copy_(original)


def kept(arms: Sequence[Arm], static: Sequence[str]) -> tuple[Arm, ...]:
    """Of arms with given sizes only those, if any are named."""
    return tuple(arm for arm in arms if not static or arm.config is None or arm.sized or arm.name in static)


def at_temperature(record: Record, llm: LLM, prompts: Sequence[str], temperature: float) -> None:
    """Every batch, and the curves."""
    options = record.options
    arms: tuple[Arm, ...] = ADVERSARY if options.adversary else merging(bool(options.second)) if options.merge else ()
    every = kept(arms or (*ALONE, *(arm for arm in BESIDE if arm not in ALONE)), options.static)
    sides = Sides(llm, every)
    if not options.merge:
        record.summary.setdefault("prices_at_start", sides.priced(AUTO))
    speedups: dict[str, dict[int, Any]] = {}
    for batch in options.batches:
        chosen = list(prompts[: options.prompts_count]) if batch == 1 else cycled(prompts, batch)
        here = tuple(arm for arm in arms or (ALONE if batch == 1 else BESIDE) if arm in every)
        title = f"batch {batch}, temperature {temperature:g}"
        sides.counts = {name: Counts() for name in sides.counts}
        found = compare(sides, here, batch, temperature, chosen, options.new, options.rounds)
        record.observe(title)
        given = sum((sides.counts[arm.name] for arm in here if arm.config and not arm.sized), Counts())
        bounds = {} if options.merge else bounds_of(llm, sides, given, found, options.hardware)
        record.summary[title] = {
            **found.as_dict(),
            "bounds_tokens_per_s": bounds,
            "accepted": {arm.name: sides.counts[arm.name].as_dict() for arm in here if arm.config},
            **({} if options.merge else {"learned": sides.priced(AUTO)}),
        }
        record.timings[title] = found.timings()
        record.table(f"{title[0].upper()}{title[1:]}: {len(chosen)} prompts", COLUMNS, found.rows())
        judge(record, title, temperature, found, bounds)
        for name in found.runs:
            if name != NONE.name:
                speedups.setdefault(name, {})[batch] = found.over(name, NONE.name)
        for name, rate in bounds.items():
            over = rate / found.median(NONE.name)
            speedups.setdefault(f"bound, {name}", {})[batch] = (over, over, over)
    if options.plots is not None:
        reached = {name: counts.reached() for name, counts in sides.counts.items() if counts.lengths}
        figure = speculation(speedups, reached, f"{record.settings['model']}, temperature {temperature:g}")
        save(figure, options.plots / f"{options.name}-t{temperature:g}.png")


def bounds_of(llm: LLM, sides: Sides, counts: Counts, found: Compared, hardware: str | None) -> dict[str, float]:
    """Tokens a second that the counted acceptance allows: at the seconds that the sizer has learned, and with the
    target's steps at the roofs of the machine."""
    learned = sides.speculators[AUTO]
    assert learned is not None
    batch, draft = found.batch, learned.draft_seconds
    level_s = None if learned.level_seconds is None else learned.level_seconds(batch)
    most = bound(counts, batch, learned.seconds, draft, learned.plain_seconds, level_s)
    result = {"measured seconds": most.tokens_per_s}
    machine = find(hardware) if hardware else None
    if machine is None and torch.cuda.is_available():
        machine = named(torch.cuda.get_device_name())
    if machine is None:
        return result
    built = llm.built
    roofline = Roofline.of(machine, built.config.dtype)
    step_s = StepSeconds(built.price, lambda name, kind, cost: roofline.seconds(cost, kind))
    context = round(found.context)

    def target(rows: int) -> float:
        each, rest = divmod(rows, batch)
        new = tuple(each + (place < rest) for place in range(batch))
        return step_s(Spans(new, tuple(context + one for one in new)), rows)

    result["roofs"] = bound(counts, batch, target, draft, level_s=level_s).tokens_per_s
    return result


def at_equal_nodes(arms: Mapping[str, Any], name: str) -> float | None:
    """What merged drafters have accepted a step, over what one has of as many verified nodes: a budget of nodes is one
    thing, and who has less to propose verifies fewer. In a straight line between the trees of one; None below the
    smallest of them."""
    one = sorted(
        (arm["nodes_a_step"], arm["tokens_a_step"] - 1) for key, arm in arms.items() if key.startswith("one, ")
    )
    nodes, accepted = arms[name]["nodes_a_step"], arms[name]["tokens_a_step"] - 1
    if nodes < one[0][0]:
        return None
    alone = float(np.interp(nodes, *zip(*one)))
    return accepted / alone if alone else None


def judge(record: Record, title: str, temperature: float, found: Compared, bounds: dict[str, float]) -> None:
    """The issue's lines for one batch; on a CPU, and in a smoke test, all are only recorded."""
    options = record.options
    counts = options.device.startswith("cuda") and not options.quick

    def line(text: str, target: str, measured: str, met: bool) -> None:
        record.target(f"{text}, {title}", target, measured, met if counts else None)

    if options.merge:
        arms = found.as_dict()["arms"]
        for name in found.runs:
            if not name.startswith(("one,", NONE.name)):
                text, gain = f"accepted of as many verified nodes, {name}, over one", at_equal_nodes(arms, name)
                if gain is None:
                    record.target(f"{text}, {title}", f"≥ {MERGE_GAIN}×", "fewer nodes than any tree of one's", None)
                else:
                    line(text, f"≥ {MERGE_GAIN}×", f"{gain:.3f}×", gain >= MERGE_GAIN)
        return
    over, best = found.over(AUTO, NONE.name), found.over(AUTO, found.best_static)
    what = "adversarial drafter, " if options.adversary else ""
    line(f"{what}dynamic trees beside none", f"≥ {LEAST}×", over.show(unit="×"), over.median >= LEAST)
    if options.adversary:
        loss = {
            name: found.over(name, NONE.name).show(unit="×") for name in found.runs if name not in (NONE.name, AUTO)
        }
        record.note(f"{title}, adversarial drafter with given sizes, beside none: {loss}")
        return
    shown = f"{best.show(unit='×')} of {found.best_static}"
    line("dynamic trees beside the best static choice", f"≥ {NEAR_BEST}×", shown, best.median >= NEAR_BEST)
    if found.batch != 1:
        return
    plain_ms = 1e3 / found.median(NONE.name)
    line("no speculation, ms a token", f"≤ {PLAIN_MS}", f"{plain_ms:.2f}", plain_ms <= PLAIN_MS)
    wanted = SPEEDUP.get(temperature)
    if wanted is not None:
        met = over.median >= wanted and plain_ms <= PLAIN_MS
        line("dynamic trees beside none", f"≥ {wanted}×", over.show(unit="×"), met)
    if temperature == 0.0:
        rate = found.median(AUTO)
        line("dynamic trees, tok/s", f"≥ {RATE:g}", f"{rate:.0f}", rate >= RATE)
        chains = [name for name in found.runs if name.startswith("chain")]
        longest = max(chains, key=found.median)
        ahead = found.over(AUTO, longest)
        line(f"dynamic trees beside {longest}, the best chain", "> 1×", ahead.show(unit="×"), ahead.median > 1)
        for name, most in bounds.items():
            share = rate / most
            line(f"share of the bound by {name}", f"≥ {OF_BOUND:.0%}", f"{share:.0%}", share >= OF_BOUND)


if __name__ == "__main__":
    main()
