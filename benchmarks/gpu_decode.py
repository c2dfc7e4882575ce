"""The engine's whole decode step on Llama-3.1-8B's shape: op by op and as a CUDA graph, with and without overlap.

A step is what a server would do: scheduling, preparation, forward, sampling, results on the host. One engine
with random bf16 weights runs every arm on the same requests, in alternating stretches; contexts grow around
--context. `op by op` launches each kernel from Python, `graphs` replays captured steps; `overlap` reads results
one step late. Under the step times stands where the device's time goes: kernels of a replayed step as the
profiler sees them, beside each op's floor (its bytes at --rate).

    PYTHONPATH=src python3 -m benchmarks.gpu_decode --out $OUT
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.record import Interval, Record, interval, parser, seconds
from benchmarks.trace import DATA
from ridgeline import LLM, SamplingParams
from ridgeline.core.step import Spans, StepRecord
from ridgeline.kv.layout import KVLayout
from ridgeline.models import parse_config

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
WARM_STEPS = 4
TARGETS_MS = {1: 4.7, 64: 6.5, 256: 14.0}
VLLM_MS = {1: 4.86, 8: 5.12, 64: 6.91, 256: 14.7}
"""vLLM 0.26 with FA3, CUDA graphs and async scheduling, measured on such a card on 2026-11-20."""

KERNELS = {
    "_rms_kernel": "norm",
    "_layer_norm_kernel": "norm",
    "_rope_kernel": "rope_kv_write",
    "_gated_row_kernel": "gated_linear",
    "_fused_kernel": "gated_linear",
    "_gate_kernel": "gated_linear (gate)",
    "_row_kernel": "linear",
    "_few_kernel": "linear",
    "_stretch_kernel": "sample",
    "_choose_kernel": "sample",
    "_split_kernel": "attention",
    "_merge_kernel": "attention",
    "_long_kernel": "attention",
    "decode": "attention",
    "merge": "attention",
    "attention": "attention",
    "indexSelect": "embed",
    "embedding": "embed",
    "_feed_kernel": "feed",
    "Memcpy": "copies",
    "copy": "copies",
    "nvjet": "cuBLAS",
    "gemm": "cuBLAS",
    "cutlass": "cuBLAS",
    "splitK": "cuBLAS",
    "cublas": "cuBLAS",
    "gemv": "cuBLAS",
}
"""Part of a kernel's name -> what it serves; the first that fits."""


@dataclass(frozen=True)
class Arm:
    name: str
    graphs: bool
    overlap: bool


ARMS = (
    Arm("op by op", False, False),
    Arm("op by op, overlap", False, True),
    Arm("graphs", True, False),
    Arm("graphs, overlap", True, True),
)


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.batches, options.context, options.steps, options.rounds = [1, 3], 48, 3, 2
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=5)
    result.add_argument("--device", default="cuda")
    result.add_argument("--kernels", default="auto")
    result.add_argument("--attention", default="auto", help="which kernel of attention serves")
    result.add_argument("--config", type=Path, default=DATA / "llama-3.1-8b.config.json")
    result.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    result.add_argument("--context", type=int, default=640, help="mean tokens in the cache while decoding")
    result.add_argument("--max-model-len", type=int, default=4096)
    result.add_argument("--steps", type=int, default=20, help="decode steps in one stretch")
    result.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], choices=[arm.name for arm in ARMS])
    result.add_argument("--rate", type=float, default=4.2, help="TB/s that floors are counted at")
    return result


