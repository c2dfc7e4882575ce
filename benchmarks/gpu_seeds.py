"""How often a neighbour changes a seeded request's tokens on a GPU, and what it costs that none can.

Rows of one batch share tiles in the library's matrix products and in attention's key splits, so the order of
additions, and with it the last bits, can depend on the neighbours. 32 seeded requests of different lengths are
generated alone and together; reported is the share that differs, and where the first difference falls. The
same batch is generated twice as well: those must agree. All of it as the engine comes, and with batch_invariant=True,
where none may differ, neither alone and with its prompt in chunks nor when its prefix is found in the cache.

The second part is the price, on Llama-3.1-8B's shape with random weights: seconds of a decode step (as a server runs
it) and of a prompt, engine after engine.

    PYTHONPATH=src python3 -m benchmarks.gpu_seeds --out $OUT
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_decode import ARMS, TINY, Decoding
from benchmarks.models import checkpoint
from benchmarks.record import Interval, Record, interval, parser, progress
from benchmarks.trace import DATA
from ridgeline import LLM, SamplingParams

MODES = {"as it comes": False, "batch-invariant": True}


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.batch, options.new, options.dtypes = 4, 8, ["float32"]
        options.decoding, options.context, options.prompt, options.steps = [1, 3], 48, 96, 3
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=5)
    result.add_argument("--device", default="cuda")
    result.add_argument("--batch", type=int, default=32)
    result.add_argument("--new", type=int, default=64, help="tokens a request")
    result.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    result.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    result.add_argument("--attention", default="auto", help="which kernel of attention serves")
    result.add_argument("--no-price", action="store_true", help="leave out the second part")
    result.add_argument("--config", type=Path, default=DATA / "llama-3.1-8b.config.json", help="of the second part")
    result.add_argument("--decoding", type=int, nargs="+", default=[1, 32, 256], help="batches of the second part")
    result.add_argument("--context", type=int, default=640)
    result.add_argument("--prompt", type=int, default=2048)
    result.add_argument("--steps", type=int, default=20, help="decode steps a round")
    return result


def measure(options: argparse.Namespace) -> Record:
    record = Record("gpu-seeds", options)
    folder, what = checkpoint(options.model)
    record.settings = {"model": what, "device": options.device, "batch": options.batch, "new_tokens": options.new}
    rows = [cell(record, str(folder), dtype, mode) for mode in options.modes for dtype in options.dtypes]
    record.table(
        f"Seeded requests, alone against in a batch of {options.batch}, {options.device}",
        ["mode", "dtype", "requests that differ", "tokens before the first difference", "differences a token",
         "batch again", "alone in chunks", "prefix found"],
        rows,
    )  # fmt: skip
    if not options.no_price:
        price(record)
    return record


def cell(record: Record, folder: str, dtype: str, mode: str) -> list[str]:
    options = record.options
    draw = random.Random(0)
    settings: dict[str, Any] = {"dtype": dtype, "max_num_seqs": options.batch, "batch_invariant": MODES[mode]}
    settings |= {"device": options.device, "attention_backend": options.attention}
    bar = progress(2 * options.batch)
    with LLM(folder, enable_prefix_caching=False, **settings) as llm:
        vocabulary = llm.built.spec.vocabulary
        prompts = [
            {"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(draw.randrange(4, 300))]}
            for _ in range(options.batch)
        ]
        params = [
            SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=options.new, ignore_eos=True)
            for seed in range(options.batch)
        ]
        together, again = (tokens_of(llm, prompts, params) for _ in range(2))
        alone = one_by_one(llm, prompts, params, bar)
    with LLM(folder, max_num_batched_tokens=options.batch + 5, **settings) as llm:
        chunks = one_by_one(llm, prompts, params, bar)
        found = tokens_of(llm, prompts, params)
    bar.close()
    firsts = [first(a, b) for a, b in zip(alone, together)]
    same_prefix = sum(options.new if place is None else place for place in firsts)
    different = [place for place in firsts if place is not None]
    repeated = sum(a == b for a, b in zip(together, again))
    rate = len(different) / (same_prefix + len(different))
    others = {"in_chunks": chunks, "prefix_found": found}
    same = {name: sum(a == b for a, b in zip(together, one)) for name, one in others.items()}
    record.summary.setdefault(mode, {})[dtype] = {
        "requests": options.batch,
        "requests_that_differ": len(different),
        "first_differences": different,
        "differences_a_token": rate,
        "same_when_the_batch_is_repeated": repeated,
        "same_alone_in_chunks": same["in_chunks"],
        "same_with_the_prefix_found": same["prefix_found"],
    }
    if MODES[mode]:
        wrong = len(different) + sum(options.batch - one for one in (repeated, *same.values()))
        record.target(f"batch-invariant, {dtype}: requests whose tokens differ", "none", str(wrong), wrong == 0)
    return [
        mode,
        dtype,
        f"{len(different)} of {options.batch}",
        str(sorted(different)[:8]),
        f"{rate:.5f}",
        *(f"{one} of {options.batch} the same" for one in (repeated, *same.values())),
    ]


def tokens_of(llm: LLM, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in llm.generate(list(prompts), list(params), use_tqdm=False)]


def one_by_one(llm: LLM, prompts: Sequence[Any], params: Sequence[SamplingParams], bar: Any) -> list[list[int]]:
    found = []
    for prompt, one in zip(prompts, params):
        found += tokens_of(llm, [prompt], [one])
        bar.update()
    return found


def price(record: Record) -> None:
    """Seconds of decode steps and of a prompt, in each mode."""
    options = record.options
    values = json.loads(options.config.read_text(encoding="utf-8"))
    if options.quick:
        values.update(TINY)
    names = [f"decode step, batch {batch}, context {options.context}" for batch in options.decoding]
    names.append(f"prompt of {options.prompt} tokens")
    found: dict[str, dict[str, Interval]] = {}
    with tempfile.TemporaryDirectory(prefix="ridgeline-8b-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        for mode in options.modes:
            settings = {"batch_invariant": MODES[mode], "attention_backend": options.attention}
            with LLM(
                folder,
                load_format="dummy",
                dtype="bfloat16",
                device=options.device,
                max_model_len=4096,
                max_num_seqs=max(options.decoding),
                enable_prefix_caching=False,
                seed=0,
                **settings,
            ) as llm:
                times = [steps_of(llm, batch, options) for batch in options.decoding]
                times.append(prompts_of(llm, options))
                record.settings[mode] = {row.op: row.kernel for row in llm.built.table.rows if row.work == "decode"}
            record.timings[mode] = dict(zip(names, times))
            found[mode] = dict(zip(names, map(interval, times)))
            record.observe(mode)
    record.summary["price"] = found
    rows = []
    for name in names:
        cells = [found[mode][name] for mode in options.modes]
        ratio = f"{cells[-1].median / cells[0].median:.2f}" if len(cells) == 2 else ""
        rows.append([name, *(one.show(".2f", scale=1e3) for one in cells), ratio])
    record.table(f"What it costs, ms, {options.config.name}, bf16", ["", *options.modes, "ratio"], rows)


def steps_of(llm: LLM, batch: int, options: argparse.Namespace) -> list[float]:
    """Seconds of a decode step, a mean each round."""
    decoding = Decoding(llm, batch, options.context - options.rounds * options.steps // 2)
    decoding.take(ARMS[-1])
    times = []
    for _ in range(options.rounds):
        taken = decoding.stretch(options.steps)
        times.append(sum(taken) / len(taken))
    decoding.close()
    while llm.built.engine.step():
        pass
    return times


def prompts_of(llm: LLM, options: argparse.Namespace) -> list[float]:
    """Seconds until a prompt's first token; the first time is dropped."""
    draw = random.Random(0)
    once = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    times = []
    for _ in range(options.rounds + 1):
        prompt = {"prompt_token_ids": [draw.randrange(llm.built.spec.vocabulary) for _ in range(options.prompt)]}
        began = time.perf_counter()
        llm.generate([prompt], once, use_tqdm=False)
        times.append(time.perf_counter() - began)
    return times[1:]


def first(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first place at which two sequences differ."""
    return next((place for place, (a, b) in enumerate(zip(left, right)) if a != b), None)


if __name__ == "__main__":
    main()
