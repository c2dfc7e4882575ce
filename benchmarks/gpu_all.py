"""Everything that a GPU can tell of this project, one step after the other, in pieces if there is little time.

Each step is a process of its own with a time limit, a log, and a folder of results under --out; what was done is kept
in gpu-all.json there, so that a later call goes on where this one stopped. A step that fails or takes too long is
noted, and the next one begins. With several GPUs (--gpus) each takes the next step that waits, alone on its device.

    python3 -m benchmarks.gpu_all --list                              # the steps, and the minutes that each takes
    python3 -m benchmarks.gpu_all --out results                       # all of them
    python3 -m benchmarks.gpu_all --out results --minutes 10          # as many as fit into ten minutes
    python3 -m benchmarks.gpu_all --out results --gpus 0 1 2 3        # four at a time
    python3 -m benchmarks.gpu_all tests prefill --out results --fa3 _vllm_fa3_C.abi3.so
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.record import compact, machine, show_table, versions

STATE = "gpu-all.json"
THREADS = {"OMP_NUM_THREADS": "4"}
"""Of a process of tests: with PYTEST_ADDOPTS="-n 4" there are several, and each would take all cores for itself."""
TAIL_LINES = 30
GRACE_S = 10
"""Between asking a step to stop and making it."""


@dataclass(frozen=True)
class Step:
    """One process. minutes: what it takes on an H200, compiling included. command: what stands behind the interpreter,
    from the options, whose `out` is the step's own folder. after: a step whose results it reads. environment: variables
    that it has unless the caller's environment has them."""

    name: str
    minutes: float
    what: str
    command: Callable[[argparse.Namespace], list[str]]
    after: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def benchmark(module: str, *more: str, fa3: bool = False) -> Callable[[argparse.Namespace], list[str]]:
    """A script of this folder, its result under --out."""

    def command(options: argparse.Namespace) -> list[str]:
        library = ["--fa3", str(options.fa3)] if fa3 and options.fa3 else []
        commit = ["--commit", options.commit] if options.commit else []
        quick = ["--quick"] if options.quick else []
        return ["-m", f"benchmarks.{module}", *more, *library, *commit, *quick, "--out", str(options.out)]

    return command


def tests(marks: str, *where: str) -> Callable[[argparse.Namespace], list[str]]:
    """pytest; failures are in the log as they come (at_once.py), for a step may be stopped before its end."""
    plugin = ["-p", "benchmarks.at_once"]
    return lambda options: ["-m", "pytest", *plugin, *where, "-m", marks, f"--junitxml={options.out / 'tests.xml'}"]


PROGRAM = ("-c", "from ridgeline.cli.main import main; raise SystemExit(main())")


def latency(options: argparse.Namespace) -> list[str]:
    rungs = [word for rung in ("standard", "v2", "triton", "decode,sm90") for word in ("--attention", rung)]
    few = ["--batch", "1", "--rounds", "2"] if options.quick else []
    return [*PROGRAM, "bench", "latency", *rungs, *few, "--out", str(options.out / "latency.json")]


def tune(options: argparse.Namespace) -> list[str]:
    few = ["--most", "2", "--rounds", "2", "--head-dim", "128"] if options.quick else ["--most", "24", "--rounds", "8"]
    return [*PROGRAM, "kernels", "tune", *few, "--out", str(options.out / "table.json")]


def accuracy_later(options: argparse.Namespace) -> list[str]:
    return benchmark("gpu_accuracy", "--card", str(options.out.parent / "model" / "gpu-accuracy-card.json"))(options)


