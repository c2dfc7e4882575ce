"""Bytes that each rung really moves, read from a GPU's hardware counters by NVIDIA's profiler `ncu`.

Knows how to run itself under `ncu` and how to read its table. It must not know what the bytes mean. The
child process (this module's `main`) works through the same copies of the inputs as the timing does, and counts
some of the calls once all copies have gone by: so inputs come from memory if they do so in the timing, and what a
call leaves in the cache to be written later is made up for by what earlier calls have left. A marker kernel before each
contestant tells the rows of the profiler's table apart.

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
from typing import NamedTuple

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
COUNTED_CALLS = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes by counter of one call, and how many kernels it was: averages over `calls` calls.

    l2_read_bytes and l2_write_bytes: what multiprocessors asked of the L2 cache; l2_all_bytes: all that its slices
    served, transfers between its halves included.
    """

    calls: int
    kernels: float
    hbm_read_bytes: float
    hbm_write_bytes: float
    l2_read_bytes: float
    l2_write_bytes: float
    l2_all_bytes: float

    @property
    def hbm_bytes(self) -> float:
        return self.hbm_read_bytes + self.hbm_write_bytes

    @property
    def l2_bytes(self) -> float:
        return self.l2_read_bytes + self.l2_write_bytes

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "hbm_bytes": self.hbm_bytes, "l2_bytes": self.l2_bytes}


class Job(NamedTuple):
    """A case, copies of its inputs, and the names of the rungs and peers to be run on it."""

    case: Case
    copies: int
    names: Sequence[str]

    @property
    def calls(self) -> int:
        """Calls that are counted."""
        return min(self.copies, COUNTED_CALLS)


def profiler() -> str:
    """The path of ncu. Raises KernelRefused if this machine has none."""
    found = shutil.which("ncu")
    if found is None:
        raise KernelRefused("counters: the profiler ncu (NVIDIA Nsight Compute) is not on the PATH")
    return found


def measure(jobs: Sequence[Job]) -> list[dict[str, Measured]]:
    """Run every job's contestants once under the profiler, in one process; a dictionary by name for each job.

    Raises KernelRefused with what the profiler said if it fails.
    """
    asked = json.dumps([{"case": asdict(job.case), "copies": job.copies, "names": list(job.names)} for job in jobs])
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
    found = iter(parse(done.stdout, [job.calls for job in jobs for _ in job.names]))
    return [{name: next(found) for name in job.names} for job in jobs]


def parse(text: str, calls: Sequence[int]) -> list[Measured]:
    """The profiler's table, a Measured a contestant; calls: how many of each were counted behind its marker."""
    groups: list[list[Mapping[str, float]]] = []
    for row in _rows(text):
        if MARKER in row["Kernel Name"]:
            groups.append([])
        elif groups:
            groups[-1].append({name: float(row[metric].replace(",", "") or 0) for name, metric in METRICS.items()})
    if len(groups) != len(calls):
        raise KernelRefused(f"counters: the profiler's table has {len(groups)} markers where {len(calls)} were set")
    return [_averaged(rows, count) for rows, count in zip(groups, calls)]


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


def _averaged(rows: Sequence[Mapping[str, float]], calls: int) -> Measured:
    def average(name: str) -> float:
        return sum(row[name] for row in rows) / calls

    return Measured(
        calls=calls,
        kernels=len(rows) / calls,
        hbm_read_bytes=average("hbm_read_bytes"),
        hbm_write_bytes=average("hbm_write_bytes"),
        l2_read_bytes=SECTOR_BYTES * average("l2_read_bytes"),
        l2_write_bytes=SECTOR_BYTES * average("l2_write_bytes"),
        l2_all_bytes=average("l2_all_bytes"),
    )


def main(argument: str) -> None:
    """The child: every named rung or peer on its case; its last calls of a second pass over all copies are counted."""
    import torch

    from ridgeline.study.attention import contestants, tensors

    device = torch.device("cuda", 0)
    runtime = torch.cuda.cudart()
    for values in json.loads(argument):
        job = Job(Case(**values["case"]), values["copies"], values["names"])
        inputs = [tensors.make(job.case, device, seed) for seed in range(job.copies)]
        for name in job.names:
            works = contestants.by_name(name, device).prepare(job.case, inputs)
            with works.context():
                for call in (*works.calls, *works.calls[: -job.calls]):
                    call()
                torch.cuda.synchronize()
                runtime.cudaProfilerStart()
                torch.cuda._sleep(1000)
                for call in works.calls[-job.calls :]:
                    call()
                torch.cuda.synchronize()
                runtime.cudaProfilerStop()
        del inputs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1])
