"""Bytes that each rung really moves, read from a GPU's hardware counters by NVIDIA's profiler `ncu`.

Knows how to run itself under `ncu` and how to read its table. It must not know what the bytes mean. The
child process (this module's `main`) makes the tensors anew, clears the L2 cache before each rung, and puts a marker
kernel before and behind it, so that rows of the profiler's table can be told apart. Behind the rung a buffer
larger than the cache is read: what that drives out of the cache was still to be written to memory, and is the rung's.

Clocks are left alone (--clock-control none), and so are the caches between kernels (--cache-control none): a rung of
several kernels finds in the cache what it left there, as in life.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ridgeline.core.errors import KernelRefused
from ridgeline.study.attention.cases import Case

METRICS = {
    "hbm_read_bytes": "dram__bytes_read.sum",
    "hbm_write_bytes": "dram__bytes_write.sum",
    "l2_read_bytes": "lts__t_sectors_srcunit_tex_op_read.sum",
    "l2_write_bytes": "lts__t_sectors_srcunit_tex_op_write.sum",
    "l2_all_bytes": "lts__t_bytes.sum",
}
SECTOR_BYTES = 32
MARKER = "spin_kernel"
"""Part of the name of the kernel behind torch.cuda._sleep."""
TIMEOUT_S = 400
CACHES = 4
"""The buffer that clears the L2 cache is this many times as large."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes by counter of one call, and how many kernels it was.

    later_write_bytes: written to memory only when the cache was cleared behind the call. l2_read_bytes and
    l2_write_bytes: what multiprocessors asked of the L2 cache; l2_all_bytes: all that its slices served, transfers
    between its halves included.
    """

    kernels: int
    hbm_read_bytes: float
    hbm_write_bytes: float
    later_write_bytes: float
    l2_read_bytes: float
    l2_write_bytes: float
    l2_all_bytes: float

    @property
    def hbm_bytes(self) -> float:
        return self.hbm_read_bytes + self.hbm_write_bytes + self.later_write_bytes

    @property
    def l2_bytes(self) -> float:
        return self.l2_read_bytes + self.l2_write_bytes

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "hbm_bytes": self.hbm_bytes, "l2_bytes": self.l2_bytes}


def profiler() -> str:
    """The path of ncu. Raises KernelRefused if this machine has none."""
    found = shutil.which("ncu")
    if found is None:
        raise KernelRefused("counters: the profiler ncu (NVIDIA Nsight Compute) is not on the PATH")
    return found


Job = tuple[Case, Sequence[str]]
"""A case, and the names of the rungs and peers to be run on it."""


def measure(jobs: Sequence[Job]) -> list[dict[str, Measured]]:
    """Run every job's contestants once under the profiler, in one process; a dictionary by name for each job.

    Raises KernelRefused with what the profiler said if it fails.
    """
    asked = json.dumps([{"case": asdict(case), "names": list(names)} for case, names in jobs])
    command = [
        profiler(), "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off",
        "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS.values()),
        sys.executable, "-m", "ridgeline.study.attention.counters", asked,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise KernelRefused(f"counters: the profiled process took more than {TIMEOUT_S} s") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-400:]
        raise KernelRefused(f"counters: the profiled process ended with status {done.returncode}: {said}")
    found = iter(parse(done.stdout, sum(len(names) for _, names in jobs)))
    return [{name: next(found) for name in names} for _, names in jobs]


def parse(text: str, count: int) -> list[Measured]:
    """The profiler's table as one Measured a call: markers open each call and its clearing in turn."""
    groups: list[list[Mapping[str, float]]] = []
    for row in _rows(text):
        if MARKER in row["Kernel Name"]:
            groups.append([])
        elif groups:
            groups[-1].append({name: float(row[metric].replace(",", "") or 0) for name, metric in METRICS.items()})
    if len(groups) != 2 * count:
        raise KernelRefused(f"counters: the profiler's table has {len(groups)} markers where {2 * count} were set")
    return [_summed(call, clearing) for call, clearing in zip(groups[::2], groups[1::2])]


def _rows(text: str) -> Iterator[dict[str, str]]:
    """Lines of the table as dictionaries: behind whatever the process printed, a line of names and one of units."""
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise KernelRefused(f"counters: the profiler printed no table: {' '.join(text.split())[-400:]}")
    table = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    for row in table:
        if row.get("ID"):  # the line of units has none
            yield row


def _summed(call: Sequence[Mapping[str, float]], clearing: Sequence[Mapping[str, float]]) -> Measured:
    def total(name: str, rows: Sequence[Mapping[str, float]] = call) -> float:
        return sum(row[name] for row in rows)

    return Measured(
        kernels=len(call),
        hbm_read_bytes=total("hbm_read_bytes"),
        hbm_write_bytes=total("hbm_write_bytes"),
        later_write_bytes=total("hbm_write_bytes", clearing),
        l2_read_bytes=SECTOR_BYTES * total("l2_read_bytes"),
        l2_write_bytes=SECTOR_BYTES * total("l2_write_bytes"),
        l2_all_bytes=total("l2_all_bytes"),
    )


def main(argument: str) -> None:
    """The child: every named rung or peer on its case, each between two markers."""
    import torch

    from ridgeline.study.attention import contestants, tensors

    jobs: list[dict[str, Any]] = json.loads(argument)
    device = torch.device("cuda", 0)
    runtime = torch.cuda.cudart()
    cache = torch.ones(CACHES * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
    for job in jobs:
        case = Case(**job["case"])
        call = tensors.make(case, device)
        for name in job["names"]:
            works = contestants.by_name(name, device).prepare(case, [call])
            with works.context():
                for _ in range(2):
                    works.calls[0]()
                cache.sum()
                torch.cuda.synchronize()
                runtime.cudaProfilerStart()
                torch.cuda._sleep(1000)
                works.calls[0]()
                torch.cuda._sleep(1000)
                cache.sum()
                torch.cuda.synchronize()
                runtime.cudaProfilerStop()
        del call
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1])