STEPS = (
    Step("tests-cuda", 5, "tests of the kernels in CUDA", tests("gpu and not slow", "tests/kernels/cuda"),
         environment=THREADS),
    Step("tests-triton", 4, "tests of those in Triton", tests("gpu and not slow", "tests/kernels/triton"),
         environment=THREADS),
    Step("tests-engine", 4, "tests of models, graphs, trees, studies on a GPU",
         tests("gpu and not slow", "tests", "--ignore=tests/kernels"), environment=THREADS),
    Step("decode-step", 2, "the engine's whole decode step", benchmark("gpu_decode")),
    Step("prompts", 3, "steps with prompts in graphs beside op by op", benchmark("gpu_prompts")),
    Step("prefill", 4, "sm90 beside its peers on the issue's grid", benchmark("attention_prefill", fa3=True)),
    Step("decode", 3, "decode attention beside its peers, and trees", benchmark("attention_decode")),
    Step("report", 1, "the report's experiment", benchmark("attention", "report", "--name", "attention-report")),
    Step("sweep", 6, "every rung on the papers' grid",
         benchmark("attention", "sweep", "--grouped", "--name", "attention-sweep")),
    Step("latency", 5, "whole models with each rung", latency),
    Step("decode-rungs", 2, "decode attention of every rung, standard among them",
         benchmark("attention", "decode", "--batch", "1", "32", "--sequence", "1024", "8192", "--rungs",
                   "standard,v2,triton,decode", "--peers", "math,fa2", "--name", "attention-decode-rungs")),
    Step("tune", 8, "tables of tiles for this GPU", tune),
    Step("model", 8, "a card without a model, then held-out models beside it", benchmark("gpu_accuracy")),
    Step("model-later", 5, "the same with that card, anchored anew", accuracy_later, "model"),
    Step("accuracy", 1, "errors on numbers with outliers", benchmark("attention_accuracy")),
    Step("seeds", 6, "what neighbours change, and what it costs that they do not", benchmark("gpu_seeds")),
    Step("baseline", 2, "the engine beside Transformers", benchmark("gpu_baseline")),
    Step("speculation-1", 8, "speculation at batch 1, greedy and sampled",
         benchmark("gpu_speculation", "--batches", "1", "--prompts-count", "16", "--temperatures", "0", "0.8",
                   "--static", "chain of 4", "chain of 6", "chain of 8", "tree 4-2-1-1", "tree 4-3-2-1-1",
                   "--name", "speculation-1")),
    Step("speculation-few", 6, "speculation at batches 2 to 16",
         benchmark("gpu_speculation", "--batches", "2", "4", "8", "16", "--name", "speculation-few")),
    Step("speculation-many", 6, "speculation at batches 32 to 128",
         benchmark("gpu_speculation", "--batches", "32", "64", "128", "--new", "64", "--name", "speculation-many")),
    Step("speculation-256", 5, "speculation at batch 256",
         benchmark("gpu_speculation", "--batches", "256", "--new", "64", "--name", "speculation-256")),
    Step("speculation-adversary", 4, "a drafter that knows nothing",
         benchmark("gpu_speculation", "--adversary", "--batches", "1", "8", "64", "--new", "64", "--name",
                   "speculation-adversary")),
    Step("speculation-merge", 4, "a drafter beside one and n-grams at equal nodes",
         benchmark("gpu_speculation", "--merge", "--batches", "1", "4", "--new", "64", "--name", "speculation-merge")),
    Step("tree-shapes", 5, "width and depth of trees by vocabulary and batch", benchmark("gpu_tree_shapes")),
    Step("product", 3, "products in fixed tiles", benchmark("gpu_product")),
    Step("variants", 3, "sm90 with other sections and ends of tiles",
         benchmark("attention_prefill", "--variants", "sections-8", "sections-16", "flush", "--lengths", "512", "4096",
                   "16384", fa3=True)),
    Step("bytes", 3, "bytes by hardware counters",
         benchmark("attention", "sweep", "--counters", "--head-dim", "128", "--sequence", "512", "4096", "--name",
                   "attention-bytes")),
    Step("memory", 1, "memory against length", benchmark("attention", "memory", "--name", "attention-memory")),
    Step("linear", 3, "products of one token and of few", benchmark("gpu_linear")),
    Step("feed-forward", 2, "feed-forward networks", benchmark("gpu_feed_forward")),
    Step("launch", 1, "launches and compiling", benchmark("gpu_launch")),
    Step("tests-slow", 8, "compute-sanitizer, and tests over five seconds", tests("gpu and slow", "tests"),
         environment=THREADS),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    chosen = [step for step in STEPS if step.name in (options.steps or [one.name for one in STEPS])]
    chosen = [step for step in chosen if step.name not in options.skip]
    if options.list:
        rows = [[step.name, f"{step.minutes:g}", step.what] for step in chosen]
        show_table(f"{sum(step.minutes for step in chosen):g} minutes in all", ["step", "minutes", "what"], rows)
        return 0
    if options.out is None:
        raise SystemExit("--out names a folder for the results")
    options.out = Path(os.path.relpath(options.out, ROOT))  # steps run there, and results name it
    os.chdir(ROOT)
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ending_when_told():
        Queue(chosen, options, began).empty()
    state = read(options.out)
    told = [[step.name, *said(state["steps"].get(step.name))] for step in chosen]
    show_table(f"{(time.monotonic() - began) / 60:.1f} minutes", ["step", "", "minutes", "results"], told)
    return 0 if all(state["steps"].get(step.name, {}).get("status") == "done" for step in chosen) else 1


def arguments() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    result.add_argument(
        "steps", nargs="*", metavar="step", choices=[*names, []], help=f"of {', '.join(names)}; all if left out"
    )
    result.add_argument("--skip", nargs="+", default=[], metavar="step")
    result.add_argument("--list", action="store_true", help="show the steps and end")
    result.add_argument("--out", type=Path, help="folder for results and logs")
    result.add_argument("--minutes", type=float, help="begin no step that would not end within so many")
    result.add_argument("--patience", type=float, default=2.0, help="times its minutes after which a step is stopped")
    result.add_argument("--again", action="store_true", help="also steps that are done")
    result.add_argument("--gpus", nargs="+", default=[], metavar="index", help="so many steps at a time, each on one")
    result.add_argument("--quick", action="store_true", help="a smoke test: benchmarks with tiny sizes")
    result.add_argument("--fa3", type=Path, help="FlashAttention-3's compiled library")
    result.add_argument("--commit", help="the commit, where git is not there or does not know")
    return result


@contextmanager
def ending_when_told() -> Iterator[None]:
    """SIGTERM ends this process by an exception, so that what it has started is ended, too."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows must not be cut short
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Running:
    """The processes of the steps under way."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.lock = threading.Lock()

    @contextmanager
    def process(self, command: Sequence[str], **how: Any) -> Iterator[subprocess.Popen[bytes]]:
        """One in a session of its own, which is stopped if what follows fails."""
        with self.lock:
            if self.stopped:
                raise RuntimeError("no step begins any more")
            process = subprocess.Popen(command, start_new_session=True, **how)
            self.processes.add(process)
        try:
            yield process
        except BaseException:
            stop(process)
            raise
        finally:
            with self.lock:
                self.processes.discard(process)

    def stop(self) -> None:
        """All of them side by side, and no further one begins."""
        with self.lock:
            self.stopped = True
            threads = [threading.Thread(target=stop, args=(process,)) for process in self.processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Queue:
    """The steps that wait; one thread a GPU takes them in order."""

    def __init__(self, steps: Sequence[Step], options: argparse.Namespace, began: float) -> None:
        self.waiting = list(steps)
        self.options = options
        self.began = began
        self.state = read(options.out)
        self.under_way: set[str] = set()
        self.running = Running()
        self.at_work: set[threading.Thread] = set()
        self.changed = threading.Condition()

    def empty(self) -> None:
        """Run all that can be run. An exception in one thread leaves the others to end their steps; one in this thread
        (told to end) stops them."""
        try:
            for gpu in self.options.gpus or [None]:
                thread = threading.Thread(target=self.work, args=(gpu,))
                self.at_work.add(thread)
                thread.start()
            self.wait()
        except BaseException:
            with self.changed:
                self.waiting.clear()
                self.changed.notify_all()
            self.running.stop()
            self.wait()
            raise

    def wait(self) -> None:
        """Until nobody works. A join that is interrupted may take its thread for ended (bugs.python.org/issue45274)."""
        with self.changed:
            self.changed.wait_for(lambda: not any(thread.ident is not None for thread in self.at_work))

    def work(self, gpu: str | None) -> None:
        try:
            while (step := self.next()) is not None:
                try:
                    outcome = run(step, self.options, self.running, gpu)
                finally:
                    with self.changed:
                        self.under_way.discard(step.name)
                        self.changed.notify_all()
                self.note(step, outcome)
        finally:
            with self.changed:
                self.at_work.discard(threading.current_thread())
                self.changed.notify_all()

    def next(self) -> Step | None:
        """The first step that may begin; None if none ever will."""
        with self.changed:
            while self.waiting:
                ready = [step for step in self.waiting if step.after not in self.pending()]
                if not ready:
                    self.changed.wait()
                    continue
                step = ready[0]
                self.waiting.remove(step)
                self.changed.notify_all()
                if self.wanted(step):
                    self.under_way.add(step.name)
                    self.note(step, {"status": "under way", "began": now()})
                    return step
            return None

    def pending(self) -> set[str]:
        return self.under_way | {step.name for step in self.waiting}

    def wanted(self, step: Step) -> bool:
        options, spent = self.options, (time.monotonic() - self.began) / 60
        if self.state["steps"].get(step.name, {}).get("status") == "done" and not options.again:
            print(f"{step.name}: done before ({STATE} says so; --again runs it once more)")
            return False
        if options.minutes is not None and spent + step.minutes > options.minutes:
            print(f"{step.name}: takes {step.minutes:g} minutes, {max(options.minutes - spent, 0):.1f} are left")
            return False
        return True

    def note(self, step: Step, outcome: dict[str, Any]) -> None:
        with self.changed:
            self.state["steps"][step.name] = outcome
            write(self.options.out, self.state)


def run(step: Step, options: argparse.Namespace, running: Running, gpu: str | None = None) -> dict[str, Any]:
    """Run one step to its end, or to the end of patience; what is to be said of it."""
    folder = options.out / step.name
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    command = [sys.executable, *step.command(argparse.Namespace(**{**vars(options), "out": folder}))]
    environment = {
        **step.environment,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(("src", os.environ.get("PYTHONPATH", ""))),
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if options.fa3:
        environment["FA3_LIBRARY"] = str(options.fa3.resolve())
    limit_s = 60 * step.minutes * options.patience
    print(f"{step.name}: {step.what}, about {step.minutes:g} minutes", flush=True)
    start, when = time.monotonic(), now()
    how = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT}
    with log.open("w", encoding="utf-8") as out, running.process(command, stdout=out, **how) as process:
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            stop(process)
    status = "too long" if code is None else "done" if code == 0 else "stopped" if running.stopped else "failed"
    if status != "done":
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(lines[-TAIL_LINES:]))
    print(f"{step.name}: {status} after {time.monotonic() - start:.0f} s", flush=True)
    return {
        "status": status,
        "began": when,
        "seconds": round(time.monotonic() - start, 1),
        "code": code,
        "limit_s": limit_s,
        "command": ["python3", *command[1:]],
        "log": str(log.relative_to(options.out)),
        "results": sorted(str(path.relative_to(options.out)) for path in folder.iterdir() if path.suffix != ".txt"),
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a step with all that it has started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def read(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {"name": "gpu-all", "steps": {}}


def write(folder: Path, state: dict[str, Any]) -> None:
    path = folder / STATE
    fresh = path.with_suffix(".new")
    fresh.write_text(compact({**state, "machine": machine(), "versions": versions()}) + "\n", encoding="utf-8")
    fresh.replace(path)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def said(step: dict[str, Any] | None) -> list[str]:
    """Status, minutes and results of a step, for the table."""
    if step is None:
        return ["not run", "", ""]
    return [step["status"], f"{step.get('seconds', 0) / 60:.1f}", ", ".join(step.get("results", []))]


if __name__ == "__main__":
    sys.exit(main())
