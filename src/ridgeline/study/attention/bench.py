"""The benchmark of attention: every contestant on every case of an experiment, as one dictionary.

Knows how a case is run: tensors, check, timing in alternating rounds, traffic, memory. It must not know how results
are shown (report.py words them, plots.py draws them).

Both sides of a comparison run in one process, on the same tensors, in alternating order, inside CUDA graphs or not.
Copies of the inputs that are together four times the L2 cache are worked through in turn, so that a call does not
find its inputs there.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention_call import Call
from ridgeline.perf.limit import Limit, measure_limit
from ridgeline.study.attention import counters, memory, tensors, traffic
from ridgeline.study.attention.cases import REPORT_SPEEDUPS, REPORT_TOTALS_MS, Case, Choice, cases
from ridgeline.study.attention.contestants import Contestant, Field, assemble
from ridgeline.study.attention.rungs import STANDARD, WAITING
from ridgeline.study.timing import (
    GraphPool,
    Stretch,
    Works,
    alternate,
    clocks,
    forget,
    interval,
    on_cuda,
    on_host,
    ratios,
)

CACHES_BEYOND = 4
"""Copies of the inputs are together this many times the L2 cache."""
DECODE_CALLS = 64
"""Calls of a decode stretch, over as many copies of the keys as memory allows."""
COPIES_SHARE = 0.25
"""Of the free memory of a GPU, what copies may take."""
PACKAGES = ("ridgeline", "torch", "triton", "cuda-core", "flashinfer-python", "numba")

Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    rounds: pairs of a cell. graph: both sides captured in CUDA graphs (of no meaning on a CPU). eager: a second
    timing without a graph (None: in decode). copies: of the inputs (None: as said above). counters: read hardware
    counters too. check: compare outputs with fp64.
    """

    rounds: int = 20
    graph: bool = True
    eager: bool | None = None
    copies: int | None = None
    counters: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InvalidArgument("rounds", f"must be at least 1, not {self.rounds}")
        if self.copies is not None and self.copies < 1:
            raise InvalidArgument("copies", f"must be at least 1, not {self.copies}")


