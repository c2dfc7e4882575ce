"""The most memory that one call needs beyond its inputs, on a GPU by torch's allocator, on a CPU by the system.

Knows how peaks are read. It must not know kernels. On a CPU every contestant has a process of its own (this module's
`main`), with an allocator that gives freed memory back at once, and the kernel's own high-water mark of resident
memory is set back before each call.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ridgeline.core.errors import KernelRefused
from ridgeline.study.attention.cases import Case

TIMEOUT_S = 600
# glibc: every block of 64 KiB or more comes from the system and returns to it.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def on_cuda(run: Callable[[], Any]) -> int:
    """Peak bytes of one call beyond what is allocated before it: output, scores, workspaces."""
    import torch

    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_cpu(cases: Sequence[Case], name: str, threads: int) -> list[int | str]:
    """Peak resident bytes of one call of a contestant beyond its inputs, case by case, from a child process.

    A string is a refusal. Raises KernelRefused with what the child said if it fails.
    """
    asked = json.dumps({"cases": [asdict(one) for one in cases], "name": name, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "ridgeline.study.attention.memory", asked],
        capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **GIVES_BACK}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise KernelRefused(f"memory of {name}: its process ended with status {done.returncode}: {done.stderr[-400:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def growth(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The exponent n of bytes ~ length^n between the last two lengths; None if that cannot be said."""
    pairs = [(length, value) for length, value in zip(lengths, values) if value > 0]
    if len(pairs) < 2 or pairs[-1][0] == pairs[-2][0]:
        return None
    (short, few), (long, many) = pairs[-2:]
    return math.log(many / few) / math.log(long / short)


def status_bytes(field: str) -> int:
    """A size of this process (VmRSS, VmHWM) as the kernel of the system sees it. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise KernelRefused(f"memory: the system does not tell {field}")


def peak_of(run: Callable[[], Any]) -> int:
    """Peak resident bytes of one call beyond those before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present
    before = status_bytes("VmRSS")
    kept = run()
    peak = status_bytes("VmHWM")
    del kept
    return max(peak - before, 0)


def main(argument: str) -> None:
    """The child: one contestant, case by case."""
    import torch

    from ridgeline.study.attention import contestants, tensors

    asked: Mapping[str, Any] = json.loads(argument)
    torch.set_num_threads(asked["threads"])
    device = torch.device("cpu")
    contestant = contestants.by_name(asked["name"], device)
    for values in asked["cases"]:
        case = Case(**values)
        try:
            small = Case(**{**values, "batch": 1, "new": min(case.new, 16), "visible": min(case.visible, 16)})
            warm = contestant.prepare(small, [tensors.make(small, device)])
            works = contestant.prepare(case, [tensors.make(case, device)])
        except KernelRefused as error:
            print(json.dumps(str(error)), flush=True)
            continue
        with works.context():
            warm.calls[0]()  # whatever is loaded or compiled comes first
            peak = peak_of(works.calls[0])
        print(json.dumps(peak), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
