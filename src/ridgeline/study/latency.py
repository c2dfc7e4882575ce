"""Whole-model inference with each rung of the attention ladder: what a faster attention is worth to its user.

Knows LLM, step records and random prompts. It must not know kernels: a rung is a value of attention_backend.

The EE451 report claims to have measured "average runtime for LLM inference" at batch 1, 4, 16 and 64 and sequence 64,
on Llama-2-7B. So the default is that shape with random weights: a batch of prompts of 64 tokens is prefilled in one
step, then a few tokens are decoded. All rungs live in one process and take turns, if memory holds their weights
beside one another; else one after the other, which the result says ("alternating").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from time import perf_counter
from typing import Any

from ridgeline import LLM, SamplingParams
from ridgeline.core.errors import DoesNotFit, InvalidArgument, KernelRefused
from ridgeline.core.step import StepRecord
from ridgeline.study.attention.bench import INTERVALS, describe, device_name, device_of, versions
from ridgeline.study.attention.cases import REPORT_BATCHES, REPORT_SEQUENCE, REPORT_SPEEDUPS
from ridgeline.study.attention.report import Table, seconds, times
from ridgeline.study.attention.rungs import STANDARD, rungs
from ridgeline.study.timing import clocks, forget, interval, ratios

POOL_BLOCK = 64
POOL_SPARE_BLOCKS = 8
TIMES = ("first_token_s", "decode_step_s", "total_s")

Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run. model: a checkpoint, or a config.json; None is the Llama-2-7B shape. new: tokens decoded."""

    model: str | None = None
    batches: Sequence[int] = REPORT_BATCHES
    sequence: int = REPORT_SEQUENCE
    new: int = 8
    rounds: int = 10
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "dummy"

    def __post_init__(self) -> None:
        single = {"sequence": self.sequence, "rounds": self.rounds, "new_tokens": self.new}
        for name, values in (("batch", tuple(self.batches)), *((name, (one,)) for name, one in single.items())):
            if not values or min(values) < 1:
                raise InvalidArgument(name, f"must be at least 1, not {', '.join(map(str, values)) or 'nothing'}")


@dataclass(slots=True)
class Sample:
    """Seconds of one batch: its prefill step, the median decode step, all of it; and the tokens it made."""

    first_token_s: float
    decode_step_s: float | None
    total_s: float
    tokens: list[list[int]]


def shape() -> Path:
    """The config.json of Llama-2-7B that ships with ridgeline."""
    return Path(str(resources.files("ridgeline") / "assets" / "shapes" / "llama-2-7b.config.json"))


def run(settings: Settings, attention: Sequence[str] = (), progress: Progress = _silent) -> dict[str, Any]:
    """Time inference with each value of attention_backend; plain data for JSON.

    attention: values of attention_backend, all rungs of this device if empty (those that refuse the model are listed
    with their reason). Raises what LLM raises for a named one.
    """
    device = device_of(settings.device)
    wanted = list(attention) or list(rungs(device))
    model = str(shape()) if settings.model is None else settings.model
    left_out: dict[str, str] = {}
    samples: dict[int, dict[str, list[Sample]]] = {batch: {name: [] for name in wanted} for batch in settings.batches}
    total = len(wanted) * (1 + len(settings.batches) * (settings.rounds + 1))
    moments = {"before": clocks(device)}
    steps = iter(range(total + 1))

    def tell(what: str) -> None:
        progress(next(steps, total), total, what)

    alternating = True
    try:
        with ExitStack() as stack:
            models = {}
            for name in wanted:
                tell(f"loading with {name}")
                try:
                    models[name] = stack.enter_context(_model(model, name, settings))
                except KernelRefused as error:
                    if attention:
                        raise
                    left_out[name] = str(error)
            _rounds(models, settings, samples, tell)
    except DoesNotFit:
        if len(wanted) == 1:
            raise
        alternating = False
        for by_name in samples.values():
            for taken in by_name.values():
                taken.clear()
        for name in wanted:
            forget(device)
            if name not in left_out:
                with _model(model, name, settings) as llm:
                    _rounds({name: llm}, settings, samples, tell)
    progress(total, total, "done")
    return {
        "benchmark": "latency",
        "model": Path(model).name,
        "weights": "random" if settings.load_format == "dummy" else "of the checkpoint",
        "device": describe(device),
        "versions": versions(),
        "settings": {
            "batches": list(settings.batches), "sequence": settings.sequence, "new_tokens": settings.new,
            "rounds": settings.rounds, "dtype": settings.dtype, "alternating": alternating,
        },
        "left_out": left_out,
        "intervals": INTERVALS,
        "clocks": {**moments, "after": clocks(device)},
        "cells": [
            {"batch": batch, "results": _judged(batch, {name: taken for name, taken in by_name.items() if taken})}
            for batch, by_name in samples.items()
        ],
    }  # fmt: skip


