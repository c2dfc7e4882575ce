"""A server in processes of its own, as a user starts it, for benchmarks to load and to watch.

Knows the command, its public endpoints and /proc. It must not know what is measured. Only this machine is ever asked.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

START_S = 120.0
TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """`ridgeline serve` with these options on `threads` engine threads; `wait_ready` before it is of use."""

    def __init__(self, options: Sequence[str], threads: int = 1, model: Path | None = None) -> None:
        more_files()
        self.began_s = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the server
        self.command = [*entry(), "serve", *([] if model is None else [str(model)]), "--port", "0", *options]
        self.process = subprocess.Popen(
            self.command,
            stderr=self._log,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.port = self._listening()
        self.url = f"http://127.0.0.1:{self.port}"

    def _listening(self) -> int:
        while time.perf_counter() - self.began_s < START_S:
            found = re.search(r'"message": "listening".*"port": (\d+)', self.log())
            if found:
                return int(found.group(1))
            if self.process.poll() is not None:
                break
            time.sleep(0.005)
        raise RuntimeError(f"the server did not start:\n{self.log()[-2000:]}")

    def log(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        return os.pread(self._log.fileno(), size, 0).decode("utf-8", "replace")

    def ask(self, method: str, path: str, body: Any = None, timeout_s: float = 30.0) -> tuple[int, bytes]:
        """Status and body of one answer; OSError or HTTPException without one."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            sent = None if body is None else json.dumps(body).encode()
            link.request(method, path, sent, {} if sent is None else {"Content-Type": "application/json"})
            answer = link.getresponse()
            return answer.status, answer.read()
        finally:
            link.close()

    def get(self, path: str) -> Any:
        """The JSON of an answer. RuntimeError for any status but 200."""
        status, body = self.ask("GET", path)
        if status != 200:
            raise RuntimeError(f"{path} answers {status}: {body[:300]!r}")
        return json.loads(body)

    def ready(self) -> bool:
        try:
            return self.ask("GET", "/ready", timeout_s=5.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def wait_ready(self, seconds: float = START_S) -> float:
        """Seconds waited."""
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            if self.ready():
                return time.perf_counter() - began
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise RuntimeError(f"the server is not ready:\n{self.log()[-2000:]}")

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name with labels, but for the model's name and the engine's number."""
        status, body = self.ask("GET", "/metrics")
        if status != 200:
            raise RuntimeError(f"/metrics answers {status}")
        found = {}
        for line in body.decode().splitlines():
            if not line.startswith("#") and line:
                name, _, value = line.rpartition(" ")
                labels = re.sub(r'(engine|model_name)="[^"]*",?', "", name)
                found[labels.replace("{}", "").replace(",}", "}")] = float(value)
        return found

    def processes(self) -> list[int]:
        """The server's process and all below it."""
        parents: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(path.parent.name))
        found = [self.process.pid]
        for pid in found:
            found.extend(parents.get(pid, []))
        return found

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM, and SIGKILL for who does not listen; the exit status."""
        below = self.processes()[1:]
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._log.close()


@contextlib.contextmanager
def served(options: Sequence[str] = (), threads: int = 1, model: Path | None = None) -> Iterator[Server]:
    """A server that is ready, and gone afterwards."""
    server = Server(options, threads, model)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def entry() -> list[str]:
    """The command as a user types it, or its module if the script is not beside this Python."""
    script = shutil.which("ridgeline", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-c", "from ridgeline.cli.main import main; main()"]


def more_files() -> int:
    """Let this process and those that it starts open as many files as the system allows; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def cpu_s(pids: Sequence[int]) -> float:
    """Processor seconds that these processes have used so far."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def resident_bytes(pid: int) -> int | None:
    """Memory that a process holds; None if it is gone."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def slope(points: Sequence[tuple[float, float]], most: int = 400) -> float:
    """Theil-Sen: the median of the slopes between pairs of points, of which at most `most` are looked at."""
    step = max(1, len(points) // most)
    chosen = points[::step]
    slopes = sorted(
        (y1 - y0) / (x1 - x0) for place, (x0, y0) in enumerate(chosen) for x1, y1 in chosen[place + 1 :] if x1 > x0
    )
    return slopes[len(slopes) // 2] if slopes else 0.0


def total(metrics: Mapping[str, float], name: str) -> float:
    """A counter's sum over its labels."""
    return sum(value for key, value in metrics.items() if key.partition("{")[0] == name)
