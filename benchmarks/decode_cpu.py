"""Decoding one request on a CPU: ridgeline beside Transformers, in one process, token by token.

Both sides get the same random prompt in fp32 on the same threads; the decode rate is that of the tokens
after the first. Beside `generate` stands Transformers' bare forward loop, so that it can be seen how
much of the difference is `generate` itself, and `generate` on one thread, which suits small matrices.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.models import Reference, Tokens, checkpoint, vocabulary_of
from benchmarks.record import Record, alternate, interval, losing, parser, ratios, seconds, use_threads
from ridgeline import LLM, SamplingParams

TARGET = 2.5
ARMS = ("ridgeline", "generate", "forward loop", "generate, 1 thread")


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.prompts, options.new, options.rounds = [16, 48], 8, 2
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "")
    result.add_argument("--prompts", type=int, nargs="+", default=[32, 512, 1536], help="prompt lengths")
    result.add_argument("--new", type=int, default=192, help="tokens to generate")
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    record = Record("decode-cpu", options)
    record.settings = {
        "model": what,
        "dtype": "float32",
        "threads": options.threads,
        "prompt_tokens": options.prompts,
        "new_tokens": options.new,
        "rounds": options.rounds,
        "transformers": "sdpa, DynamicCache, inference_mode, greedy, no logits processors",
    }
    vocabulary = vocabulary_of(folder)
    reference = Reference(folder, torch.float32)
    rows: list[list[str]] = []
    worst: tuple[float, str] | None = None
    with LLM(folder, dtype="float32", device="cpu", enable_prefix_caching=False) as llm:
        for length in options.prompts:

            def prompt(number: int, length: int = length) -> list[int]:
                draw = random.Random(1000 * length + number)
                return [draw.randrange(vocabulary) for _ in range(length)]

            results = alternate(
                {
                    "ridgeline": lambda number: stream(llm, prompt(number), options.new),
                    "generate": lambda number: reference.generate(prompt(number), options.new),
                    "forward loop": lambda number: reference.forward_loop(prompt(number), options.new),
                    "generate, 1 thread": lambda number: alone(reference, prompt(number), options.new),
                },
                options.rounds,
            )
            record.observe(f"prompt {length}")
            cell = summarize(results)
            record.summary[f"prompt {length}"] = cell
            record.timings[f"prompt {length}"] = {
                name: [{"stamps_s": seconds(one.stamps), "whole_s": round(one.whole_s, 6)} for one in runs]
                for name, runs in results.items()
            }
            rows.append(cell_row(length, cell))
            against = cell["against_generate"]
            if worst is None or against.median < worst[0]:
                worst = (against.median, against.show(unit="×"))
    record.table(
        f"Decode at batch 1, fp32, {options.threads} threads, {what}",
        ["prompt", *(f"{name} tok/s" for name in ARMS), "÷ generate", "÷ loop", "÷ 1 thread", "same tokens"],
        rows,
    )
    assert worst is not None
    record.note(
        "ratios: median of alternating pairs with 95 % bootstrap intervals; the line is judged by its worst cell"
    )
    record.target("decode at batch 1 against transformers generate", f"≥ {TARGET}×", worst[1], worst[0] >= TARGET)
    return record


def stream(llm: LLM, prompt: Sequence[int], new: int) -> Tokens:
    """One request through `LLM.stream`, with the time of each token."""
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    ids: list[int] = []
    stamps: list[float] = []
    start = time.perf_counter()
    for part in llm.stream({"prompt_token_ids": list(prompt)}, params):
        if part.token_ids:
            ids.extend(part.token_ids)
            stamps.extend([time.perf_counter() - start] * len(part.token_ids))
    whole = time.perf_counter() - start
    assert len(ids) == new, "the engine stopped early"
    return Tokens(ids, stamps, whole)


def alone(reference: Reference, prompt: Sequence[int], new: int) -> Tokens:
    """`generate` on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return reference.generate(prompt, new)
    finally:
        torch.set_num_threads(threads)


def summarize(results: dict[str, list[Tokens]]) -> dict[str, Any]:
    """Rates of each arm, ratios of the pairs, and how many greedy tokens agree."""
    decode = {name: [one.decode_s for one in runs] for name, runs in results.items()}
    whole = {name: [one.whole_s for one in runs] for name, runs in results.items()}
    pairs = zip(results["ridgeline"], results["generate"])
    agree = [a == b for ours, theirs in pairs for a, b in zip(ours.ids, theirs.ids)]
    return {
        "tokens_per_s": {name: interval([1 / one for one in values]) for name, values in decode.items()},
        "against_generate": ratios(decode["generate"], decode["ridgeline"]),
        "against_loop": ratios(decode["forward loop"], decode["ridgeline"]),
        "against_one_thread": ratios(decode["generate, 1 thread"], decode["ridgeline"]),
        "whole_call_against_generate": ratios(whole["generate"], whole["ridgeline"]),
        "same_tokens": sum(agree) / len(agree),
    }


def cell_row(length: int, cell: dict[str, Any]) -> list[str]:
    rates = [cell["tokens_per_s"][name].show(".0f") for name in ARMS]
    against, loop, single = (cell[f"against_{name}"] for name in ("generate", "loop", "one_thread"))
    return [
        str(length),
        *rates,
        losing(against.show(unit="×"), against.median < TARGET),
        losing(loop.show(unit="×"), loop.median < 1),
        losing(single.show(unit="×"), single.median < 1),
        f"{100 * cell['same_tokens']:.1f} %",
    ]


if __name__ == "__main__":
    main()
