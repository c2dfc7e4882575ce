"""Errors of attention on numbers with outliers: the 16-bit rows of FlashAttention-3's table, for our kernels and peers.

q, k and v are N(0, 1) + N(0, 100) * Bernoulli(0.001). Root mean square errors against fp64 on the numbers as drawn (the
table's own way, in which rounding the inputs weighs most) and on the rounded numbers that kernels are given, which is
what a kernel adds itself.

    python -m benchmarks.attention_accuracy --device cpu
    PYTHONPATH=src python3 -m benchmarks.attention_accuracy --out $OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.record import Record, parser, use_threads
from ridgeline.study.attention import accuracy, peers, rungs
from ridgeline.study.attention.bench import device_name
from ridgeline.study.attention.cases import Case

GPU = ("standard", "v1", "v2", "sm90", "triton", "decode")
CPU = ("standard", "blocked", "fused", "cpu")
PEERS = {"cuda": ("fa2", "cudnn", "efficient", "fa3"), "cpu": ("torch-cpu",)}
BASELINE = "standard"
SHORT = {"float16": "fp16", "bfloat16": "bf16"}


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    use_threads(options.threads)
    if options.quick:
        options.sequence, options.heads, options.head_dims, options.draws = 128, 2, [64], 1
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=1)
    result.add_argument("--device", default="auto")
    result.add_argument("--dtypes", nargs="+", default=list(SHORT), choices=list(SHORT))
    result.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    result.add_argument("--sequence", type=int, help="4096 on a GPU, 512 on a CPU")
    result.add_argument("--heads", type=int, help="16 on a GPU, 4 on a CPU")
    result.add_argument("--draws", type=int, default=3)
    result.add_argument("--causal", action="store_true")
    result.add_argument("--rungs", default="", help="separated by commas; those that this device can run if left out")
    result.add_argument("--peers", default="", help="likewise; none for none")
    return result


def measure(options: argparse.Namespace) -> Record:
    device = torch.device(device_name(options.device))
    on_gpu = device.type == "cuda"
    sequence, heads = options.sequence or (4096 if on_gpu else 512), options.heads or (16 if on_gpu else 4)
    record = Record("attention-accuracy", options)
    record.settings = {
        "numbers": "N(0, 1) + N(0, 100) * Bernoulli(0.001)",
        "sequence": sequence,
        "heads": heads,
        "causal": options.causal,
        "draws": options.draws,
        "published_fp16": accuracy.PUBLISHED,
    }
    serving = rungs.rungs(device)
    named = options.rungs.split(",") if options.rungs else [one for one in (GPU if on_gpu else CPU) if one in serving]
    kernels = rungs.chosen(named, device)
    others = asked(options.peers, device, record)
    for head_dim in options.head_dims:
        for dtype in options.dtypes:
            case = Case("accuracy", 1, heads, heads, head_dim, sequence, sequence, options.causal, dtype)
            record.observe(f"{case.label} {dtype}")
            cell(record, case, accuracy.measure(case, device, kernels, others, options.draws))
    return record


def asked(names: str, device: torch.device, record: Record) -> dict[str, peers.Peer]:
    """Peers by name; of the usual ones those that are here."""
    known = peers.peers(device)
    if names:
        return peers.chosen(names.split(","), device)[0]
    found = {}
    for name in PEERS[device.type]:
        missing = known[name].missing()
        if missing is None:
            found[name] = known[name]
        else:
            record.note(f"{name} is left out: {missing}")
    return found


def cell(record: Record, case: Case, found: tuple[dict[str, accuracy.Errors], dict[str, str]]) -> None:
    errors, refused = found
    title = f"{SHORT[case.dtype]}, {case.label}"
    for name, reason in refused.items():
        record.note(f"{title}: {name} refuses: {reason}")
    baseline = errors.get(BASELINE)
    rows = []
    for name, one in errors.items():
        ratio = "" if baseline is None else f"{baseline.drawn / one.drawn:.2f}"
        own = "" if baseline is None else f"{baseline.rounded / one.rounded:.2f}"
        rows.append([name, f"{one.drawn:.2e}", ratio, f"{one.rounded:.2e}", own, f"{one.worst:.2e}"])
        if baseline is not None and name != BASELINE:
            record.target(
                f"{title}: {name}'s error",
                f"below {BASELINE}'s {baseline.drawn:.2e}",
                f"{one.drawn:.2e}",
                one.drawn < baseline.drawn,
            )
    record.summary[title] = {name: one._asdict() for name, one in errors.items()}
    record.table(
        f"{title}: root mean square error against fp64",
        ["", "as drawn", f"{BASELINE} over it", "as rounded", f"{BASELINE} over it", "largest"],
        rows,
    )


if __name__ == "__main__":
    main()
