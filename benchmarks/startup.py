"""From process start to the first token of `ridgeline generate`, and the memory of the whole command.

A real process, started as a user would, on two cores, caches warm (one run before is dropped). The first
token has come when the first byte after the prompt arrives on its standard output.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import checkpoint
from benchmarks.record import Record, interval, losing, parser, progress, seconds, use_threads
from ridgeline import LLM

SECONDS = 3.0
SLACK_BYTES = 600_000_000
PROMPT = "def add(left, right):\n"


@dataclass(frozen=True)
class Start:
    """One process: seconds from its start until the model was loaded, the first token, and the end; bytes."""

    loaded_s: float
    first_token_s: float
    whole_s: float
    peak_at_first_token_bytes: int
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.rounds, options.new = 1, 4
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "")
    result.add_argument("--new", type=int, default=32, help="tokens to generate")
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    record = Record("startup", options)
    command = command_of(options, None if what == "embedded model" else folder)
    record.settings = {
        "model": what,
        "command": [Path(command[0]).name, *command[1:]],
        "cores": options.threads,
        "rounds": options.rounds,
        "prompt": PROMPT,
        "new_tokens": options.new,
        "caches": "warm: one run before is dropped",
    }
    with LLM(folder, device="cpu") as llm:
        ledger = llm.built.ledger
        tokens = len(PROMPT.encode()) if llm.tokenizer is None else len(llm.tokenizer.encode(PROMPT))
        block = llm.built.config.block_size
        touched = -(-(tokens + options.new) // block) * block * ledger.bytes_per_token
    runs = []
    bar = progress(options.rounds + 1)
    for number in range(options.rounds + 1):
        run = start(command, options.threads)
        bar.update(1)
        if number:
            runs.append(run)
    bar.close()
    judge(record, runs, ledger.weight_bytes, ledger.kv_bytes, touched)
    return record


def command_of(options: argparse.Namespace, folder: Path | None) -> list[str]:
    """The command as a user types it, or its module if the script is not beside this Python."""
    script = shutil.which("ridgeline", path=str(Path(sys.executable).parent))
    entry = [script] if script else [sys.executable, "-c", "from ridgeline.cli.main import main; main()"]
    model = [] if folder is None else ["--model", str(folder)]
    return [*entry, "generate", PROMPT, *model, "--max-tokens", str(options.new), "--ignore-eos"]


def start(command: Sequence[str], cores: int) -> Start:
    """Run the command once on at most `cores` cores; raises RuntimeError with its words if it fails."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    began = time.perf_counter()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed below; a pipe that nobody reads could fill
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, preexec_fn=lambda: os.sched_setaffinity(0, allowed)
    )
    assert process.stdout is not None
    shown, loaded, first, at_first = b"", 0.0, 0.0, 0
    prompt = PROMPT.encode()
    while data := os.read(process.stdout.fileno(), 1 << 16):
        shown += data
        now = time.perf_counter() - began
        loaded = loaded or now
        if not first and len(shown) > len(prompt):
            first, at_first = now, high_water(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    whole = time.perf_counter() - began
    with errors:
        errors.seek(0)
        said = errors.read().decode(errors="replace")[-2000:]
    if process.returncode or not first or not shown.startswith(prompt):
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}:\n{said}")
    return Start(loaded, first, whole, at_first, usage.ru_maxrss * 1024)


def high_water(pid: int) -> int:
    """Peak resident bytes of a running process so far."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def judge(record: Record, runs: Sequence[Start], weights: int, pool: int, touched: int) -> None:
    first = interval([run.first_token_s for run in runs])
    peak = max(run.peak_bytes for run in runs)
    early = max(run.peak_at_first_token_bytes for run in runs)
    allowed, strict = weights + pool + SLACK_BYTES, weights + touched + SLACK_BYTES
    record.timings["runs"] = {
        "loaded_s": seconds(run.loaded_s for run in runs),
        "first_token_s": seconds(run.first_token_s for run in runs),
        "whole_s": seconds(run.whole_s for run in runs),
        "peak_at_first_token_bytes": [run.peak_at_first_token_bytes for run in runs],
        "peak_bytes": [run.peak_bytes for run in runs],
    }
    record.summary.update(
        first_token_s=first,
        loaded_s=interval([run.loaded_s for run in runs]),
        whole_s=interval([run.whole_s for run in runs]),
        peak_bytes=peak,
        peak_at_first_token_bytes=early,
        weight_bytes=weights,
        kv_pool_bytes=pool,
        kv_touched_bytes=touched,
    )
    mega = 1e6
    record.table(
        f"ridgeline generate, {record.settings['cores']} cores, {record.settings['model']}",
        ["", "measured", "limit"],
        [
            ["process start to model loaded", record.summary["loaded_s"].show(".2f", " s"), ""],
            [
                "process start to first token",
                losing(first.show(".2f", " s"), first.median >= SECONDS),
                f"< {SECONDS} s",
            ],
            ["process start to end", record.summary["whole_s"].show(".2f", " s"), ""],
            ["peak memory at the first token", f"{early / mega:.0f} MB", ""],
            ["peak memory", losing(f"{peak / mega:.0f} MB", peak > allowed), f"≤ {allowed / mega:.0f} MB (whole pool)"],
            ["peak memory", losing(f"{peak / mega:.0f} MB", peak > strict), f"≤ {strict / mega:.0f} MB (KV in use)"],
        ],
    )
    record.note(
        f"weights {weights / mega:.0f} MB, KV pool {pool / mega:.0f} MB of which this request uses "
        f"{touched / mega:.1f} MB; memory is judged by the stricter limit, weights + KV in use + 600 MB"
    )
    record.target(
        f"ridgeline generate, process start to first token, median of {len(runs)}",
        f"< {SECONDS:.0f} s",
        first.show(".2f", " s"),
        first.median < SECONDS,
    )
    record.target(
        "peak memory of ridgeline generate",
        f"≤ weights + KV + 600 MB = {strict / mega:.0f} MB",
        f"{peak / mega:.0f} MB",
        peak <= strict,
    )


if __name__ == "__main__":
    main()