@dataclass
class Cell:
    """One case under measurement: results by contestant, filled in step by step."""

    case: Case
    copies: int
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    clocks: dict[str, dict[str, str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"case": self.case.as_dict(), "copies": self.copies, "clocks": self.clocks, "results": self.results}


def run(
    experiment: str,
    choice: Choice,
    settings: Settings,
    rungs: Sequence[str] = (),
    peers: Sequence[str] = (),
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Measure an experiment; the result is plain data for JSON.

    rungs, peers: names, all that can run if empty (peers=["none"]: no peer). progress(done, total, what) is told
    before each step. Raises InvalidArgument for a wrong option and KernelRefused for something named that cannot run;
    a contestant that refuses a single case is marked there with its reason.
    """
    device = device_of(choice.device)
    listed = cases(experiment, choice)
    if settings.counters:
        if device.type != "cuda":
            raise KernelRefused("counters: a CPU has no memory counters that a program may read; leave --counters out")
        counters.profiler()
    players = assemble(device, list(rungs), list(peers))
    if not players.contestants:
        raise InvalidArgument("rungs", "nobody is left to be measured")
    bench = _Bench(device, settings, players, progress)
    result = {
        "benchmark": "attention",
        "experiment": experiment,
        "device": describe(device),
        "versions": versions(),
        "settings": bench.settings_dict(),
        "contestants": [{"name": one.name, "kind": one.kind, "what": what_of(one)} for one in players.contestants],
        "left_out": players.left_out,
        "limit": None,
    }
    if experiment == "memory":
        return {**result, "cells": bench.memory(listed), "failures": [], "intervals": INTERVALS}
    limit = measure_limit(device, max(case.floor_bytes for case in listed), getattr(torch, choice.dtype))
    result["limit"] = {
        "read_bytes_per_s": limit.read_bytes_per_s,
        "dram_bytes_per_s": limit.dram_bytes_per_s,
        "flops_per_s": limit.flops_per_s,
    }
    cells = bench.speed(listed, limit)
    return {**result, "cells": cells, "failures": bench.failures, "intervals": INTERVALS}


INTERVALS = "[median, low, high], 95 % bootstrap of the median over rounds"


def device_name(wanted: str) -> str:
    """cpu, cuda or cuda:N; auto is the first GPU if there is one. Raises InvalidArgument for anything else."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise InvalidArgument("device", f"must be auto, cpu, cuda or cuda:N, not {wanted!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise InvalidArgument("device", f"{wanted} was asked for, this machine has {count} CUDA devices")
    return wanted


def device_of(wanted: str) -> torch.device:
    """The device of a name, made the current one if it is a GPU."""
    device = torch.device(device_name(wanted))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """Facts of a device for a result."""
    if device.type == "cpu":
        return {"type": "cpu", "name": _processor(), "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
    }


def _processor() -> str:
    """The processor's name as the system knows it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of whatever takes part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def what_of(one: Contestant) -> str:
    """A few words about a contestant."""
    if one.peer is not None:
        return one.peer.what
    assert one.kernel is not None
    text = (one.kernel.call.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(text.split()) or one.name


class _Bench:
    def __init__(self, device: torch.device, settings: Settings, players: Field, progress: Progress) -> None:
        self.device = device
        self.settings = settings
        self.players = players
        self.progress = progress
        self.on_gpu = device.type == "cuda"
        self.failures: list[str] = []

    def settings_dict(self) -> dict[str, Any]:
        one = self.settings
        return {
            "rounds": one.rounds,
            "graph": one.graph and self.on_gpu,
            "check": one.check,
            "counters": one.counters,
            "copies": one.copies,
        }

    # Time and traffic

    def speed(self, listed: Sequence[Case], limit: Limit) -> list[dict[str, Any]]:
        cells, done = [], 0
        total = len(listed) * (len(self.players.contestants) + 1) + self.settings.counters
        for case in listed:
            cell = Cell(case, self._copies(case))
            self._run_cell(cell, done, total)
            done += len(self.players.contestants) + 1
            self._judge(cell, limit)
            cells.append(cell)
            forget(self.device)
        if self.settings.counters:
            self.progress(done, total, "counters")
            try:
                self._count_in_hardware(cells)
            except KernelRefused as error:  # the times are worth keeping
                self.failures.append(str(error))
        self.progress(total, total, "done")
        return [cell.as_dict() for cell in cells]

    def _copies(self, case: Case) -> int:
        if self.settings.copies is not None:
            return self.settings.copies
        if not self.on_gpu:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        wanted = -(-CACHES_BEYOND * cache // case.floor_bytes)
        if case.new == 1:
            wanted = max(wanted, DECODE_CALLS)
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(wanted, int(COPIES_SHARE * free) // case.floor_bytes))

    def _run_cell(self, cell: Cell, done: int, total: int) -> None:
        """Check and time every contestant. Tensors and graphs live no longer than this."""
        case = cell.case
        cell.clocks["before"] = clocks(self.device)
        try:
            calls = [tensors.make(case, self.device, seed) for seed in range(cell.copies)]
        except torch.OutOfMemoryError:
            cell.results = {name: {"refused": "the inputs do not fit into memory"} for name in self.players.names}
            return
        pool = GraphPool(self.device) if self.on_gpu else None
        arms: dict[str, Stretch] = {}
        eager: dict[str, Stretch] = {}
        for number, one in enumerate(self.players.contestants):
            self.progress(done + number, total, f"{case.label}: {one.name}")
            result: dict[str, Any] = {}
            cell.results[one.name] = result
            try:
                if self.on_gpu and self.settings.graph and one.name in WAITING:
                    raise KernelRefused("reads lengths on the host, so no graph can hold it; --no-graph times it")
                works = one.prepare(case, calls)
                self._check(one, case, calls[0], works, result)
                if one.kernel is not None:
                    self._count(one, calls[0], works, result)
                arms[one.name] = self._stretch(works, case, self.settings.graph, pool)
                if self._wants_eager(case):
                    eager[one.name] = self._stretch(works, case, False, None)
            except KernelRefused as error:
                result["refused"] = str(error)
            except torch.OutOfMemoryError:
                result["refused"] = "does not fit into memory"
                forget(self.device)
            except Exception as error:
                if "CUDA error" in str(error):  # the device is lost to this process
                    raise
                result["refused"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                result["wrong"] = one.kernel is not None  # a rung refuses by KernelRefused, or it is broken
        self.progress(done + len(self.players.contestants), total, f"{case.label}: {self.settings.rounds} rounds")
        for key, stretches in (("seconds", arms), ("eager_seconds", eager)):
            for name, taken in alternate(stretches, self.settings.rounds).items() if stretches else ():
                cell.results[name][key] = list(interval(taken))
                cell.results[name]["samples" if key == "seconds" else "eager_samples"] = taken
                if key == "seconds":
                    cell.results[name] |= {"calls": stretches[name].calls, "graph": stretches[name].graph}
        cell.clocks["after"] = clocks(self.device)

    def _wants_eager(self, case: Case) -> bool:
        wanted = case.new == 1 if self.settings.eager is None else self.settings.eager
        return wanted and self.on_gpu and self.settings.graph

    def _stretch(self, works: Works, case: Case, graph: bool, pool: GraphPool | None) -> Stretch:
        if not self.on_gpu:
            return on_host(works)
        return on_cuda(works, max(len(works.calls), DECODE_CALLS if case.new == 1 else 1), graph, pool)

    def _check(self, one: Contestant, case: Case, call: Call, works: Works, result: dict[str, Any]) -> None:
        """FlashAttention's error rule on some rows, where the contestant answers the very question of the call."""
        if not self.settings.check or not one.answers(case):
            return
        with works.context():
            out = one.rows(case, works.calls[0]())
        found = tensors.error_of(case, call, out)
        result |= {"error": found.worst, "error_of_pytorch": found.plain}
        if found.wrong:
            result["wrong"] = True
            raise KernelRefused(
                f"wrong result: an error of {found.worst:.3g} where twice PyTorch's own allows {found.allowed:.3g}"
            )

    def _count(self, one: Contestant, call: Call, works: Works, result: dict[str, Any]) -> None:
        assert one.kernel is not None
        cost = traffic.counted(one.kernel, call, works.calls[0])
        if cost is not None:
            result["counted"] = {"read_bytes": cost.read_bytes, "write_bytes": cost.write_bytes, "bytes": cost.bytes}

    def _count_in_hardware(self, cells: Sequence[Cell]) -> None:
        """Whoever was timed, once more under the profiler, in a process of its own."""
        jobs = [
            counters.Job(cell.case, cell.copies, [name for name, one in cell.results.items() if "seconds" in one])
            for cell in cells
        ]
        for cell, found in zip(cells, counters.measure(jobs), strict=True):
            for name, one in found.items():
                cell.results[name]["measured"] = one.as_dict()

    def _judge(self, cell: Cell, limit: Limit) -> None:
        """What follows from the times: rates, shares of the roof, speedups."""
        case, results = cell.case, cell.results
        timed = {name: result for name, result in results.items() if "seconds" in result}
        floor = REGISTRY["attention"].floor(**tensors.shapes(case)._asdict())
        roof_s = max(case.floor_bytes / limit.dram_bytes_per_s, floor.flops / limit.flops_per_s)
        kinds = {one.name: one.kind for one in self.players.contestants}
        rivals = [name for name in timed if kinds[name] == "peer"]
        best = min(rivals, key=lambda name: timed[name]["seconds"][0], default=None)
        for name, result in timed.items():
            middle = result["seconds"][0]
            result |= {
                "flops_per_s": case.flops / middle,
                "floor_bytes_per_s": case.floor_bytes / middle,
                "kv_bytes_per_s": case.kv_bytes / middle,
                "roof_share": roof_s / middle,
            }
            if STANDARD in timed and name != STANDARD:
                result["over_standard"] = list(ratios(timed[STANDARD]["samples"], result["samples"]))
            if best is not None and kinds[name] == "rung":
                result["over_best_peer"] = list(ratios(timed[best]["samples"], result["samples"]))
                result["best_peer"] = best
        if case.experiment == "report" and case.batch in REPORT_SPEEDUPS and STANDARD in timed:
            for result in timed.values():
                result["report_speedup"] = REPORT_SPEEDUPS[case.batch]
                result["report_totals_ms"] = list(REPORT_TOTALS_MS[case.batch])

    # Memory

    def memory(self, listed: Sequence[Case]) -> list[dict[str, Any]]:
        """Peak bytes of one call beyond its inputs, case by case."""
        cells = [Cell(case, 1) for case in listed]
        players = self.players.contestants
        total = len(players) * (1 if not self.on_gpu else len(listed))
        for number, one in enumerate(players):
            if self.on_gpu:
                for place, cell in enumerate(cells):
                    self.progress(number * len(cells) + place, total, f"{cell.case.label}: {one.name}")
                    cell.results[one.name] = self._peak(one, cell.case)
                    forget(self.device)
                continue
            self.progress(number, total, one.name)
            peaks = memory.on_cpu(listed, one.name, torch.get_num_threads())
            for cell, peak in zip(cells, peaks, strict=True):
                cell.results[one.name] = {"refused": peak} if isinstance(peak, str) else {"peak_bytes": peak}
        self.progress(total, total, "done")
        return [cell.as_dict() for cell in cells]

    def _peak(self, one: Contestant, case: Case) -> dict[str, Any]:
        try:
            works = one.prepare(case, [tensors.make(case, self.device)])
            with works.context():
                return {"peak_bytes": memory.on_cuda(works.calls[0])}
        except KernelRefused as error:
            return {"refused": str(error)}
        except torch.OutOfMemoryError:
            return {"refused": "does not fit into memory"}
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return {"refused": said, "wrong": one.kernel is not None}