@contextmanager
def _model(model: str, backend: str, settings: Settings) -> Iterator[LLM]:
    """An engine whose largest step is the largest batch's prefill."""
    most, length = max(settings.batches), settings.sequence + settings.new
    llm = LLM(
        model,
        attention_backend=backend,
        device=settings.device,
        dtype=settings.dtype,
        load_format=settings.load_format,
        max_model_len=length,
        max_num_seqs=most,
        max_num_batched_tokens=max(most * settings.sequence, length),
        kv_cache_memory_bytes=_pool_bytes(model, settings, most, length),
        enable_prefix_caching=False,
        seed=0,
    )
    with llm:
        yield llm


def _pool_bytes(model: str, settings: Settings, requests: int, length: int) -> int:
    """What the KV blocks of all requests take, and a few more."""
    from ridgeline.kv.layout import KVLayout
    from ridgeline.models import parse_config
    from ridgeline.models.checkpoint import locate
    from ridgeline.models.spec import read_config

    directory = locate(model)
    spec = parse_config(read_config(directory), str(directory))
    item_bytes = 4 if settings.dtype == "float32" or device_name(settings.device) == "cpu" else 2
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, item_bytes, POOL_BLOCK)
    return (requests * layout.blocks_for(length) + POOL_SPARE_BLOCKS) * layout.bytes_per_block


def _rounds(
    models: dict[str, LLM], settings: Settings, samples: dict[int, dict[str, list[Sample]]], tell: Callable[[str], None]
) -> None:
    """Every model once a round, in an order that turns around; the first round warms up and is dropped."""
    for batch in settings.batches:
        for number in range(-1, settings.rounds):
            for name in models if number % 2 else reversed(list(models)):
                tell(f"batch {batch}: {name}")
                taken = _sample(models[name], batch, settings, seed=number)
                if number >= 0:
                    samples[batch][name].append(taken)


def _sample(llm: LLM, batch: int, settings: Settings, seed: int) -> Sample:
    draw = random.Random(f"{batch}/{seed}")
    vocabulary = llm.built.spec.vocabulary
    prompts = [[draw.randrange(vocabulary) for _ in range(settings.sequence)] for _ in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=settings.new, ignore_eos=True, detokenize=False)
    records: list[StepRecord] = []
    listeners = llm.built.engine.listeners
    listeners.append(records.append)
    try:
        start = perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        total = perf_counter() - start
    finally:
        listeners.remove(records.append)
    first = [one for one in records if one.kind != "decode"]
    decode = [one.host_s + one.device_s for one in records if one.kind == "decode" and len(one.spans) == batch]
    return Sample(
        first_token_s=sum(one.host_s + one.device_s for one in first),
        decode_step_s=sorted(decode)[len(decode) // 2] if decode else None,
        total_s=total,
        tokens=[list(one.outputs[0].token_ids) for one in outputs],
    )


def _judged(batch: int, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """Medians, and speedups over standard by pairs of the same round."""
    results: dict[str, Any] = {}
    for name, taken in samples.items():
        one: dict[str, Any] = {}
        for key in TIMES:
            values = [getattr(sample, key) for sample in taken]
            if None in values:
                continue
            one[key] = list(interval(values))
            one[f"{key}_samples"] = values
            if STANDARD in samples and name != STANDARD:
                theirs = [getattr(sample, key) for sample in samples[STANDARD]]
                one[f"{key.removesuffix('_s')}_over_standard"] = list(ratios(theirs, values))
        if STANDARD in samples:
            pairs = [(a, b) for own, other in zip(taken, samples[STANDARD]) for a, b in zip(own.tokens, other.tokens)]
            one["first_tokens_as_standard"] = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
        if batch in REPORT_SPEEDUPS:
            one["report_speedup"] = REPORT_SPEEDUPS[batch]
        results[name] = one
    return results


def tables(result: dict[str, Any]) -> list[Table]:
    """The result in words."""
    asked = result["settings"]
    rows = []
    for cell in result["cells"]:
        for name, one in cell["results"].items():
            shown = [seconds(one[key][0]) if key in one else "-" for key in TIMES]
            gains = (one.get(f"{key.removesuffix('_s')}_over_standard") for key in TIMES)
            against = ["" if gain is None else times(gain) for gain in gains]
            printed = f"{one['report_speedup']:.2f}" if "report_speedup" in one and name != STANDARD else ""
            pairs = (part for pair in zip(shown, against) for part in pair)
            rows.append((str(cell["batch"]), name, *pairs, printed))
    title = f"{result['model']} ({result['weights']} weights): {asked['sequence']} tokens in, {asked['new_tokens']} out"
    over = "over standard"
    columns = ("batch", "attention", "prefill", over, "decode step", over, "all of it", over, "the report's")
    return [Table(title, columns, tuple(rows))]


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table."""
    lines = [f"{name} left out: {reason}" for name, reason in result["left_out"].items()]
    if not result["settings"]["alternating"]:
        lines.append("models did not fit side by side: they ran one after the other, so compare with care")
    return lines
