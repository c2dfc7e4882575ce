"""The CPU suite: every benchmark in a process of its own, then one table of the issue's lines.

python -m benchmarks.run                  # all, quiet machine wanted
python -m benchmarks.run decode_cpu --quick
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.record import Target, load, show_targets

SUITE = ("decode_cpu", "trace_cpu", "kv_cache", "qwen3_bandwidth", "startup", "server_cpu", "server_soak")
BUSY = 0.5
"""A load average above this before the start is said: somebody else is using the machine."""


def main(argv: Sequence[str] | None = None) -> int:
    options, rest = arguments().parse_known_args(argv)
    names = options.names or list(SUITE)
    busy = load().get("load_average", [0.0])[0]
    if busy > BUSY:
        print(f"note: the load average is {busy}: others are using this machine, and these figures will show it")
    targets: list[Target] = []
    failed: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ridgeline-bench-") as scratch:
        for number, name in enumerate(names, 1):
            print(f"\n[{number}/{len(names)}] {name}: {purpose(name)}", flush=True)
            start = time.perf_counter()
            result = run_one(name, [*(["--quick"] if options.quick else []), *rest], options.out, Path(scratch))
            spent = time.perf_counter() - start
            if result is None:
                failed.append(name)
                targets.append(Target(name, "", "failed, see above", False))
            else:
                targets.extend(Target(**one) for one in result["targets"])
            print(f"{name}: {'failed' if result is None else 'done'} in {spent:.0f} s", flush=True)
    print()
    show_targets(targets, f"The issue's lines, {time.perf_counter() - began:.0f} s in all")
    if options.quick:
        print("a quick run shows that the scripts work; its figures mean nothing")
    lost = [one.line for one in targets if one.met is False]
    if lost:
        print(f"{len(lost)} not met: {'; '.join(lost)}")
    return 1 if failed else 0


def arguments() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="other options (--rounds, --threads, --model, --machine) are handed to every benchmark",
    )
    result.add_argument("names", nargs="*", metavar="name", choices=[*SUITE, []], help=", ".join(SUITE))
    result.add_argument("--quick", action="store_true", help="smoke test: tiny sizes, nothing kept")
    result.add_argument("--out", type=Path, help="folder for the results instead of benchmarks/results/<machine>")
    return result


def purpose(name: str) -> str:
    """The first sentence of a benchmark's docstring."""
    source = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return " ".join(text.split("\n\n")[0].split())


def run_one(name: str, arguments: Sequence[str], out: Path | None, scratch: Path) -> dict[str, Any] | None:
    """Run one benchmark as its own process; its result, or None if it failed. Quick results go to scratch."""
    quick = "--quick" in arguments
    folder = out or (scratch if quick else None)
    written = [] if folder is None else ["--out", str(folder.resolve())]
    if folder is None:
        before = set(results())
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, *written]
    if subprocess.run(command, cwd=ROOT).returncode:
        return None
    found = sorted(folder.glob("*.json"), key=modified) if folder else sorted(set(results()) - before, key=modified)
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else None


def results() -> list[Path]:
    return list((ROOT / "benchmarks" / "results").glob("*/*.json"))


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns


if __name__ == "__main__":
    sys.exit(main())
