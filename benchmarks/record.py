"""Results on disk and on the screen: where, with what, how often, how sure.

Knows machines, versions, intervals, tables and files. It must not know what is measured. Runs without
rich and without git, as on a borrowed machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("ridgeline", "torch", "numpy", "numba", "llvmlite", "transformers", "tokenizers", "safetensors", "triton")
RESULTS_OF_RUNS = (":!benchmarks/results", ":!docs/plots")
RESAMPLES = 10_000
GPU_FIELDS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"

T = TypeVar("T")


class Interval(NamedTuple):
    """A median with its 95 % bootstrap interval (equal to the median for a single value)."""

    median: float
    low: float
    high: float

    def show(self, form: str = ".2f", unit: str = "", scale: float = 1.0) -> str:
        middle, low, high = (format(scale * one, form) for one in self)
        return f"{middle}{unit} [{low}, {high}]"


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Median of independent values and the percentile-bootstrap interval of that median."""
    middle = statistics.median(values)
    if len(values) == 1:
        return Interval(middle, middle, middle)
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Interval(middle, medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1])


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Interval of the paired ratios: each pair was measured side by side."""
    return interval([a / b for a, b in zip(numerators, denominators, strict=True)])


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def alternate(arms: Mapping[str, Callable[[int], T]], rounds: int, warm: int = 1) -> dict[str, list[T]]:
    """Run every arm once a round, in an order that turns around each round; results by arm.

    Each arm is called with the round's number, so that it can draw fresh inputs. `warm` rounds come
    first and are dropped: the same warm-up for all.
    """
    results: dict[str, list[T]] = {name: [] for name in arms}
    bar = progress(len(arms) * (rounds + warm))
    for number in range(-warm, rounds):
        for name in list(arms) if number % 2 == 0 else list(reversed(list(arms))):
            bar.set_postfix_str(("warm-up " if number < 0 else f"round {number + 1}/{rounds} ") + name)
            result = arms[name](number)
            if number >= 0:
                results[name].append(result)
            bar.update(1)
    bar.close()
    return results


def progress(total: int) -> Any:
    """A bar on standard error that goes away when done."""
    from tqdm import tqdm

    return tqdm(total=total, leave=False, disable=None, unit="run", mininterval=0.5, dynamic_ncols=True)


@dataclass(frozen=True)
class Target:
    """One line of the issue: what was asked, what was measured, whether it is met (None: only recorded)."""

    line: str
    target: str
    measured: str
    met: bool | None


@dataclass
class Record:
    """One benchmark's result under construction.

    timings: raw, every one of them. summary: what follows from them. tables: what was printed.
    """

    name: str
    options: argparse.Namespace
    settings: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        self.observe("start")

    def observe(self, when: str) -> None:
        """Keep the load and clocks of this moment."""
        self.loads.append({"when": when, "at_s": round(time.perf_counter(), 3), **load()})

    def note(self, text: str) -> None:
        self.notes.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table and keep it."""
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        show_table(title, columns, rows)

    def target(self, line: str, target: str, measured: str, met: bool | None) -> None:
        self.targets.append(Target(line, target, measured, met))

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "date": self.started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self.started).total_seconds(), 1),
            "quick": self.options.quick,
            "intervals": "[median, low, high], 95 % bootstrap of the median",
            "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "commit": commit(self.options.commit),
            "machine": machine(),
            "versions": versions(),
            "loads": self.loads,
            "settings": self.settings,
            "summary": self.summary,
            "targets": [asdict(one) for one in self.targets],
            "notes": self.notes,
            "tables": self.tables,
            "timings": self.timings,
        }

    def close(self) -> Path | None:
        """Print targets and notes and write the file; its path, or None for a quick run without --out."""
        self.observe("end")
        if self.targets:
            show_targets(self.targets)
        for text in self.notes:
            print(f"note: {text}")
        out: Path | None = self.options.out
        if out is None and self.options.quick:
            print("quick run: nothing is written (give --out to keep it)")
            return None
        path = out if out is not None and out.suffix == ".json" else self._free_path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(compact(self.as_dict()) + "\n", encoding="utf-8")
        print(f"-> {path}")
        return path

    def _free_path(self, folder: Path | None) -> Path:
        folder = folder or RESULTS / (self.options.machine or slug())
        stem = f"{self.started:%Y-%m-%d}-{self.name}"
        path, number = folder / f"{stem}.json", 2
        while path.exists():
            path, number = folder / f"{stem}-{number}.json", number + 1
        return path


