"""How near decoding comes to the memory: Qwen3-0.6B's shape on a CPU, random weights, batch 1.

A decode step must read every weight and the keys and values of its request once. Their bytes divided by
the time a token is a read rate; it is set against the best that the machine shows over 1 GiB or more, of
a sum, a copy (read and written bytes both counted), torch's matrix-vector product and ridgeline's own.
Probes and decoding alternate, so that a noisy neighbour meets both.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_cpu import stream
from benchmarks.record import Record, alternate, interval, losing, parser, ratios, seconds, use_threads
from benchmarks.trace import DATA
from ridgeline import LLM
from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY
from ridgeline.ops.weight import Weight

TARGET = 0.85
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 512,
}


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.prompt, options.new, options.rounds, options.probe_bytes = 8, 6, 2, 8 << 20
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=7)
    result.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    result.add_argument("--prompt", type=int, default=32)
    result.add_argument("--new", type=int, default=48, help="tokens after the first to time in each round")
    result.add_argument("--probe-bytes", type=int, default=1 << 30, help="size of what the probes read")
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    record = Record("qwen3-bandwidth", options)
    record.settings = {
        "shape": "Qwen3-0.6B" if not options.quick else "tiny",
        "weights": "random",
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "probe_bytes": options.probe_bytes,
        "rounds": options.rounds,
    }
    values = json.loads((DATA / "qwen3-0.6b.config.json").read_text(encoding="utf-8"))
    if options.quick:
        values.update(TINY)
    shares = {}
    with tempfile.TemporaryDirectory(prefix="ridgeline-qwen3-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(values), encoding="utf-8")
        for dtype in options.dtypes:
            shares[dtype] = one_dtype(record, config, dtype)
    best = max(shares, key=lambda name: shares[name].median)
    record.target(
        "Qwen3-0.6B shape, decode at batch 1: share of the best read rate",
        f"≥ {100 * TARGET:.0f} %",
        "; ".join(f"{name} {share.show('.1f', ' %', 100)}" for name, share in shares.items()),
        shares[best].median >= TARGET,
    )
    record.note("each round's share is against the best probe of that round; the line asks for bf16 or fp32")
    return record


def one_dtype(record: Record, config: Path, dtype: str) -> Any:
    options = record.options
    vocabulary = json.loads(config.read_text(encoding="utf-8"))["vocab_size"]
    probed = probes(options.probe_bytes, getattr(torch, dtype))
    context = options.prompt + options.new + 1
    with LLM(
        config, load_format="dummy", dtype=dtype, device="cpu", max_model_len=context, max_num_seqs=1, seed=0
    ) as llm:
        weight_bytes = llm.built.ledger.weight_bytes
        # token t of the decode sees prompt + t keys: t = 1 … new
        kv_bytes = (options.prompt + (options.new + 1) / 2) * llm.built.ledger.bytes_per_token
        bytes_a_token = weight_bytes + kv_bytes

        def decode(number: int) -> float:
            draw = random.Random(number)
            tokens = stream(llm, [draw.randrange(vocabulary) for _ in range(options.prompt)], options.new + 1)
            return bytes_a_token / tokens.decode_s

        arms: dict[str, Callable[[int], float]] = {"decode": decode}
        arms.update(probed)
        rates = alternate(arms, options.rounds)
        kernels = {row.op: row.kernel for row in llm.built.table.rows if row.work == "decode"}
    record.observe(dtype)
    best_of_round = [max(rates[name][number] for name in probed) for number in range(options.rounds)]
    share = ratios(rates["decode"], best_of_round)
    highest = max(best_of_round)
    strict = interval([rate / highest for rate in rates["decode"]])
    record.timings[dtype] = {name: {"bytes_per_s": [round(one) for one in values]} for name, values in rates.items()}
    record.timings[dtype]["seconds_a_token"] = seconds(bytes_a_token / one for one in rates["decode"])
    record.summary[dtype] = {
        "weight_bytes": weight_bytes,
        "kv_bytes_a_token": kv_bytes,
        "rates": {name: interval(values) for name, values in rates.items()},
        "share_of_best_probe": share,
        "share_of_best_single_reading": strict,
        "tokens_per_s": interval([one / bytes_a_token for one in rates["decode"]]),
        "kernels": kernels,
    }
    rows = [[name, interval(values).show(".1f", scale=1e-9), ""] for name, values in rates.items() if name != "decode"]
    rows.append(
        [
            "decode",
            interval(rates["decode"]).show(".1f", scale=1e-9),
            losing(share.show(".1f", " %", 100), share.median < TARGET),
        ]
    )
    rows.append(["decode, against the best single reading of all", "", strict.show(".1f", " %", 100)])
    speed = record.summary[dtype]["tokens_per_s"]
    record.table(
        f"Read rates, {dtype}, {options.threads} threads; decode: {bytes_a_token / 1e9:.3f} GB a token, "
        f"{speed.show('.1f')} tok/s",
        ["", "GB/s", "share of the best"],
        rows,
    )
    return share


def probes(size: int, dtype: torch.dtype) -> dict[str, Callable[[int], float]]:
    """Read rates in bytes/s over `size` bytes: each probe is the best of three passes."""
    plain = torch.rand(size // 4)
    half = plain.numel() // 2
    columns = 1 << 14 if size >= 1 << 30 else 1 << 10
    rows = size // dtype.itemsize // columns
    matrix = torch.empty(rows, columns, dtype=dtype).uniform_(-1, 1)
    vector = torch.ones(columns, dtype=dtype)
    read_bytes = matrix.numel() * dtype.itemsize
    found = {
        "sum (torch, fp32)": timed(lambda: plain.sum(), plain.numel() * 4),
        "copy (torch)": timed(lambda: plain[half : 2 * half].copy_(plain[:half]), 2 * half * 4),
        "GEMV (torch)": timed(lambda: torch.mv(matrix, vector), read_bytes),
    }
    load_kernels("cpu")
    own = REGISTRY["linear"].kernels.get("cpu")
    if own is not None:
        packed = Weight.dense_from(matrix).to_panels()
        row = vector[None, :]
        if own.accepts is None or own.accepts(row, packed) is None:
            found["GEMV (ridgeline)"] = timed(lambda: own.call(row, packed), read_bytes)
    return found


def timed(work: Callable[[], object], size: int, passes: int = 3) -> Callable[[int], float]:
    @torch.inference_mode()
    def probe(number: int) -> float:
        best = float("inf")
        for _ in range(passes):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        return size / best

    return probe


if __name__ == "__main__":
    main()