def measure(options: argparse.Namespace) -> Record:
    record = Record("gpu-decode", options)
    values = json.loads(options.config.read_text(encoding="utf-8"))
    if options.quick:
        values.update(TINY)
    spec = parse_config(values, str(options.config))
    arms = [arm for arm in ARMS if arm.name in options.arms]
    total = len(arms) * (options.rounds * (options.steps + WARM_STEPS) + options.steps) + 4 * WARM_STEPS
    start = max(options.context - total // 2, 1)
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, 2)
    blocks = (max(options.batches) + 2) * layout.blocks_for(start + total + 64)
    pool = max(blocks, layout.blocks_for(options.max_model_len)) * layout.bytes_per_block
    record.settings = {
        "shape": options.config.name,
        "dtype": "bfloat16",
        "weights": "random",
        "context": [start, start + total],
        "steps_a_stretch": options.steps,
        "rounds": options.rounds,
        "max_model_len": options.max_model_len,
        "sampling": "greedy",
    }
    with tempfile.TemporaryDirectory(prefix="ridgeline-8b-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        began = time.perf_counter()
        llm = LLM(
            folder,
            load_format="dummy",
            dtype="bfloat16",
            device=options.device,
            kernels=options.kernels,
            attention_backend=options.attention,
            max_model_len=options.max_model_len,
            max_num_seqs=max(options.batches),
            kv_cache_memory_bytes=pool,
            seed=0,
        )
        if not options.quick:  # as a server does once it has started: a collection would go through all of it
            gc.collect()
            gc.freeze()
        with llm:
            record.summary["start_s"] = round(time.perf_counter() - began, 1)
            record.settings["kernels"] = {f"{row.op} ({row.work})": row.kernel for row in llm.built.table.rows}
            record.settings["memory"] = llm.built.lines()[1]
            if llm.built.runner.graphs is None:
                arms = [arm for arm in arms if not arm.graphs]
            rows = [cell(record, llm, batch, start, arms) for batch in options.batches]
            record.table(
                f"Decode step, ms, {options.config.name}, bf16, {options.device}, context {start} to {start + total}",
                ["batch", *(arm.name for arm in arms), "host", "vLLM", "floor"],
                rows,
            )
    return record


class Decoding:
    """`batch` requests in the engine, all decoding, whose way of running can be changed between steps."""

    def __init__(self, llm: LLM, batch: int, prompt: int) -> None:
        self.engine, self.runner, self.batch = llm.built.engine, llm.built.runner, batch
        self.graphs = self.runner.graphs
        draw = random.Random(batch)
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, detokenize=False)
        self.names = []
        for place in range(batch):
            ids = [draw.randrange(llm.built.spec.vocabulary) for _ in range(prompt)]
            name = f"decode-{batch}-{place}"
            _, requests = llm.intake.requests(name, {"prompt_token_ids": ids}, params)
            self.engine.add(requests[0])
            self.names.append(name)
        self.take(ARMS[0])
        while len(self.engine.step()) < batch:
            pass

    def take(self, arm: Arm) -> None:
        """Go on as `arm`. Nothing is unread when the change is made."""
        self.engine.overlap = False
        self.engine.step()
        self.runner.graphs = self.graphs if arm.graphs else None
        self.engine.overlap = arm.overlap
        for _ in range(WARM_STEPS - 1):
            self.engine.step()

    def stretch(self, steps: int) -> list[float]:
        """Seconds of each of `steps` calls of the engine; each brings every request a token."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            events = self.engine.step()
            times.append(time.perf_counter() - start)
            assert len(events) == self.batch, "not a pure decode step"
        return times

    def close(self) -> None:
        self.runner.graphs = self.graphs
        for name in self.names:
            self.engine.abort(name)


def cell(record: Record, llm: LLM, batch: int, prompt: int, arms: Sequence[Arm]) -> list[str]:
    options = record.options
    decoding = Decoding(llm, batch, prompt)
    times: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    heard: dict[str, list[StepRecord]] = {arm.name: [] for arm in arms}
    for number in range(options.rounds):
        for arm in arms if number % 2 == 0 else list(reversed(arms)):
            decoding.take(arm)
            listener = heard[arm.name].append
            decoding.engine.listeners.append(listener)
            times[arm.name].append(decoding.stretch(options.steps))
            decoding.engine.listeners.remove(listener)
    steps: dict[str, Interval] = {name: interval([sum(one) / len(one) for one in runs]) for name, runs in times.items()}
    best = arms[-1].name
    host = {name: median(one.host_s for one in records) for name, records in heard.items()}
    device = {name: median(one.device_s for one in records) for name, records in heard.items()}
    if options.device == "cuda":
        breakdown(record, llm, decoding, batch, arms[-1])
    floor_s = llm.built.price.step(Spans((1,) * batch, (options.context,) * batch), batch).bytes / options.rate / 1e12
    decoding.close()
    record.observe(f"batch {batch}")
    record.timings[f"batch {batch}"] = {name: [seconds(one) for one in runs] for name, runs in times.items()}
    record.summary[f"batch {batch}"] = {
        "seconds_a_step": steps,
        "host_s": host,
        "device_s": device,
        "floor_s": floor_s,
        "padding": {name: records[-1].padding for name, records in heard.items()},
    }
    limit = TARGETS_MS.get(batch)
    if limit is not None and not options.quick:
        ms = 1e3 * steps[best].median
        record.target(
            f"the whole decode step at batch {batch}, context about {options.context} ({best})",
            f"<= {limit} ms (vLLM {VLLM_MS[batch]})",
            steps[best].show(".3f", " ms", 1e3),
            ms <= limit,
        )
    return [
        str(batch),
        *(steps[arm.name].show(".2f", scale=1e3) for arm in arms),
        f"{1e3 * host[best]:.2f}",
        str(VLLM_MS.get(batch, "")),
        f"{1e3 * floor_s:.2f}",
    ]


# Where the device's time goes


def served_by(kernel: str) -> str:
    """What a kernel serves, by its name."""
    return next((op for part, op in KERNELS.items() if part in kernel), kernel[:40])


def breakdown(record: Record, llm: LLM, decoding: Decoding, batch: int, arm: Arm) -> None:
    """Kernels of a few steps as the profiler sees them, by what they serve, and the floors of the ops."""
    from torch.profiler import ProfilerActivity, profile

    steps = 6
    decoding.take(arm)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            decoding.engine.step()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    first, last = float("inf"), 0.0
    for event in profiler.events() or []:
        if event.device_type.name != "CUDA" or not event.time_range.elapsed_us():
            continue
        first, last = min(first, event.time_range.start), max(last, event.time_range.end)
        for table, key in ((spent, served_by(event.name)), (names, event.name[:90])):
            table[key][0] += 1 / steps
            table[key][1] += event.time_range.elapsed_us() / steps
    meter = llm.built.price.meter(Spans((1,) * batch, (record.options.context,) * batch), batch)
    floors = {name: cost.bytes / record.options.rate / 1e6 for name, cost in meter.by_op().items()}
    rows = [
        [name, f"{count:.0f}", f"{us:.0f}", f"{floors[name]:.0f}" if name in floors else ""]
        for name, (count, us) in sorted(spent.items(), key=lambda item: -item[1][1])
    ]
    wall = (last - first) / steps
    busy = sum(us for _, us in spent.values())
    rows.append(["all kernels", f"{sum(count for count, _ in spent.values()):.0f}", f"{busy:.0f}", ""])
    rows.append(["a step under the profiler", "", f"{wall:.0f}", f"{sum(floors.values()):.0f}"])
    record.table(f"Batch {batch}, {arm.name}: µs a step", ["what", "launches", "µs", "floor"], rows)
    record.timings[f"batch {batch} kernels"] = {
        name: [round(count, 2), round(us, 2)] for name, (count, us) in sorted(names.items(), key=lambda i: -i[1][1])
    }
    record.summary[f"batch {batch} floors_us"] = {name: round(us, 1) for name, us in floors.items()}


if __name__ == "__main__":
    main()