def parser(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, numbers mean nothing")
    result.add_argument("--rounds", type=int, default=rounds, help=f"measured rounds (default {rounds})")
    result.add_argument("--threads", type=int, default=2, help="CPU threads of both sides (default 2)")
    result.add_argument("--model", type=Path, help="a checkpoint directory instead of the embedded model")
    result.add_argument("--out", type=Path, help="folder or .json file for the result")
    result.add_argument("--machine", help="name of the folder below benchmarks/results (default: from the hardware)")
    result.add_argument("--commit", help="the commit, where git is not there or does not know")
    return result


def use_threads(count: int) -> None:
    """Run torch (and with it the engine's own threads) on `count` threads. Call before any work."""
    import torch

    torch.set_num_threads(count)


# The machine


def machine() -> dict[str, Any]:
    """Processor, memory, system and GPUs."""
    info = _cpuinfo()
    facts: dict[str, Any] = {
        "cpu": info.get("model name", platform.processor()),
        "cpu_family_model_stepping": [info.get(key) for key in ("cpu family", "model", "stepping")],
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "flags": [
            flag for flag in info.get("flags", "").split() if flag.startswith(("avx", "fma", "amx", "hypervisor"))
        ],
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpus"] = [
                {"name": one.name, "memory_bytes": one.total_memory, "multiprocessors": one.multi_processor_count}
                for one in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
            ]
            facts["driver"] = _nvidia("driver_version")
    return facts


def slug() -> str:
    """A folder name for this machine, as `h200` or `epyc-2core`."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        name = torch.cuda.get_device_name(0).lower().replace("nvidia", "").strip()
        count = torch.cuda.device_count()
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-") + (f"-x{count}" if count > 1 else "")
    name = _cpuinfo().get("model name", platform.machine()).lower()
    known = re.search(r"epyc|xeon|ryzen|core|neoverse|graviton|apple", name)
    return f"{known.group() if known else 'cpu'}-{os.cpu_count()}core"


def load() -> dict[str, Any]:
    """What the machine is doing right now: load averages, stolen time, clocks."""
    facts: dict[str, Any] = {}
    try:
        facts["load_average"] = [round(one, 2) for one in os.getloadavg()]
        ticks = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        facts["cpu_ticks"] = {
            name: int(ticks[at]) for name, at in (("user", 0), ("system", 2), ("idle", 3), ("steal", 7))
        }
        clocks = re.findall(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text())
        facts["cpu_mhz"] = [round(float(one)) for one in clocks[:4]]
    except OSError:
        pass
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = dict(zip(GPU_FIELDS.split(","), _nvidia(GPU_FIELDS)))
    return facts


def _nvidia(fields: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = _output(command)
    return [one.strip() for one in done.splitlines()[0].split(",")] if done else []


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of what takes part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit(given: str | None = None) -> dict[str, Any]:
    """The commit of the tree and whether it has changes (new results and pictures beside it are none).

    A commit that is given counts, and whether the tree had changes is not known then: where a copy of the
    tree is measured, git speaks of what it was copied over.
    """
    found = "" if given else _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if not found:
        return {"id": given, "dirty": None}
    return {
        "id": found,
        "dirty": bool(_output(["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", *RESULTS_OF_RUNS])),
    }


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# Files and screens


def compact(value: Any, indent: str = "") -> str:
    """JSON with one line for every list of plain values, so that raw timings stay readable."""
    inner = indent + " "
    if isinstance(value, Mapping) and value:
        parts = (f"{inner}{json.dumps(str(key))}: {compact(one, inner)}" for key, one in value.items())
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(one, (list, tuple, Mapping)) for one in value):
        return "[\n" + ",\n".join(inner + compact(one, inner) for one in value) + f"\n{indent}]"
    return json.dumps(value, default=str)


def seconds(values: Iterable[float]) -> list[float]:
    """Raw timings for a file: microseconds are enough."""
    return [round(one, 6) for one in values]


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the screen, with rich if it is there. A cell that starts with "! " is a loss."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain_table(title, columns, rows)
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style="bold red" if cell.startswith("! ") else "") for cell in row))
    wide = None if sys.stdout.isatty() else 160
    Console(width=wide, highlight=False).print(table)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)))


def show_targets(targets: Sequence[Target], title: str = "Lines of the issue") -> None:
    words = {True: "met", False: "! NOT MET", None: "recorded"}
    rows = [[one.line, one.target, one.measured, words[one.met]] for one in targets]
    show_table(title, ["line", "target", "measured", "verdict"], rows)


def losing(text: str, lost: bool) -> str:
    """A cell, marked if this side lost."""
    return f"! {text}" if lost else text
