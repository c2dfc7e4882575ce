"""How often a neighbour changes a seeded request's tokens on a GPU: alone against inside a full batch.

Rows of one batch share tiles in the library's matrix products and in attention's key splits, so the order of
additions, and with it the last bits, can depend on the neighbours. 32 seeded requests of different lengths are
generated alone and together; reported is the share that differs, and where the first difference falls. The
same batch is generated twice as well: those must agree.

    PYTHONPATH=src python3 -m benchmarks.gpu_seeds --out $OUT
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from benchmarks.models import checkpoint
from benchmarks.record import Record, parser, progress
from ridgeline import LLM, SamplingParams


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.batch, options.new, options.dtypes = 4, 8, ["float32"]
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=1)
    result.add_argument("--device", default="cuda")
    result.add_argument("--batch", type=int, default=32)
    result.add_argument("--new", type=int, default=64, help="tokens a request")
    result.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    return result


def measure(options: argparse.Namespace) -> Record:
    record = Record("gpu-seeds", options)
    folder, what = checkpoint(options.model)
    record.settings = {"model": what, "device": options.device, "batch": options.batch, "new_tokens": options.new}
    rows = [cell(record, str(folder), dtype) for dtype in options.dtypes]
    record.table(
        f"Seeded requests, alone against in a batch of {options.batch}, {options.device}",
        ["dtype", "requests that differ", "tokens before the first difference", "differences a token", "batch again"],
        rows,
    )
    return record


def cell(record: Record, folder: str, dtype: str) -> list[str]:
    options = record.options
    draw = random.Random(0)
    settings = {"dtype": dtype, "max_num_seqs": options.batch, "enable_prefix_caching": False}
    with LLM(folder, device=options.device, **settings) as llm:
        vocabulary = llm.built.spec.vocabulary
        prompts = [
            {"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(draw.randrange(4, 300))]}
            for _ in range(options.batch)
        ]
        params = [
            SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=options.new, ignore_eos=True)
            for seed in range(options.batch)
        ]
        together, again = (
            [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)] for _ in range(2)
        )
        alone = []
        bar = progress(options.batch)
        for prompt, one in zip(prompts, params):
            alone.append(llm.generate([prompt], [one], use_tqdm=False)[0].outputs[0].token_ids)
            bar.update()
        bar.close()
    firsts = [first(a, b) for a, b in zip(alone, together)]
    same_prefix = sum(options.new if place is None else place for place in firsts)
    different = [place for place in firsts if place is not None]
    repeated = sum(a == b for a, b in zip(together, again))
    rate = len(different) / (same_prefix + len(different))
    record.summary[dtype] = {
        "requests": options.batch,
        "requests_that_differ": len(different),
        "first_differences": different,
        "differences_a_token": rate,
        "same_when_the_batch_is_repeated": repeated,
    }
    return [
        dtype,
        f"{len(different)} of {options.batch}",
        str(sorted(different)[:8]),
        f"{rate:.5f}",
        f"{repeated} of {options.batch} the same",
    ]


def first(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first place at which two sequences differ."""
    return next((place for place, (a, b) in enumerate(zip(left, right)) if a != b), None)


if __name__ == "__main__":
    main()
