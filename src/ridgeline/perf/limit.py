"""The limit of this machine, measured on the spot: read bandwidth by working set, and matrix rate.

The limit is a curve: a small model lives in a cache and may be read faster than main memory allows. So
the bandwidth is measured at the bytes that a step touches, and at main memory's size beside it. Knows
how to time. It must not know models; it is given bytes and FLOPs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ridgeline.core.cost import Cost
from ridgeline.core.machine import largest_cache_bytes
from ridgeline.ops.weight import Weight

CACHES_BEYOND = 4
"""Main memory is measured on a buffer of this many times the largest cache."""
BUFFER_BYTES = {"cpu": (64 << 20, 512 << 20), "cuda": (256 << 20, 2 << 30)}
"""Least and most that such a buffer takes: it is memory that the user did not ask for."""
REPEATS = 7
BUDGET_S = 0.08
"""No work is repeated beyond this: a slow machine must not make its user wait."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Rates of one device. read_bytes_per_s holds at working_set_bytes, dram_bytes_per_s far beyond caches."""

    device: str
    working_set_bytes: int
    read_bytes_per_s: float
    dram_bytes_per_s: float
    flops_per_s: float

    def seconds(self, cost: Cost) -> float:
        """No kernel can do `cost` in less: its bytes or its FLOPs, whichever takes longer."""
        return max(cost.bytes / self.read_bytes_per_s, cost.flops / self.flops_per_s)

    def dram_seconds(self, cost: Cost) -> float:
        """The same if every byte came from main memory."""
        return max(cost.bytes / self.dram_bytes_per_s, cost.flops / self.flops_per_s)


class OwnProduct(NamedTuple):
    """The kernel that serves `linear`, and whether it takes weights in panels."""

    linear: Callable[[torch.Tensor, Weight], torch.Tensor]
    panels: bool


@dataclass(frozen=True)
class LimitCurve:
    """Read bandwidth by working set: (bytes, bytes/s), rising in bytes. Rates never rise with the size."""

    device: str
    points: tuple[tuple[int, float], ...]
    flops_per_s: float

    def bytes_per_s(self, working_set_bytes: float) -> float:
        """Best rate at a working set: of the nearest measured size that is not larger, so never too slow a limit."""
        rate = self.points[0][1]
        for size, measured in self.points:
            if size > working_set_bytes:
                break
            rate = measured
        return rate

    @property
    def dram_bytes_per_s(self) -> float:
        return self.points[-1][1]

    def better(self, other: LimitCurve) -> LimitCurve:
        """The higher of two measurements of one device, point by point: others on a machine only ever slow it down."""
        points = tuple((size, max(a, b)) for (size, a), (_, b) in zip(self.points, other.points, strict=True))
        return LimitCurve(self.device, points, max(self.flops_per_s, other.flops_per_s))


def measure_curve(device: torch.device, dtype: torch.dtype, own: OwnProduct | None = None) -> LimitCurve:
    """The curve from 32 KiB to beyond the caches, four times the size a point. About a second.

    own: the kernel whose matrix product may set the rate of arithmetic, beside torch's.
    """
    data = torch.ones(buffer_bytes(device) // 4, dtype=torch.float32, device=device)
    sizes = [32 << 10]
    while sizes[-1] * 4 < data.nbytes:
        sizes.append(sizes[-1] * 4)
    rates = [read_rate(data[: size // 4]) for size in sizes] + [read_rate(data)]
    sizes.append(data.nbytes)
    # What a larger set reaches a smaller one can: small calls are slowed by their start and not by memory.
    for place in reversed(range(len(rates) - 1)):
        rates[place] = max(rates[place], rates[place + 1])
    del data
    return LimitCurve(str(device), tuple(zip(sizes, rates)), matrix_rate(device, dtype, own))


def measure_limit(device: torch.device, working_set_bytes: int, dtype: torch.dtype) -> Limit:
    """Time reads at the working set and at main memory's size, and a matrix product. Under a second."""
    data = torch.ones(buffer_bytes(device) // 4, dtype=torch.float32, device=device)
    near = dram = read_rate(data)
    if working_set_bytes < data.nbytes:
        near = max(read_rate(data[: max(working_set_bytes // 4, 1024)]), dram)
    del data
    return Limit(str(device), working_set_bytes, near, dram, matrix_rate(device, dtype))


def buffer_bytes(device: torch.device) -> int:
    """Size of a buffer that lies beyond this device's caches."""
    least, most = BUFFER_BYTES[device.type]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(least, min(most, free // 2))
    return max(least, min(most, CACHES_BEYOND * largest_cache_bytes()))


def read_rate(data: torch.Tensor) -> float:
    """Best bytes/s over a sum, a dot product of the halves and a copy (read and written) of fp32 numbers."""
    half = data.numel() // 2
    source, target = data[:half], data[half : 2 * half]
    passes = max(1, min(64, (16 << 20) // max(data.nbytes, 1)))
    works: tuple[Callable[[], object], ...] = (
        data.sum,
        lambda: torch.dot(source, target),
        lambda: target.copy_(source),
    )
    return data.nbytes / min(_best_seconds(work, data.device, passes) for work in works)


def matrix_rate(device: torch.device, dtype: torch.dtype, own: OwnProduct | None = None) -> float:
    """FLOP/s of a square matrix product: the best of torch's and, if `own` is given, of that kernel."""
    size = 1024 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    seconds = _best_seconds(lambda: left @ right, device, 1)
    if own is not None:
        weight = Weight.dense_from(right)
        if own.panels:
            weight = weight.to_panels()
        seconds = min(seconds, _best_seconds(lambda: own.linear(left, weight), device, 1))
    return 2 * size**3 / seconds


def _best_seconds(work: Callable[[], object], device: torch.device, passes: int) -> float:
    """Shortest time of one `work()`, over at most REPEATS runs of `passes` each, after a warm-up."""
    work()
    best, begin = float("inf"), time.perf_counter()
    for _ in range(REPEATS):
        if best < float("inf") and time.perf_counter() - begin > BUDGET_S:
            break
        _wait(device)
        start = time.perf_counter()
        for _ in range(passes):
            work()
        _wait(device)
        best = min(best, (time.perf_counter() - start) / passes)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
